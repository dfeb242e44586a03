"""What was learned from so far: how many rows and which, when they happened, and how they were predicted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from schemas.behaviours import BehaviourKind
from trainer.metrics import DAY, ScoredRows
from trainer.negatives.sampler import ContrastivePlan
from trainer.online.kinds import KindCounts, RecentKinds, TakesByKind
from trainer.online.prequential import RecentScores
from trainer.samples.catalogue import Catalogue
from trainer.samples.rows import Impression, learned_as
from trainer.state import State

_NUMBERS = (
    *("taken_in_time", "corrected", "steps", "rows"),
    *("rows_at_release", "event_at_release", "first_event_at", "last_event_at"),
)
_LATER_NUMBERS = ("upgraded", "values", "valued")
"""Those that an earlier build did not count."""
_USUAL_OF = 10_000
"""How many takes with a value the usual one is about the mean of."""


class TrainProgress:
    """Grows by `add`, a batch at a time; `begin_next` marks where a candidate was taken."""

    def __init__(self, catalogue: Catalogue, kinds: Sequence[str] = (), *, learns_kinds: bool = False) -> None:
        """`kinds` are those that have outputs of their own; `learns_kinds` is as the configuration has it."""
        self._catalogue = catalogue
        self._learns_kinds = learns_kinds
        self.steps = 0
        """Optimiser steps taken."""
        self.rows = 0
        """Rows learned from."""
        self.corrected = 0
        """Rows learned as not taken that a late take has corrected; they are rows, but no events of their own."""
        self.upgraded = 0
        """Rows learned as taken that a late take of a more reliable kind has corrected; likewise no events."""
        self.first_event_at: int | None = None
        """Second of the first row; None before it."""
        self.last_event_at: int | None = None
        """Second of the newest row; None before the first."""
        self.taken_in_time = self.rows_at_release = 0
        self.event_at_release: int | None = None
        self._rows_sha256 = ""
        self._scored: list[ScoredRows] = []
        self._recent = RecentScores()
        self._recent_kinds = RecentKinds(kinds)
        self.taken = TakesByKind()
        """The takes of each kind that were learned from."""
        self.values = self.valued = 0.0
        """Sum of the values of the last takes that have one, older ones less, and how many these are."""

    def add(
        self,
        rows: list[Impression],
        plan: ContrastivePlan | None,
        scores: Mapping[str, NDArray[np.float64]],
        *,
        kinds_BK: NDArray[np.float64] | None = None,
        dense_BF: NDArray[np.float32] | None = None,
    ) -> None:
        """Count a step made from these rows; `scores` are what each variant had predicted, (B,) each, `kinds_BK` those
        of the real model's further kinds, and `dense_BF` the numeric inputs.
        """
        self.steps += 1
        self.rows += len(rows)
        upgrades = sum(row.upgrade for row in rows)
        corrections = sum(row.correction for row in rows) - upgrades
        self.corrected += corrections
        self.upgraded += upgrades
        self.taken_in_time += sum(row.label for row in rows) - corrections - upgrades
        self.taken.add(rows)
        for row in rows:
            if row.label and row.value:
                kept = 1 - 1 / _USUAL_OF
                self.values, self.valued = self.values * kept + row.value, self.valued * kept + 1
        if kinds_BK is not None:
            self._recent_kinds.add(rows, kinds_BK)
        self._rows_sha256 = self._chained(rows, plan, dense_BF)
        if self.first_event_at is None:
            self.first_event_at = self.event_at_release = rows[0].second
        # the last row may be the correction of an old one
        self.last_event_at = max(self.last_event_at or 0, *(row.second for row in rows))
        first = np.array([not row.correction for row in rows])
        if not first.all():  # what is scored once more, knowing the answer, is no prediction
            rows = [row for row in rows if not row.correction]
            scores = {name: values[first] for name, values in scores.items()}
        if not rows:
            return
        scored = self._scored_rows(rows, dict(scores))
        self._scored.append(scored)
        self._recent.add(scored)

    def _chained(
        self, rows: list[Impression], plan: ContrastivePlan | None, dense_BF: NDArray[np.float32] | None
    ) -> str:
        lines = [self._rows_sha256]
        learned = partial(learned_as, kinds=self._learns_kinds)
        if dense_BF is not None:
            lines.append(hashlib.sha256(np.ascontiguousarray(dense_BF, "<f4").tobytes()).hexdigest())
        for row in rows:
            lines.append(f"{row.event_id}\t{row.user_id}\t{self._catalogue.item_id(row.item)}\t{learned(row)}")
        if plan is not None:
            lines.append("\t".join(["negatives", *(self._catalogue.item_id(int(item)) for item in plan.candidates)]))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _scored_rows(self, rows: list[Impression], scores: dict[str, NDArray[np.float64]]) -> ScoredRows:
        second = np.array([row.second for row in rows], np.float64)
        published = np.array([self._catalogue.published_at(row.item) for row in rows])
        age = second - published
        age[np.array([row.defines_publish for row in rows]) | (age < 0)] = np.nan
        assert self.first_event_at is not None
        return ScoredRows(
            user=np.array([row.user_id for row in rows]),
            item=np.array([self._catalogue.item_id(row.item) for row in rows]),
            occurred_at=second,
            label=np.array([row.label for row in rows], np.int64),
            age_seconds=age,
            catalogue=published < self.first_event_at + DAY,
            retaken=np.array([row.retaken for row in rows]),
            scores=scores,
        )

    @property
    def scored(self) -> int:
        """Rows scored before they were learned from: all but corrections."""
        return self.rows - self.corrected - self.upgraded

    def in_time(self, kinds: Sequence[str] = ()) -> tuple[float, ...]:
        """Shares of the takes learned from so far that came before their impression counted as not taken: of all takes,
        then of each of `kinds`.
        """
        shares = (self.taken[BehaviourKind(kind)].in_time for kind in kinds)
        of_all = KindCounts(self.taken_in_time, self.corrected).in_time
        return (of_all, *shares)

    @property
    def usual_value(self) -> float:
        """About the mean value of the last takes that have one; 0 before the first."""
        return self.values / self.valued if self.valued else 0.0

    @property
    def rows_sha256(self) -> str:
        """Hash over every training row, a chain over the steps: ids, label, features, negatives, order."""
        return self._rows_sha256 or hashlib.sha256().hexdigest()

    @property
    def rows_since_release(self) -> int:
        """Rows learned from since the last candidate."""
        return self.rows - self.rows_at_release

    @property
    def seconds_since_release(self) -> int:
        """Event time learned from since the last candidate."""
        since = self.event_at_release
        return 0 if since is None else (self.last_event_at or since) - since

    def begin_next(self) -> None:
        """The next candidate's rows begin here."""
        self.rows_at_release, self.event_at_release = self.rows, self.last_event_at

    def metrics(self) -> dict[str, float | None]:
        """Running prequential metrics over the newest rows."""
        return self._recent.metrics() | self.kind_metrics()

    def kind_metrics(self) -> dict[str, float | None]:
        """Those of the further kinds of takes alone."""
        return self._recent_kinds.metrics()

    def drain_scores(self) -> list[ScoredRows]:
        """Scores made since the last call, one table per step."""
        drained, self._scored = self._scored, []
        return drained

    def forget(self, user_id: str) -> None:
        """Remove a user's rows from the running metrics; what was learned from them stays learned."""
        self._recent.forget(user_id)
        self._recent_kinds.forget(user_id)

    def snapshot(self) -> State:
        """Everything but the scores that were not drained."""
        numbers = {name: getattr(self, name) for name in (*_NUMBERS, *_LATER_NUMBERS)}
        state = State(values={**numbers, "rows_sha256": self._rows_sha256, "taken": self.taken.snapshot()})
        state.put("recent", self._recent.snapshot())
        state.put("recent_kinds", self._recent_kinds.snapshot())
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        for name in _NUMBERS:
            setattr(self, name, state.values[name])
        for name in _LATER_NUMBERS:
            setattr(self, name, state.values.get(name, 0))
        self.taken.restore(state.values.get("taken", {}))
        self._rows_sha256 = state.values["rows_sha256"]
        self._recent.restore(state.part("recent"))
        self._recent_kinds.restore(state.part("recent_kinds") if "recent_kinds" in state.values else None)
        self._scored = []
