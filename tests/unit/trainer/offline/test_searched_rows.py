"""Searches and trigger items in the rows of a folder: what sees them, and what does not."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from schemas.errors import Misconfigured
from tests.factories.offline_folders import write
from tests.factories.samples import unit_vector
from tests.factories.searching_folders import write_searching
from trainer.datasets.exposures import of_rows_beside
from trainer.datasets.folder import open_data_set
from trainer.datasets.queries import Queries, without_searches
from trainer.datasets.spans import BehaviourLog
from trainer.features.config import FeatureConfig
from trainer.offline import registry
from trainer.offline.columns import Recorded, read_columns
from trainer.offline.data import CtrData
from trainer.offline.neural.ciubm import Ciubm
from trainer.offline.neural.columns import ColumnBatches
from trainer.offline.neural.flip_rows import RECENT, recent
from trainer.offline.protocols import ProtocolName, protocol_of
from trainer.offline.similarities import similarity_features
from trainer.samples.searches import QUERY_COLUMNS

OF_FEATURES = (
    *("query together", "query share", "query lift"),
    *("trigger together", "trigger share", "trigger lift"),
)


def recorded_of(folder: Path, *, off: bool = False, name: ProtocolName = "time-split") -> Recorded:
    data = open_data_set(folder, attributes=("cold_holdout",))
    protocol = protocol_of(BehaviourLog.of(without_searches(data) if off else data, folder), name)
    return read_columns(protocol, folder, live=FeatureConfig())


def without(folder: Path, *columns: str) -> Path:
    """The same folder whose files lack these columns."""
    other = folder.with_name(f"{folder.name}-without-{len(columns)}")
    other.mkdir()
    for path in folder.iterdir():
        table = pq.read_table(path)
        pq.write_table(table.drop_columns([name for name in columns if name in table.column_names]), other / path.name)
    return other


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_searching(tmp_path_factory.mktemp("here") / "set")


@pytest.fixture(scope="module")
def recorded(folder: Path) -> Recorded:
    return recorded_of(folder)


def with_noise(recorded: Recorded) -> CtrData:
    """Vectors for everything but the last item and the first query."""
    size, queries = len(recorded.items), recorded.items.queries
    vectors = np.stack([unit_vector(n) for n in range(size)])[None]
    has = np.ones((1, size), bool)
    has[:, [0, size - queries - 1, size - queries]] = False
    items = replace(recorded.items, vectors_EIV=vectors * has[:, :, None], has_vector_EI=has)
    return CtrData(items, recorded.histories, recorded.rows)


def test_queries_are_rows_behind_the_items_and_nothing_but_rows_names_them(recorded: Recorded, folder: Path) -> None:
    items, rows, data = recorded.items, recorded.rows, open_data_set(folder)
    count, queries = len(data.item_ids) + 1, Queries.of(data)
    assert items.queries == len(queries) == 5 and len(items) == count + 5 == len(items.titles) == len(items.hashes_I2)
    assert items.item_ids[count:] == queries.names and items.titles[count:] == queries.texts
    assert not items.category_I[count:].any() and not items.attributes_IA[count:].any()
    assert rows.query_N is not None and rows.trigger_N is not None
    assert set(rows.query_N.tolist()) == {0, *range(count, count + 5)}
    assert rows.trigger_N.min() == 0 < rows.trigger_N.max() < count
    assert rows.item_N.max() < count and recorded.histories.item_T.max() < count


@pytest.mark.parametrize("file", ["exposures", "none"])
def test_an_exposure_has_the_search_and_the_trigger_of_the_take_that_it_stands_beside(
    file: str, tmp_path: Path
) -> None:
    rows = recorded_of(write_searching(tmp_path / "set", shown=3 if file == "exposures" else None)).rows
    assert rows.query_N is not None and rows.trigger_N is not None
    taken = {
        (user, second): (query, trigger)
        for user, second, query, trigger, label in zip(
            *(one.tolist() for one in (rows.user_N, rows.second_N, rows.query_N, rows.trigger_N, rows.label_N)),
            strict=True,
        )
        if label
    }
    beside = np.flatnonzero(rows.label_N == 0)
    assert len(beside) > 100
    for row in beside:
        own = int(rows.query_N[row]), int(rows.trigger_N[row])
        assert own == taken[int(rows.user_N[row]), int(rows.second_N[row])]


def test_an_exposure_with_columns_of_its_own_keeps_them(tmp_path: Path) -> None:
    folder = write_searching(tmp_path / "set")
    shown = pq.read_table(folder / "exposures.parquet").to_pydict()
    triggers = [f"i{n % 7}" if n % 3 else None for n in range(len(shown["ts"]))]
    write(folder, "exposures", **shown, query_text=["own words"] * len(triggers), trigger_item=triggers)
    recorded = recorded_of(folder)
    rows, own = recorded.rows, recorded.items.titles.index("own words")
    assert rows.query_N is not None and rows.trigger_N is not None
    beside = rows.label_N == 0
    assert {own} <= set(rows.query_N[beside].tolist()) <= {0, own} and own not in rows.query_N[~beside]
    names = {recorded.items.item_ids[item] for item in rows.trigger_N[beside]}
    assert names == {"", *(f"i{n}" for n in range(7))}


def test_columns_without_searches_are_the_same_whether_others_search_or_not(folder: Path, recorded: Recorded) -> None:
    """Popularity, pairs, histories and facts count items and takes alone."""
    plain = recorded_of(without(folder, "query_text", "query_image"))
    base = plain.rows.dense_names
    assert recorded.rows.dense_names == (*base, *OF_FEATURES, *QUERY_COLUMNS) and plain.rows.query_N is None
    np.testing.assert_array_equal(recorded.rows.dense_NF[:, : len(base)], plain.rows.dense_NF)
    for column in ("user_N", "item_N", "label_N", "history_start_N", "history_stop_N", "retaken_N", "trigger_N"):
        np.testing.assert_array_equal(getattr(recorded.rows, column), getattr(plain.rows, column))
    for name in ("takes_before_N", "cold_N", "with_history_N"):
        np.testing.assert_array_equal(getattr(recorded.facts, name), getattr(plain.facts, name))
    count = len(plain.items)
    for name in ("attributes_IA", "category_I", "hashes_I2"):
        np.testing.assert_array_equal(getattr(recorded.items, name)[:count], getattr(plain.items, name))


def test_a_set_whose_searches_are_not_read_gives_the_rows_of_one_without_them(folder: Path) -> None:
    plain, off = (
        recorded_of(without(folder, "query_text", "query_image", "trigger_item")),
        recorded_of(folder, off=True),
    )
    for one in fields(plain.rows):
        np.testing.assert_array_equal(getattr(off.rows, one.name), getattr(plain.rows, one.name), err_msg=one.name)
    assert not off.reads_searches and off.items.item_ids == plain.items.item_ids


def test_under_cold_no_row_sees_a_held_out_trigger(folder: Path, tmp_path: Path) -> None:
    held = write_searching(tmp_path / "set")
    items = pq.read_table(held / "items.parquet").to_pydict()
    write(held, "items", **items, cold_holdout=[int(name[1:]) % 3 == 0 for name in items["item_id"]])
    seen = {}
    for name in ("time-split", "cold"):
        recorded = recorded_of(held, name=name)  # type: ignore[arg-type]
        assert recorded.rows.trigger_N is not None
        seen[name] = {int(recorded.items.item_ids[item][1:]) % 3 for item in recorded.rows.trigger_N if item}
    assert seen == {"time-split": {0, 1, 2}, "cold": {1, 2}}


def test_similarities_have_that_of_the_query_and_the_trigger_is_the_newest_of_the_history(recorded: Recorded) -> None:
    data = with_noise(recorded)
    found, names = similarity_features(data)
    rows, (vectors,) = data.rows, data.items.vectors_EIV
    assert rows.query_N is not None and rows.trigger_N is not None and names[-1] == "cosine query"
    expected = np.zeros_like(found)
    for row in range(len(rows)):
        target = vectors[rows.item_N[row]]
        taken = data.histories.item_T[rows.history_start_N[row] : rows.history_stop_N[row]].tolist()
        seen = [*taken, *([rows.trigger_N[row]] if rows.trigger_N[row] else [])][-50:]
        has = [vectors[item].any() and target.any() for item in seen]
        cosines, weights = (
            np.array([vectors[item] @ target for item, known in zip(seen, has, strict=True) if known]),
            np.array([2 ** (-back / 5) for back, known in zip(range(len(seen))[::-1], has, strict=True) if known]),
        )
        if len(cosines):
            newest = vectors[seen[-1]] @ target
            mean, recently = cosines.mean(), cosines @ weights / weights.sum()
            expected[row, :5] = mean, cosines.max(), recently, newest, 1
        expected[row, 5:] = target.any(), vectors[rows.query_N[row]] @ target
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[:, 6].any() and (found[rows.query_N == 0, 6] == 0).all()


def test_a_language_model_reads_the_query_and_the_trigger_as_the_latest_items(recorded: Recorded) -> None:
    data = with_noise(recorded)
    rows, found = data.rows, recent(data)
    assert rows.query_N is not None and rows.trigger_N is not None and found.shape == (len(rows), RECENT)
    for row in range(len(rows)):
        taken = data.histories.item_T[rows.history_start_N[row] : rows.history_stop_N[row]].tolist()[::-1]
        seen = [item for item in (rows.query_N[row], rows.trigger_N[row]) if item] + taken
        assert found[row].tolist() == ([*seen, 0, 0, 0])[:RECENT]


@pytest.mark.parametrize("name", ["ciubm", "din", "din-vectors", "dmf", "sa-ta", "simtier", "trees", "logistic"])
def test_every_model_says_something_else_of_a_row_with_another_query(name: str, recorded: Recorded) -> None:
    pytest.importorskip("sklearn")
    data = with_noise(recorded)
    similar, names = similarity_features(data)
    dense = np.concatenate([data.rows.dense_NF, similar], axis=1)
    data = replace(data, rows=replace(data.rows, dense_NF=dense, dense_names=(*data.rows.dense_names, *names)))
    model = registry.create(name)
    trial = model.trials[0] if name in ("trees", "logistic") else {"epochs": 3}
    trial = {**trial, "leaf_rows": 5, "rounds": 20} if name == "trees" else trial
    trial = {"c": 1.0} if name == "logistic" else trial
    model.fit(data, None, seed=0, trial=trial)
    assert data.rows.query_N is not None
    asked = data.select(data.rows.query_N > 0)
    rows = asked.rows
    columns = [place for place, one in enumerate(rows.dense_names) if "query" in one or one == "title words found"]
    unasked = rows.dense_NF.copy()
    unasked[:, columns] = 0
    other = replace(asked, rows=replace(rows, query_N=np.zeros(len(rows), np.int64), dense_NF=unasked))
    assert len(columns) == 8 and (model.predict(asked) != model.predict(other)).any()


def test_words_that_search_and_title_share_rank_by_how_rare_they_are(recorded: Recorded) -> None:
    pytest.importorskip("sklearn")
    data = with_noise(recorded)
    rows, titles = data.rows, data.items.titles
    model = registry.create("tfidf-query")
    model.fit(data, None, seed=0, trial={})
    scores = model.predict(data)
    assert rows.query_N is not None
    pairs = list(zip((titles[query] for query in rows.query_N), (titles[item] for item in rows.item_N), strict=True))
    of_pair = dict(zip(pairs, scores.tolist(), strict=True))
    assert of_pair["red shoe", "Red shoe"] == pytest.approx(1)
    assert of_pair["red shoe", "Green coat"] == 0 == of_pair["", "Red shoe"]
    assert 1 > of_pair["a blue hat", "Blue hat"] > of_pair["hat", "Blue hat"] > 0
    plain = data.select(np.arange(5))
    with pytest.raises(Misconfigured, match="--queries off"):
        model.fit(replace(plain, rows=replace(plain.rows, query_N=None)), None, seed=0, trial={})


def test_query_and_trigger_have_the_vectors_of_their_rows_encoder(recorded: Recorded) -> None:
    data = with_noise(recorded)
    both = np.concatenate([data.items.vectors_EIV, -data.items.vectors_EIV])
    items = replace(data.items, vectors_EIV=both, has_vector_EI=np.repeat(data.items.has_vector_EI, 2, axis=0))
    version_N = np.arange(len(data)) % 2
    data = replace(data, items=items, rows=replace(data.rows, encoder_N=version_N))
    assert data.rows.query_N is not None and data.rows.trigger_N is not None
    rows = np.flatnonzero((data.rows.query_N > 0) & (data.rows.trigger_N > 0))
    batch = ColumnBatches(data, history_length=3).batch(rows)
    for place, seen in enumerate((data.rows.query_N, data.rows.trigger_N)):
        vectors = batch.vectors_UV[batch.history_BL[:, place]].numpy()
        np.testing.assert_array_equal(vectors, both[version_N[rows], seen[rows]])
    similar = similarity_features(data)[0]
    np.testing.assert_allclose(similar, similarity_features(with_noise(recorded))[0], atol=1e-6)


def test_the_query_is_compared_in_the_space_of_its_rows_encoder(recorded: Recorded) -> None:
    data = with_noise(recorded)
    turned = np.stack([unit_vector(1_000 + n) for n in range(len(data.items))]) * data.items.has_vector_EI[0, :, None]
    both = np.stack([data.items.vectors_EIV[0], turned])
    version_N = np.arange(len(data)) % 2
    items = replace(data.items, vectors_EIV=both, has_vector_EI=np.repeat(data.items.has_vector_EI, 2, axis=0))
    data = replace(data, items=items, rows=replace(data.rows, encoder_N=version_N))
    found, names = similarity_features(data)
    assert data.rows.query_N is not None
    expected = (both[version_N, data.rows.item_N] * both[version_N, data.rows.query_N]).sum(1)
    np.testing.assert_allclose(found[:, names.index("cosine query")], expected, atol=1e-6)


def test_ciubm_counts_its_own_cosines_and_reads_the_words_of_searches(recorded: Recorded) -> None:
    data = with_noise(recorded)
    similar, names = similarity_features(data)
    dense, all_names = np.concatenate([data.rows.dense_NF, similar], axis=1), (*data.rows.dense_names, *names)
    data = replace(data, rows=replace(data.rows, dense_NF=dense, dense_names=all_names))
    live = [*recorded.rows.dense_names, "has vector"]
    assert live[-1 - len(QUERY_COLUMNS) : -1] == [*QUERY_COLUMNS]
    read = ColumnBatches(data, history_length=9, left_out=Ciubm.left_out).dense_NF
    np.testing.assert_array_equal(read, dense[:, [all_names.index(name) for name in live]])


def test_searches_of_held_out_takes_are_counted_for_no_query(tmp_path: Path) -> None:
    """As pairs of theirs are; they are no more and no less popular for it."""
    found = {}
    for name, every in (("none", 1_000), ("third", 3)):
        folder = write_searching(tmp_path / name)
        items = pq.read_table(folder / "items.parquet").to_pydict()
        write(folder, "items", **items, cold_holdout=[int(one[1:]) % every == every - 1 for one in items["item_id"]])
        found[name] = recorded_of(folder)
    plain, held = found["none"], found["third"]
    column = [plain.rows.dense_names.index(name) for name in ("takes", "query together")]
    np.testing.assert_array_equal(plain.rows.dense_NF[:, column[0]], held.rows.dense_NF[:, column[0]])
    is_held = held.held_out_N
    assert plain.rows.dense_NF[is_held, column[1]].any() and not held.rows.dense_NF[is_held, column[1]].any()
    np.testing.assert_array_equal(plain.rows.dense_NF[~is_held, column[1]], held.rows.dense_NF[~is_held, column[1]])


def test_rows_that_are_selected_keep_their_query_and_trigger(recorded: Recorded) -> None:
    data = with_noise(recorded)
    chosen = np.array([40, 3, 25])
    one, all_rows = (ColumnBatches(each, history_length=9) for each in (data.select(chosen), data))
    first, second = one.batch(np.arange(3)), all_rows.batch(chosen)
    assert first.history_BL.tolist() == second.history_BL.tolist()
    assert first.hashes_U2.tolist() == second.hashes_U2.tolist()


def test_where_neither_rows_nor_exposures_search_nothing_is_searched() -> None:
    rows, others = of_rows_beside(None, None, np.array([0, -1]), 2)
    assert rows.tolist() == others.tolist() == [-1, -1]
