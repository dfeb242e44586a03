"""Kinds of takes in a stream: how many of each came late, and how well those of the newest rows were predicted.

Letters: B rows, K kinds that have outputs of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from schemas.behaviours import BehaviourKind
from trainer.metrics import auc, log_loss, user_auc
from trainer.samples.rows import RELIABILITY, Impression
from trainer.state import State, whole_numbers


@dataclass(slots=True)
class KindCounts:
    """Takes of a kind, or a more reliable one, that were learned from."""

    on_time: int = 0
    """Known when their impression was resolved."""
    late: int = 0
    """Learned as a correction of their impression."""

    @property
    def in_time(self) -> float:
        """The share that was known in time; 1 where none was late."""
        return self.on_time / (self.on_time + self.late) if self.late else 1.0


class TakesByKind:
    """`KindCounts` of each kind of take; a purchase counts as a cart and a click too, each at most once per row."""

    def __init__(self) -> None:
        self._counts = {kind: KindCounts() for kind in RELIABILITY if kind.is_take}

    def __getitem__(self, kind: BehaviourKind) -> KindCounts:
        return self._counts[kind]

    def add(self, rows: Sequence[Impression]) -> None:
        """Count the takes of rows that are learned from."""
        for row in rows:
            for kind, counts in self._counts.items():
                if row.level_before < RELIABILITY[kind] <= row.level:
                    counts.late += row.correction
                    counts.on_time += not row.correction

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """The counts by kind."""
        return {kind.value: (one.on_time, one.late) for kind, one in self._counts.items()}

    def restore(self, counts: Mapping[str, Sequence[int]]) -> None:
        """Return to the counts of `snapshot`; an earlier build had none."""
        for kind in self._counts:
            self._counts[kind] = KindCounts(*counts.get(kind.value, ()))


@dataclass(frozen=True, eq=False)
class KindScores:
    """What rows came to in each kind, and what was predicted. A correction counts where it is new: its impression was
    scored before, and is scored once more with the features that it had.
    """

    user: NDArray[np.str_]
    first: NDArray[np.bool_]
    """Whether the row is an impression, and no correction."""
    labels: NDArray[np.bool_]
    """(B, K)"""
    new: NDArray[np.bool_]
    """(B, K) whether the row says anything new of the kind."""
    scores: NDArray[np.float64]
    """(B, K)"""

    @classmethod
    def of(cls, rows: Sequence[Impression], kinds: Sequence[str], scores_BK: NDArray[np.float64]) -> KindScores:
        """The scores of some rows."""
        rank_1K = np.array([[RELIABILITY[BehaviourKind(kind)] for kind in kinds]])
        first = np.array([not row.correction for row in rows], bool)
        labels = np.array([[row.level] for row in rows]) >= rank_1K
        before = np.array([[row.level_before] for row in rows]) >= rank_1K
        user = np.array([row.user_id for row in rows], np.str_)
        return cls(user, first, labels, first[:, None] | (labels & ~before), scores_BK)

    def __len__(self) -> int:
        return len(self.user)

    def where(self, chosen: NDArray[np.bool_]) -> KindScores:
        """Some of the rows."""
        return KindScores(**{one.name: getattr(self, one.name)[chosen] for one in fields(self)})

    @staticmethod
    def joined(parts: Sequence[KindScores]) -> KindScores:
        """The rows of all parts, one after the other."""
        columns = {one.name: [getattr(part, one.name) for part in parts] for one in fields(KindScores)}
        return KindScores(**{name: np.concatenate(arrays) for name, arrays in columns.items()})

    def snapshot(self) -> State:
        """The rows as columns."""
        state = State({name: getattr(self, name) for name in _COLUMNS})
        state.put_texts("user", self.user.tolist())
        return state

    @classmethod
    def restored(cls, state: State) -> KindScores:
        """Rows from `snapshot`."""
        return cls(user=np.array(state.texts("user"), np.str_), **{name: state.arrays[name] for name in _COLUMNS})


_COLUMNS = ("first", "labels", "new", "scores")


class RecentKinds:
    """Running metrics of the further kinds over about the newest `rows` rows."""

    def __init__(self, kinds: Sequence[str], rows: int = 20_000) -> None:
        self._kinds = tuple(kinds)
        self._rows = rows
        self._tables: deque[KindScores] = deque()
        self._count = 0

    def add(self, rows: Sequence[Impression], scores_BK: NDArray[np.float64]) -> None:
        """Add rows with what was predicted of them; the oldest ones leave."""
        if not self._kinds:
            return
        self._tables.append(KindScores.of(rows, self._kinds, scores_BK))
        self._count += len(rows)
        while self._count - len(self._tables[0]) >= self._rows:
            self._count -= len(self._tables.popleft())

    def metrics(self) -> dict[str, float | None]:
        """`<kind>_gauc`, `<kind>_auc`, `<kind>_logloss`, and `<kind>_calibration`, predicted over observed takes.

        What is late is observed when it comes, so calibration is above what it will be by the takes that are still out.
        """
        if not self._tables:
            return {}
        rows = KindScores.joined(list(self._tables))
        metrics: dict[str, float | None] = {}
        for place, kind in enumerate(self._kinds):
            said = rows.where(rows.new[:, place])
            label, score = said.labels[:, place].astype(np.int64), said.scores[:, place]
            _, users = np.unique(said.user, return_inverse=True)
            takes, predicted = int(label.sum()), float(rows.scores[rows.first, place].sum())
            found = {
                "gauc": user_auc(users.reshape(-1), label, score).weighted,
                "auc": auc(label, score),
                "logloss": log_loss(label, score) if len(label) else np.nan,
                "calibration": predicted / takes if takes else np.nan,
            }
            metrics |= {f"{kind}_{name}": None if np.isnan(value) else value for name, value in found.items()}
        return metrics

    def forget(self, user_id: str) -> None:
        """Remove a user's rows."""
        kept = (table.where(table.user != user_id) for table in self._tables)
        self._tables = deque(table for table in kept if len(table))
        self._count = sum(map(len, self._tables))

    def snapshot(self) -> State:
        """The tables as columns, and how long each is."""
        tables = list(self._tables)
        state = State({"lengths": whole_numbers(map(len, tables))})
        if tables:
            state.later(lambda: KindScores.joined(tables).snapshot())
        return state

    def restore(self, state: State | None) -> None:
        """Return to the state of `snapshot`; None where an earlier build had none."""
        self._tables.clear()
        lengths = [] if state is None else state.arrays["lengths"].tolist()
        self._count = sum(lengths)
        if state is None or not lengths:
            return
        rows = KindScores.restored(state)
        ends = np.cumsum(lengths).tolist()
        place = np.arange(len(rows))
        self._tables.extend(
            rows.where((place >= start) & (place < end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)
        )
