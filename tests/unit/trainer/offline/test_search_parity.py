"""Rows of a folder with searches and trigger items are those of a live trainer, number by number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pytest

from schemas.behaviours import Behaviour, BehaviourKind
from tests.factories.samples import DIM, embedding, unit_vector
from tests.factories.searching_folders import write_searching
from trainer.datasets.exposures import behaviours_of
from trainer.datasets.folder import DataSet, open_data_set
from trainer.datasets.queries import Queries
from trainer.datasets.spans import BehaviourLog
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState
from trainer.networks.collate import Collated, collate
from trainer.offline.columns import EXPOSURE_SEED, read_columns
from trainer.offline.data import CtrData
from trainer.offline.neural.columns import ColumnBatches
from trainer.offline.protocols import protocol_of
from trainer.offline.similarities import similarity_features
from trainer.online.uncounted_takes import UncountedTakes
from trainer.samples.catalogue import Catalogue
from trainer.samples.label_join import ImpressionJoin
from trainer.samples.rows import Impression
from trainer.samples.searches import QUERY_COLUMNS, SearchUse, is_hidden
from trainer.samples.window import Observed

LENGTH = 4
CONFIG = FeatureConfig(history_length=LENGTH, queries=True)


class Scene(NamedTuple):
    """The same rows both ways, one at a time."""

    data: DataSet
    ctr: CtrData
    live: list[tuple[Impression, Collated]]


def vector_of(name: str) -> np.ndarray:
    return unit_vector(sum(name.encode()))


def observed(data: DataSet) -> Iterator[list[Observed]]:
    log = behaviours_of(data, seed=EXPOSURE_SEED)
    searches = data.searches
    assert searches is not None

    def event(at: int) -> Observed:
        name, take, source = log.exposure_name(at), bool(log.is_take[at]), int(log.source[at])
        search, trigger = int(log.search[at]), int(log.trigger[at])
        behaviour = Behaviour.model_construct(
            event_id=f"t{name}" if take else name,
            kind=BehaviourKind.CLICK if take else BehaviourKind.EXPOSURE,
            user_id=data.user_ids[log.user[at]],
            item_id=data.item_ids[log.item[at]],
            occurred_at=datetime.fromtimestamp(int(log.ts[at]), UTC),
            exposure_id=name if take else None,
            query_text=None if search < 0 else searches.text(search),
            query_image=None if search < 0 else searches.images([search])[0],
            trigger_item=None if trigger < 0 else data.item_ids[trigger],
            drawn_from=None if source < 0 else f"ts{source}",
            drawn_at=None if source < 0 else datetime.fromtimestamp(int(log.source_ts[at]), UTC),
            defines_publish=False,
        )
        return Observed(0, at, int(log.ts[at]), behaviour)

    for _, places in groupby(range(len(log)), lambda at: int(log.ts[at])):
        yield [event(at) for at in places]


def live_rows(data: DataSet, names: list[tuple[str, str, int]]) -> list[tuple[Impression, Collated]]:
    """Rows of a stream, learned from in the order of `names` (user, item, second) one by one."""
    catalogue = Catalogue(DIM, CONFIG)
    for record in data.records(0, len(data.item_ids)):
        known = {"title": record.title, "category": record.category}
        known["published_at"] = datetime.fromtimestamp(record.publish_ts, UTC)  # type: ignore[assignment]
        catalogue.put_embedding(embedding(record.item_id, vector_of(record.item_id)).model_copy(update=known))
    for name in Queries.of(data).names:
        catalogue.put_query(name, vector_of(name))
    join = ImpressionJoin(
        catalogue, history_length=LENGTH, attribution_seconds=0.0, max_users=100, searches=SearchUse.NUMBERED
    )
    rows: dict[tuple[str, str, int], Impression] = {}
    uncounted = UncountedTakes()
    for events in observed(data):
        for row in join.resolved(before=events[0].second):
            rows[row.user_id, catalogue.item_id(row.item), row.second] = row
        uncounted.add(join.add_second(events))
    for row in join.resolved(before=float("inf")):
        rows[row.user_id, catalogue.item_id(row.item), row.second] = row
    state = FeatureState(CONFIG, catalogue)
    state.add(uncounted.pop(names[0][2]), before=names[0][2])
    made = []
    for name in names:
        row = rows[name]
        made.append((row, collate([row], None, catalogue, history_length=LENGTH, moment=state)))
        state.add(uncounted.pop(row.second), before=row.second)
    return made


@pytest.fixture(scope="module", params=[3, None], ids=["given", "drawn"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = write_searching(tmp_path_factory.mktemp("searching"), shown=request.param)
    data = open_data_set(folder)
    protocol = protocol_of(BehaviourLog.of(data, folder), "time-split")
    recorded = read_columns(protocol, folder, live=CONFIG, step_rows=1)
    rows, items = recorded.rows, recorded.items
    assert not recorded.leaks
    vectors = np.stack([np.zeros(DIM, np.float32), *(vector_of(name) for name in items.item_ids[1:])])
    has = np.arange(len(vectors)) > 0
    ctr = CtrData(replace(items, vectors_EIV=vectors[None], has_vector_EI=has[None]), recorded.histories, rows)
    names = [
        (data.user_ids[user], items.item_ids[item], second)
        for user, item, second in zip(rows.user_N.tolist(), rows.item_N.tolist(), rows.second_N.tolist(), strict=True)
    ]
    return Scene(data, ctr, live_rows(data, names))


def test_histories_have_the_trigger_and_before_it_the_query(scene: Scene) -> None:
    batches = ColumnBatches(scene.ctr, history_length=LENGTH)
    lengths = []
    for place, (_, theirs) in enumerate(scene.live):
        ours = batches.batch(np.array([place]))
        seen, known = ours.history_BL[0], theirs.batch.history_BL[0]
        seen, known = seen[seen > 0], known[known > 0]
        for column in ("hashes_U2", "vectors_UV", "has_vector_U"):
            np.testing.assert_array_equal(getattr(ours, column)[seen], getattr(theirs.batch, column)[known])
        lengths.append(len(seen))
    assert set(lengths) == set(range(1, LENGTH + 2))
    np.testing.assert_array_equal(batches._lengths_N, lengths)


def test_rows_have_the_columns_of_a_live_trainer_beside_their_vectors(scene: Scene) -> None:
    similar, names = similarity_features(scene.ctr)
    wanted = (*CONFIG.names, "has vector", *QUERY_COLUMNS)
    table = np.concatenate([scene.ctr.rows.dense_NF, similar], axis=1)
    all_names = (*scene.ctr.rows.dense_names, *names)
    ours = table[:, [all_names.index(name) for name in wanted]]
    theirs = np.concatenate([collated.batch.dense_BF.numpy() for _, collated in scene.live])
    for name, mine, other in zip(wanted, ours.T, theirs.T, strict=True):
        np.testing.assert_array_equal(mine, other, err_msg=name)
    for name in ("query together", "query share", "query words found", "query is title"):
        assert ours[:, wanted.index(name)].any(), name


def test_one_search_in_twenty_is_hidden_from_the_rows_from_which_it_is_hidden_live(scene: Scene) -> None:
    query_N, names = scene.ctr.rows.query_N, scene.ctr.items.item_ids
    assert query_N is not None
    theirs = [row.query > 0 for row, _ in scene.live]
    np.testing.assert_array_equal(query_N > 0, theirs)
    hidden = [is_hidden(row.user_id, row.second) for row, _ in scene.live]
    assert any(hidden) and not query_N[hidden].any()
    assert {names[query] for query in query_N if query} == set(Queries.of(scene.data).names)
