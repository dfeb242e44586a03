"""The live features of a folder's rows: parity with exact ones, and each leak planted and caught."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.factories.offline_folders import START, write, write_stream
from trainer.datasets.folder import open_data_set
from trainer.datasets.spans import BehaviourLog
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState
from trainer.features.states import DrawnSources
from trainer.features.take_columns import TakeColumns
from trainer.offline import live_features, simple
from trainer.offline.columns import Recorded, read_columns
from trainer.offline.labels import LABEL_KINDS, LabelKind
from trainer.offline.protocols import Protocol, protocol_of

SAME = (
    *("history length", "has history", "user idle", "category takes", "category share", "category recent"),
    *("category newest", "takes", "item idle", "age", "age known"),
)
"""Features with one definition in both forms."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("live"), users=200, items=100, takes=3_000)


def protocol_over(folder: Path) -> Protocol:
    data = open_data_set(folder, attributes=("cold_holdout",))
    return protocol_of(BehaviourLog.of(data, folder), "prequential")


def live(folder: Path, step_rows: int = live_features.STEP_ROWS, labels: LabelKind = "takes") -> Recorded:
    protocol = protocol_over(folder)
    return read_columns(protocol, folder, labels=labels, live=FeatureConfig(), step_rows=step_rows)


def test_live_features_are_the_exact_ones_but_for_the_step_that_a_row_waits_for(folder: Path) -> None:
    exact = read_columns(protocol_over(folder), folder).rows
    recorded = live(folder, step_rows=1)
    rows = recorded.rows
    short = rows.history_stop_N - rows.history_start_N <= 50
    assert not recorded.leaks and short.mean() > 0.5
    for name in SAME:
        ours = rows.dense_NF[:, rows.dense_names.index(name)][short]
        theirs = exact.dense_NF[:, exact.dense_names.index(name)][short]
        assert (np.abs(ours - theirs) < 1e-3).mean() >= 0.99, name
    for name in ("together", "together most", "together near", "together nearest", "together lift"):
        ours = rows.dense_NF[:, rows.dense_names.index(name)]
        theirs = exact.dense_NF[:, exact.dense_names.index(name)]
        assert np.corrcoef(ours, theirs)[0, 1] > 0.9, name


def test_models_of_one_feature_find_each_that_they_try(folder: Path) -> None:
    names = live(folder).rows.dense_names
    for model in (simple.popularity(), simple.category_affinity()):
        assert {trial["feature"] for trial in model.trials} <= set(names)


def test_what_is_an_outcome_is_no_feature(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "sold")
    items = pq.read_table(folder / "items.parquet")
    sold = pa.array([("often", "never")[row % 2] for row in range(len(items))])
    pq.write_table(items.append_column("sold", sold), tmp_path / "sold" / "items.parquet")
    protocol, config = protocol_over(tmp_path / "sold"), FeatureConfig(attributes=("sold",))
    for outcomes, told in ((), True), (("sold",), False):
        rows = read_columns(protocol, tmp_path / "sold", live=config, outcomes=outcomes).rows
        assert rows.dense_NF[:, rows.dense_names.index("sold share")].any() == told


def test_facts_of_a_folder_lie_at_the_numbers_of_its_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_features, "_ITEMS_AT_ONCE", 2)
    published = [START + second for second in (1, 5, 3, 2, 4)]
    years, prices = [2000, 2010, None, 2030, 1990], [1.0, None, math.e, 1.0, math.e]
    write(tmp_path, "items", item_id=[*"abcde"], title=["x"] * 5, publish_ts=published, year=years, price=prices)
    facts = live_features.folder_facts(FeatureConfig(), open_data_set(tmp_path, behaviours=False))
    np.testing.assert_equal(facts.published_I, [np.nan, *sorted(published)])
    price, year = (facts.numbers_IN[:, FeatureConfig().numbers.index(name)] for name in ("price", "year"))
    np.testing.assert_allclose(year, [np.nan, 0, 3, np.nan, -1, 1])
    np.testing.assert_allclose(price, [np.nan, 0, 0, 1, 1, np.nan], atol=1e-6)


def test_a_folder_without_leaks_passes(folder: Path) -> None:
    assert live(folder).leaks == ()


def test_a_counted_source_of_a_drawn_exposure_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureState, "sources", lambda state, target_B, *_: DrawnSources.none(len(target_B)))
    assert any("drawn from" in message for message in live(folder).leaks)


def test_a_look_at_the_own_second_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes up to the last row's second instead of before it: rows of that second in the next step see their own."""
    until = live_features._until
    monkeypatch.setattr(live_features, "_until", lambda columns, before: until(columns, before + 1))
    assert any("before its last step" in message for message in live(folder).leaks)


def test_takes_that_are_counted_too_late_are_found_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    until = live_features._until
    monkeypatch.setattr(live_features, "_until", lambda columns, before: until(columns, before - 86_400))
    assert any("before its last step" in message for message in live(folder).leaks)


def test_a_look_at_later_seconds_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = live_features._step

    def later(state: FeatureState, rows, chunk, *rest):  # type: ignore[no-untyped-def]
        ahead = TakeColumns(
            -1 - np.arange(len(chunk)),
            rows.item_N[chunk].astype(np.int64),
            rows.second_N[chunk],
            -1 - np.arange(len(chunk)),
            rows.label_N[chunk] == 0,
        )
        state.add(ahead, before=int(rows.second_N[chunk[-1]]) + 1)  # the rows' own takes, before their features
        return step(state, rows, chunk, *rest)

    monkeypatch.setattr(live_features, "_step", later)
    assert any("before its last step" in message for message in live(folder).leaks)


@pytest.mark.parametrize("labels", LABEL_KINDS)
def test_the_state_after_the_step_is_caught(labels: LabelKind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    until = live_features._until
    monkeypatch.setattr(live_features, "_until", lambda columns, before: until(columns, before) + 50)
    assert any("before its last step" in message for message in live(folder, labels=labels).leaks)
