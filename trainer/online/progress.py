"""What was learned from so far: how many rows and which, when they happened, and how they were predicted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trainer.metrics import DAY, ScoredRows
from trainer.negatives.sampler import ContrastivePlan
from trainer.online.prequential import RecentScores
from trainer.samples.catalogue import Catalogue
from trainer.samples.rows import Impression
from trainer.state import State

_NUMBERS = (
    *("taken_in_time", "corrected"),
    *("steps", "rows", "rows_at_release", "event_at_release", "first_event_at", "last_event_at", "rows_sha256"),
)


class TrainProgress:
    """Grows by `add`, a batch at a time; `release` marks where a candidate was taken."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._steps = self._rows = self._rows_at_release = 0
        self._taken_in_time = self._corrected = 0
        self._first_event_at: int | None = None
        self._event_at_release: int | None = None
        self._last_event_at: int | None = None
        self._rows_sha256 = ""
        self._scored: list[ScoredRows] = []
        self._recent = RecentScores()

    def add(
        self, rows: list[Impression], plan: ContrastivePlan | None, scores: Mapping[str, NDArray[np.float64]]
    ) -> None:
        """A step was made from these rows; `scores` are what each variant had predicted, (B,) each."""
        self._steps += 1
        self._rows += len(rows)
        corrections = sum(row.correction for row in rows)
        self._corrected += corrections
        self._taken_in_time += sum(row.label for row in rows) - corrections
        self._rows_sha256 = self._chained(rows, plan)
        if self._first_event_at is None:
            self._first_event_at = self._event_at_release = rows[0].second
        self._last_event_at = max(self._last_event_at or 0, rows[-1].second)
        first = np.array([not row.correction for row in rows])
        if not first.all():  # what is scored once more, knowing the answer, is no prediction
            rows = [row for row in rows if not row.correction]
            scores = {name: values[first] for name, values in scores.items()}
        if not rows:
            return
        scored = self._scored_rows(rows, dict(scores))
        self._scored.append(scored)
        self._recent.add(scored)

    def _chained(self, rows: list[Impression], plan: ContrastivePlan | None) -> str:
        lines = [self._rows_sha256]
        for row in rows:
            lines.append(f"{row.event_id}\t{row.user_id}\t{self._catalogue.item_id(row.item)}\t{row.label}")
        if plan is not None:
            lines.append("\t".join(["negatives", *(self._catalogue.item_id(int(item)) for item in plan.candidates)]))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _scored_rows(self, rows: list[Impression], scores: dict[str, NDArray[np.float64]]) -> ScoredRows:
        second = np.array([row.second for row in rows], np.float64)
        published = np.array([self._catalogue.published_at(row.item) for row in rows])
        age = second - published
        age[np.array([row.defines_publish for row in rows]) | (age < 0)] = np.nan
        assert self._first_event_at is not None
        return ScoredRows(
            user=np.array([row.user_id for row in rows]),
            item=np.array([self._catalogue.item_id(row.item) for row in rows]),
            occurred_at=second,
            label=np.array([row.label for row in rows], np.int64),
            age_seconds=age,
            catalogue=published < self._first_event_at + DAY,
            retaken=np.array([row.retaken for row in rows]),
            scores=scores,
        )

    @property
    def steps(self) -> int:
        """Optimiser steps taken."""
        return self._steps

    @property
    def rows(self) -> int:
        """Rows learned from."""
        return self._rows

    @property
    def corrected(self) -> int:
        """Rows learned as not taken that a late take has corrected; they are rows, but no events of their own."""
        return self._corrected

    @property
    def in_time(self) -> float:
        """Share of the takes learned from so far that came before their impression counted as not taken."""
        return 1.0 if not self._corrected else self._taken_in_time / (self._taken_in_time + self._corrected)

    @property
    def rows_sha256(self) -> str:
        """Hash over every training row, a chain over the steps: ids, label, negatives, order."""
        return self._rows_sha256 or hashlib.sha256().hexdigest()

    @property
    def first_event_at(self) -> int | None:
        """Second of the first row; None before it."""
        return self._first_event_at

    @property
    def last_event_at(self) -> int | None:
        """Second of the newest row; None before the first."""
        return self._last_event_at

    @property
    def rows_since_release(self) -> int:
        """Rows learned from since the last candidate."""
        return self._rows - self._rows_at_release

    @property
    def seconds_since_release(self) -> int:
        """Event time learned from since the last candidate."""
        since = self._event_at_release
        return 0 if since is None else (self._last_event_at or since) - since

    def release(self) -> None:
        """A candidate is taken of what was learned up to here."""
        self._rows_at_release, self._event_at_release = self._rows, self._last_event_at

    def metrics(self) -> dict[str, float | None]:
        """Running prequential metrics over the newest rows."""
        return self._recent.metrics()

    def drain_scores(self) -> list[ScoredRows]:
        """Scores made since the last call, one table per step."""
        drained, self._scored = self._scored, []
        return drained

    def forget(self, user_id: str) -> None:
        """Take a user's rows out of the running metrics; what was learned from them stays learned."""
        self._recent.forget(user_id)

    def snapshot(self) -> State:
        """Everything but the scores that were not drained."""
        state = State(values={name: getattr(self, f"_{name}") for name in _NUMBERS})
        state.put("recent", self._recent.snapshot())
        return state

    def restore(self, state: State) -> None:
        """Stand where `snapshot` was taken."""
        for name in _NUMBERS:
            setattr(self, f"_{name}", state.values[name])
        self._recent.restore(state.part("recent"))
        self._scored = []
