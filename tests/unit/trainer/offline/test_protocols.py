"""Spans and encoder versions of a folder of twelve takes, one each day, and of one to the second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from schemas.errors import Misconfigured
from tests.factories.neural import world
from tests.factories.offline_folders import DAY, START, write
from trainer.datasets.folder import open_data_set
from trainer.datasets.spans import BehaviourLog, Span
from trainer.offline import simple
from trainer.offline.protocols import held_out_by_hash, protocol_of


def log_of(folder: Path, ts: list[int]) -> BehaviourLog:
    write(folder, "items", item_id=["a", "b"], title=["a", "b"], publish_ts=[START] * 2)
    write(folder, "interactions", user_id=["u"] * len(ts), item_id=["a"] * len(ts), ts=ts, label=[1] * len(ts))
    return BehaviourLog.of(open_data_set(folder), folder)


def day(number: int) -> int:
    return START + number * DAY


def test_days_are_cut_at_midnights_and_an_encoder_is_made_at_each_of_them(tmp_path: Path) -> None:
    log = log_of(tmp_path, [day(n) for n in range(12)])
    found = protocol_of(log, "prequential")
    spans = found.encode, found.train, found.validation, found.test
    assert spans == (Span(day(0), day(6)), Span(day(6), day(8)), Span(day(8), day(10)), Span(day(10), day(12)))
    assert found.encoder_stops == tuple(day(n) for n in range(6, 12))
    assert protocol_of(log, "time-split").encoder_stops == (day(6),)


def test_times_to_the_second_are_cut_at_shares_of_the_takes(tmp_path: Path) -> None:
    ts = [START + 7 + n * n for n in range(20)]
    found = protocol_of(log_of(tmp_path, ts), "prequential")
    assert found.encoder_stops == (ts[10], ts[12], ts[14], ts[16])
    assert (found.train, found.validation) == (Span(ts[10], ts[14]), Span(ts[14], ts[16]))
    seconds = np.array([ts[0], ts[10] - 1, ts[10], ts[12] - 1, ts[12], ts[16], ts[19]])
    assert found.encoder_of(seconds).tolist() == [0, 0, 0, 0, 1, 3, 3]


def test_shares_that_end_at_one_second_make_one_encoder(tmp_path: Path) -> None:
    ts = [START + 7 + (10 if 10 <= n < 13 else n) for n in range(20)]
    assert protocol_of(log_of(tmp_path, ts), "prequential").encoder_stops == (ts[10], ts[14], ts[16])


def test_takes_at_too_few_moments_are_refused_with_where_spans_would_begin(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=rf"too short.*\[{day(0)}, {day(1)}, {day(1)}, .*at least four days"):
        protocol_of(log_of(tmp_path, [day(n // 6) for n in range(12)]), "time-split")


def test_under_cold_a_tenth_is_held_out_where_the_set_marks_none(tmp_path: Path) -> None:
    log = log_of(tmp_path, [day(n) for n in range(12)])
    assert protocol_of(log, "cold").log.held_out.tolist() == held_out_by_hash(["a", "b"]).tolist()
    marked = replace(log, held_out=np.array([False, True, False]))
    assert protocol_of(marked, "cold").log.held_out.tolist() == [False, True, False]
    named = replace(log, data=replace(log.data, item_ids=["i6", "t"]), held_out=np.zeros(3, bool))
    assert protocol_of(named, "cold").log.held_out.tolist() == [False, False, True]
    assert not protocol_of(named, "time-split").log.held_out.any()
    many = held_out_by_hash([f"i{n}" for n in range(2_000)])
    assert not many[0] and 0.08 < many.mean() < 0.12 and np.flatnonzero(many[:61]).tolist() == [12, 16, 36, 46, 51]


# ---- one feature as a score ------------------------------------------------------------------------------------------


def test_a_baseline_scores_by_the_feature_of_its_trial_and_begins_with_its_first() -> None:
    data = world([(1, [2]), (2, [1])], names=("takes", "takes 1d", "takes 7d"))
    model = simple.popularity()
    assert [trial["feature"] for trial in model.trials] == ["takes", "takes 1d", "takes 7d"] and not model.calibrated
    np.testing.assert_array_equal(model.predict(data), data.rows.dense_NF[:, 0].astype(float))
    tried = [[trial["feature"] for trial in one.trials] for one in (simple.content_knn(), simple.category_affinity())]
    assert tried[0] == ["cosine mean", "cosine recent", "cosine largest", "cosine newest"]
    assert tried[1] == ["category lift", "category share", "category recent", "category takes"]
    model.fit(data, None, seed=0, trial=model.trials[2])
    np.testing.assert_array_equal(model.predict(data), data.rows.dense_NF[:, 2].astype(float))
    with pytest.raises(Misconfigured, match="no feature 'cosine mean'; they have takes, takes 1d, takes 7d"):
        simple.content_knn().predict(data)
