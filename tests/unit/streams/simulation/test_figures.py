"""Buckets and comparisons of a simulated run, on a table of which every figure is known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from streams.simulation.figures import figures_of, spans_of
from streams.simulation.report import digest_of
from streams.simulation.run import SERVED, SimulatedRun
from trainer.datasets.spans import Span
from trainer.metrics import ScoredRows


def run_of(count: int, **columns: Any) -> SimulatedRun:
    with_history = columns.pop("with_history", np.ones(count, bool))
    plain = ScoredRows(
        user=np.array([f"u{n % 120}" for n in range(count)]),
        item=np.array(["a"] * count),
        occurred_at=np.arange(float(count)),
        label=(np.arange(count) // 120 % 2).astype(np.int64),
        age_seconds=np.full(count, np.nan),
        catalogue=np.zeros(count, bool),
        retaken=np.zeros(count, bool),
        scores={},
    )
    nothing: Any = None
    return SimulatedRun(replace(plain, **columns), with_history, "", count, 1, nothing, ())


def test_the_rows_of_the_test_span_are_told_apart_by_history_retakes_and_whether_their_item_was_known() -> None:
    run = run_of(
        9,
        item=np.array(["a", "b", "c", "a", "b", "c", "c", "a", "b"]),
        retaken=np.array([0, 1, 0, 0, 0, 0, 0, 1, 0], bool),
        with_history=np.array([1, 1, 1, 1, 1, 1, 0, 0, 0], bool),
    )
    cold = np.array([False, False, True, True])
    log: Any = SimpleNamespace(data=SimpleNamespace(item_ids=["a", "b", "c"]), test=Span(3, 9), cold=lambda span: cold)
    found = {name: np.flatnonzero(rows).tolist() for name, rows in spans_of(run, log).items()}
    assert found["test"] == [3, 4, 5] and found["test_cold"] == [4, 5]
    assert found["test_new_users"] == [6, 8] and found["test_retaken"] == [7]
    assert found["last_third"] == [6, 8] and found["overall"] == [0, 2, 3, 4, 5, 6, 8]
    assert "test" not in spans_of(run, None)


def test_models_are_compared_with_the_reference_and_a_serving_release_with_the_other_over_the_rows_of_both() -> None:
    count = 720
    label = (np.arange(count) // 120 % 2).astype(np.int64)
    noise = np.random.default_rng(0).random((4, count))
    served, other = noise[0].copy(), noise[1].copy()
    served[:110], other[:100] = np.nan, np.nan
    run = run_of(count, scores={"ciubm": 0.1 + 0.8 * label, "din": noise[2], SERVED: served})
    found = figures_of(
        run, {"all": np.ones(count, bool), "few": np.arange(count) < 499}, other={SERVED: other, "ciubm": noise[3]}
    )
    rows = {name: of["all"]["impressions"] for name, of in found["figures"].items()}
    assert rows == {"ciubm": 720, "din": 720, SERVED: 610, f"other:{SERVED}": 610, "other:ciubm": 720}
    known = found["figures"]["ciubm"]["all"]
    loss = -(np.log(0.9) + np.log(0.9)) / 2  # 0.9 for every take, 0.1 for every other row
    assert known["logloss"] == pytest.approx(loss) and (known["gauc"], known["users"]) == (1.0, 120)
    assert "calibration" not in known
    names = ("ciubm-din", f"ciubm-{SERVED}", "ciubm-other:ciubm", f"{SERVED}-other:{SERVED}")
    assert found["paired"].keys() == set(names)
    assert all(found["paired"][name]["all"]["difference"] > 0.3 for name in names[:3])
    assert {of["few"] for of in (*found["figures"].values(), *found["paired"].values())} == {None}


def test_intervals_are_drawn_by_the_seed_and_go_from_low_to_high() -> None:
    count = 720
    noise = np.random.default_rng(1).random((2, count))
    run = run_of(count, scores={"ciubm": noise[0], "din": noise[1]})
    spans = {"all": np.ones(count, bool)}
    first, again, other = (figures_of(run, spans, seed=seed)["paired"]["ciubm-din"]["all"] for seed in (3, 3, 4))
    assert first == again and first["low"] < first["difference"] < first["high"]
    assert first["difference"] == other["difference"] and first["low"] != other["low"]


def test_rows_that_differ_in_anything_that_is_compared_have_another_digest() -> None:
    rows = run_of(4).scored
    changed = (
        {"label": 1 - rows.label},
        {"occurred_at": rows.occurred_at + 1},
        {"user": rows.user[::-1]},
        {"item": np.array(["a", "a", "a", "b"])},
    )
    digests = [digest_of(one) for one in (rows, replace(rows), *(replace(rows, **change) for change in changed))]
    assert digests[0] == digests[1] and len(set(digests)) == 5


def test_lists_are_judged_one_by_one_and_a_list_is_what_one_user_saw_in_one_second() -> None:
    count = 600
    place = np.arange(count)
    user, second = place // 2 % 150, place // 300  # two rows of each user in each second
    label = place % 2
    right = np.where(second == 1, label, 1 - label) + 10.0 * second  # wrong within the first second, and right after it
    run = run_of(
        count,
        user=np.array([f"u{n}" for n in user]),
        occurred_at=second.astype(float),
        label=label,
        scores={"ciubm": 1 / (1 + np.exp(5 - right))},
    )
    (found,) = figures_of(run, {"all": np.ones(count, bool)})["figures"]["ciubm"].values()
    assert found["list_gauc"] == pytest.approx(0.5) and found["gauc"] == pytest.approx(0.5)
    run = replace(run, scored=replace(run.scored, scores={"ciubm": (label + 2.0 * (second == 0)) / 4}))
    (found,) = figures_of(run, {"all": np.ones(count, bool)})["figures"]["ciubm"].values()
    assert found["list_gauc"] == 1 and found["gauc"] == pytest.approx(0.75)
