"""The report of a simulated run as text, and what is read back of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from schemas.errors import Misconfigured
from schemas.manifests import PromotionDecision
from streams.simulation.report import digest_of, document_of, read_run, text_of, write_run
from streams.simulation.run import SERVED, SimulatedRun
from trainer.datasets.spans import Span
from trainer.metrics import ScoredRows
from trainer.online.intake import EventCounts

ROWS = 720


def make_run(**scores: Any) -> SimulatedRun:
    """Six rows of each of 120 users, every other one a take."""
    rows = ScoredRows(
        user=np.array([f"u{n % 120}" for n in range(ROWS)]),
        item=np.array(["a"] * ROWS),
        occurred_at=np.arange(float(ROWS)),
        label=(np.arange(ROWS) // 120 % 2).astype(np.int64),
        age_seconds=np.full(ROWS, np.nan),
        catalogue=np.zeros(ROWS, bool),
        retaken=np.zeros(ROWS, bool),
        scores={"ciubm": np.full(ROWS, 0.5)} | scores,
    )
    decision = PromotionDecision(passed=True, reasons=[], against=None, rows=0)
    refused = decision.model_copy(update={"passed": False, "reasons": ["worse"]})
    counts = EventCounts(received=7, trained=7, late=0, duplicate=0, dead_lettered=0, erased=0, pending=0)
    return SimulatedRun(rows, np.ones(ROWS, bool), "sha", 1_234, 56, counts, (decision, refused, refused))


def make_log() -> Any:
    data = SimpleNamespace(name="films", item_ids=["a"])
    return SimpleNamespace(data=data, test=Span(600, ROWS), cold=lambda span: np.array([False, False]))


def test_a_document_holds_the_run_and_its_decisions_and_judges_what_served_beside_what_learned() -> None:
    run = make_run(**{SERVED: np.full(ROWS, 0.25)})
    found = document_of(run, make_log(), other=None, seed=4)
    facts = ("data", "seed", "training_rows_sha256", "rows_trained", "steps")
    assert [found[name] for name in facts] == ["films", 4, "sha", 1_234, 56]
    assert found["accounts"]["trained"] == 7 and [one["passed"] for one in found["releases"]] == [True, False, False]
    assert list(found["prequential"]) == ["ciubm"] and list(found["figures"]) == ["ciubm", SERVED]
    other = make_run(din=np.random.default_rng(0).random(ROWS))
    pairs = [document_of(other, make_log(), other=None, seed=seed)["paired"]["ciubm-din"]["overall"] for seed in (0, 4)]
    assert pairs[0]["low"] != pairs[1]["low"]
    assert found["figures"][SERVED]["overall"]["logloss"] == pytest.approx(-(np.log(0.25) + np.log(0.75)) / 2)


def test_what_was_decided_and_scored_is_told_bucket_by_bucket() -> None:
    figures = {"auc": 0.6, "gauc": 0.625, "list_gauc": 0.65, "logloss": 0.5, "impressions": 1_200, "users": 1_100}
    gain = {"difference": 0.0125, "low": -0.5, "high": 0.25}
    document = {
        "data": "films", "rows_trained": 12_345, "steps": 1_024, "wall_seconds": 2.5, "training_rows_sha256": "abc",
        "releases": [{"passed": True}, {"passed": False}, {"passed": False}], "kinds": {},
        "figures": {"ciubm": {"overall": figures, "few": None, "test": None},
                    "din": {"overall": figures | {"auc": 0.7}, "few": None, "test": figures},
                    "other:ciubm-2": {"overall": figures, "few": None, "test": None}},
        "paired": {"ciubm-din": {"overall": gain, "few": None, "test": None},
                   "ciubm-other:ciubm-2": {"overall": gain | {"low": -0.25}, "few": None, "test": None}},
    }  # fmt: skip
    heads = ["", "| model | AUC | GAUC | in lists | log-loss | GAUC of the reference minus it |", "|" + " --- |" * 6]
    kinds = text_of(document | {"kinds": {"cart_auc": 0.75, "cart_calibration": None}}).splitlines()[4:6]
    assert kinds == ["", "Kinds of takes, the model that learns, newest rows: cart_auc 0.7500, cart_calibration -"]
    assert text_of(document).splitlines() == [
        "# films: live", "",
        "- 12,345 rows in 1,024 steps, 2.5 s; rows sha256 abc",
        "- 1 of 3 candidates became current; `served` is what the release in force said of each row",
        "", "## overall: 1,200 impressions, 1,100 users", *heads,
        "| ciubm | 0.6000 | 0.6250 | 0.6500 | 0.5000 |  |",
        "| din | 0.7000 | 0.6250 | 0.6500 | 0.5000 | +0.0125 [-0.5000, +0.2500] |",
        "| other:ciubm-2 | 0.6000 | 0.6250 | 0.6500 | 0.5000 | +0.0125 [-0.2500, +0.2500] |",
        "", "## test: 1,200 impressions, 1,100 users", *heads,
        "| din | 0.6000 | 0.6250 | 0.6500 | 0.5000 |  |",
    ]  # fmt: skip


def test_scores_are_read_back_and_a_folder_without_them_is_refused(tmp_path: Path) -> None:
    run, out = make_run(score_like=np.arange(float(ROWS))), tmp_path / "new" / "folder"
    write_run(run, {}, out)
    write_run(run, {"again": 1}, out)
    digest, scores = read_run(out)
    assert digest == digest_of(run.scored) and list(scores) == ["ciubm", "score_like"]
    np.testing.assert_array_equal(scores["score_like"], np.arange(float(ROWS)))
    whole = (out / "scores.npz").read_bytes()
    for held in (b"no archive", b"", whole[: len(whole) // 2]):
        (out / "scores.npz").write_bytes(held)
        with pytest.raises(Misconfigured, match="holds no scores"):
            read_run(out)
    np.savez(out / "scores.npz", score_ciubm=np.zeros(2))
    with pytest.raises(Misconfigured, match="holds no scores"):
        read_run(out)
    with pytest.raises(Misconfigured, match="--out"):
        write_run(replace(run), {}, out / "report.json" / "below")
