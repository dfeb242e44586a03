"""Scores to figures, on rows of which every figure is known, and what a report says of a study."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from streams.evaluation.figures import figures_of
from streams.evaluation.report import document_of
from streams.evaluation.study import TestScores as Scores
from trainer.datasets.spans import Span
from trainer.offline.buckets import RowFacts

DAY = 86_400
ROWS, USERS = 720, 120
LABELS = np.arange(ROWS) // USERS % 2
"""Of each user's six rows every other one is a take."""


def make_study() -> Any:
    """A study whose test rows are the newest, behind as many of others that are all takes."""
    facts = RowFacts(
        age_seconds_N=np.full(2 * ROWS, np.nan),
        from_start_N=np.zeros(2 * ROWS, bool),
        takes_before_N=np.repeat([0, 5], ROWS),
        cold_N=np.arange(2 * ROWS) >= 2 * ROWS - 499,
        with_history_N=np.ones(2 * ROWS, bool),
        retaken_N=np.zeros(2 * ROWS, bool),
        days_only=True,
    )
    users = np.concatenate([np.zeros(ROWS, np.int64), np.arange(ROWS) % USERS])
    rows = SimpleNamespace(
        user_N=users, label_N=np.concatenate([np.ones(ROWS, np.int8), LABELS.astype(np.int8)]), dense_names=("a", "b")
    )
    spans = {name: Span(n * DAY, (n + 1) * DAY) for n, name in enumerate(("encode", "train", "validation", "test"))}
    return SimpleNamespace(
        recorded=SimpleNamespace(rows=rows, facts=facts, labels="takes", drawn_from="drawn", reads_searches=False),
        protocol=SimpleNamespace(
            log=SimpleNamespace(data=SimpleNamespace(name="films", left_out="3 rows")),
            name="time-split",
            encoder_stops=(1, 2, 3),
            **spans,
        ),
        kind="csft",
        test_rows=np.arange(ROWS, 2 * ROWS),
        train_rows=np.arange(5),
        validation_rows=np.arange(4),
        tuned_on=np.arange(3),
        tuning=lambda name: [{"trial": {"of": name}}],
    )


def scored(model: str, seed: int, values: Any, *, calibrated: bool = True) -> Scores:
    return Scores(model, seed, np.asarray(values, np.float64), calibrated, 1.5 + seed, 0.25)


def test_models_are_compared_with_ciubm_by_the_mean_over_seeds_of_each_user() -> None:
    right, wrong = 0.25 + 0.5 * LABELS, 0.75 - 0.5 * LABELS
    half = np.where(np.arange(ROWS) % USERS < USERS // 2, right, wrong)
    scores = [
        scored("din", 0, half), scored("ciubm", 0, right), scored("din", 1, wrong), scored("ciubm", 1, half),
        scored("rank", 0, 9 * half, calibrated=False),
    ]  # fmt: skip
    found = figures_of(make_study(), scores)
    overall = {row["model"]: row for row in found.means if row["bucket"] == "overall"}
    assert {name: (row["gauc"], row["seeds"]) for name, row in overall.items()} == {
        "din": (0.25, 2), "ciubm": (0.75, 2), "rank": (0.5, 1)
    }  # fmt: skip
    assert overall["din"]["gauc_spread"] == pytest.approx(0.5 / 2**0.5) and overall["rank"]["gauc_spread"] is None
    assert str([overall["din"][name] for name in ("impressions", "users")]) == "[720, 120]", "whole numbers"
    # half of the users are at 1/2 under one seed and 0 under the other: between 0 and 1/2 of the seed-averaged model
    assert 0.2 < overall["din"]["ci_low"] < 0.25 < overall["din"]["ci_high"] < 0.3
    gains = {row["model"]: row for row in found.paired if row["bucket"] == "overall"}
    assert {name: (row["reference"], row["difference"]) for name, row in gains.items()} == {
        "din": ("ciubm", 0.5), "rank": ("ciubm", 0.25)
    }  # fmt: skip
    assert gains["din"]["low"] == gains["din"]["high"] == 0.5, "it is the same for every user"
    assert gains["rank"]["low"] < 0.25 < gains["rank"]["high"]
    assert overall["ciubm"]["ne"] is not None and overall["rank"]["ne"] is None
    assert [(row["model"], row["seed"]) for row in found.calibration] == [
        ("din", 0), ("ciubm", 0), ("din", 1), ("ciubm", 1)
    ]  # fmt: skip
    assert "cold" in found.too_small and "takes_1_9" not in found.too_small
    assert {row["bucket"] for row in found.rows} == {row["bucket"] for row in found.means} >= {"overall"}
    assert len({row["bucket"] for row in found.rows}) == 2, "the bucket of items that were taken a few times holds all"


def test_a_document_says_of_which_rows_and_vectors_the_figures_are() -> None:
    study = make_study()
    study.recorded.facts.with_history_N[-7:] = False
    scores = [scored("din", 0, LABELS), scored("din", 1, LABELS)]
    figures = figures_of(make_study(), [scored("din", 0, LABELS), scored("rank", 0, 1 - LABELS, calibrated=False)])
    document = document_of(study, scores, figures)
    assert document["about"] == {
        "data": "films", "protocol": "time-split", "labels": "takes", "vectors": "csft", "versions": 3,
        "spans": {"encode": "01 January 1970", "train": "02 January 1970", "validation": "03 January 1970",
                  "test": "04 January 1970"},
        "rows": {"train": 5, "validation": 4, "test": ROWS, "without_history": 7},
        "negatives": "drawn", "left_out": "3 rows", "searches": None, "features": ["a", "b"],
    }  # fmt: skip
    for name in ("rows", "means", "paired", "calibration", "too_small"):
        assert document[name] == getattr(figures, name) != []
    assert document["tuning"] == {"din": [{"trial": {"of": "din"}}]}
    assert document["cost"] == [
        {"model": "din", "seed": seed, "fit_seconds": 1.5 + seed, "predict_seconds": 0.25} for seed in (0, 1)
    ]
