"""Candidates of a simulated trainer: what is compared with what, and what never comes to a comparison."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from streams.simulation.releases import SimulatedReleases
from streams.simulation.run import _Histories
from tests.factories.samples import make_trainer, small_config
from trainer.online.gate import GateConfig
from trainer.online.trainer import Candidate, OnlineTrainer


class Due:
    """A trainer of which a release is always due."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainer = make_trainer(small_config())
        self.begun, self.made = 0, 0
        self.is_bad = False
        self.honest = self.trainer.candidate
        monkeypatch.setattr(OnlineTrainer, "release_due", lambda _: True)
        monkeypatch.setattr(OnlineTrainer, "begin_next", lambda _: self.begin())
        monkeypatch.setattr(OnlineTrainer, "candidate", lambda _: self.candidate())
        self.releases = SimulatedReleases(self.trainer, GateConfig(), now=datetime(2026, 1, 1, tzinfo=UTC))

    def begin(self) -> None:
        self.begun += 1

    def candidate(self) -> Candidate:
        """Each of other weights than the one before."""
        self.made += 1
        made = self.honest()
        change = np.nan if self.is_bad else float(self.made)
        weights = {name: one + change if one.is_floating_point() else one for name, one in made.weights.items()}
        return replace(made, weights=weights)


def test_a_candidate_whose_weights_are_not_finite_is_refused_without_a_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    due = Due(monkeypatch)
    due.releases.act()
    due.is_bad = True
    due.releases.act()
    assert [one.passed for one in due.releases.decisions] == [True, False] and due.begun == 2
    assert due.trainer.shadow is None
    due.is_bad = False
    first = due.releases._serving
    due.releases.act()
    shadow = due.trainer.shadow
    assert first is not None and shadow is not None and shadow.against.serving == first[1].release_id
    assert first[1].release_id.startswith("r000001-")
    assert shadow is not None and len(due.releases.decisions) == 2 and due.begun == 3
    assert shadow.against.serving == shadow.against.best != shadow.candidate.release_id


def test_the_best_release_so_far_is_compared_with_while_another_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    due = Due(monkeypatch)
    due.releases.act()
    due.releases.act()
    first, second = due.trainer.shadow, due.releases._candidate
    assert first is not None and second is not None
    best = first.against.serving
    passed = due.releases.decisions[0].model_copy(update={"best": best})
    due.trainer.shadow = None
    due.releases._conclude(second, passed)
    due.releases.act()
    shadow = due.trainer.shadow
    assert shadow is not None and (shadow.against.serving, shadow.against.best) == (second[1].release_id, best)
    third, scorer = due.releases._candidate, due.releases._scorer
    assert third is not None
    due.trainer.shadow = None
    due.releases._conclude(third, passed)
    due.releases.act()
    shadow = due.trainer.shadow
    assert shadow is not None and (shadow.against.serving, shadow.against.best) == (third[1].release_id, best)
    assert due.releases._scorer is not scorer
    assert not any(torch.isnan(one).any() for one in second[0].values() if one.is_floating_point())


def test_a_release_that_is_better_than_all_before_it_is_the_best_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    due = Due(monkeypatch)
    due.releases.act()
    due.releases.act()
    second = due.releases._candidate
    assert second is not None
    due.trainer.shadow = None
    due.releases._conclude(second, due.releases.decisions[0].model_copy(update={"best": None}))
    due.releases.act()
    shadow = due.trainer.shadow
    assert shadow is not None and shadow.against.serving == shadow.against.best == second[1].release_id


def test_a_comparison_that_is_over_is_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    due = Due(monkeypatch)
    due.releases.act()
    due.releases.act()
    shadow = due.trainer.shadow
    assert shadow is not None
    due.releases.act()
    assert due.trainer.shadow is shadow and due.made == 2, "it has not seen its rows"
    monkeypatch.setattr(type(shadow), "complete", True)
    monkeypatch.setattr(OnlineTrainer, "release_due", lambda _: False)
    due.releases.act()
    due.releases.act()
    assert due.trainer.shadow is None and len(due.releases.decisions) == 2 and due.made == 2
    assert due.releases.decisions[1].against == shadow.against.serving


def test_a_release_says_of_which_rows_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    due = Due(monkeypatch)
    learned, honest = {"last_event_at": 1_700_000_000, "rows_trained": 34, "steps": 5}, due.honest
    due.honest = lambda: replace(honest(), **learned)  # type: ignore[method-assign]
    due.releases.act()
    due.honest = honest  # type: ignore[method-assign]
    first = due.releases._candidate
    due.releases.act()
    assert first is not None and due.releases._candidate is not None
    assert first[1].last_event_at == datetime.fromtimestamp(1_700_000_000, UTC)
    assert (first[1].rows_trained, first[1].steps) == (34, 5)
    assert due.releases._candidate[1].last_event_at is None


class Halves:
    """A scorer that gives row n of a batch the probability 1 / (n + 2)."""

    def probabilities(self, batch: int) -> np.ndarray:
        return 1 / np.arange(2.0, batch + 2.0)[:, None]


def test_a_row_that_is_learned_once_more_is_neither_scored_nor_counted_again() -> None:
    trainer: Any = None
    releases, histories = SimulatedReleases(trainer, GateConfig(), now=datetime(2026, 1, 1, tzinfo=UTC)), _Histories()
    rows: Any = [
        SimpleNamespace(correction=correction, history=history)
        for correction, history in ((False, (3,)), (True, (3,)), (False, ()))
    ]
    assert releases.scores.tolist() == []
    batch: Any = len(rows)
    for observer in (releases, histories):
        observer.observe(rows, batch)
    assert np.isnan(releases.scores).tolist() == [True, True] and histories.with_history == [True, False]
    releases._scorer = Halves()  # type: ignore[assignment]
    releases.observe(rows, batch)
    assert releases.scores[2:].tolist() == [0.5, 0.25]
