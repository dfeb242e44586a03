"""Space-time negative sampling (ST-NGS) for the contrastive term: the negatives of each take of a batch.

Source: MIM (arXiv 2502.00321), section on space-time negative sampling. On one trainer, *space* is the takes of other
users in this batch and in the current window, *time* is the bank of earlier windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.changed_rows import ChangedRows
from trainer.negatives.memory_bank import SpaceTimeMemory
from trainer.samples.numbering import ItemNumbers
from trainer.samples.rows import Impression
from trainer.state import State, Table


@dataclass(frozen=True)
class ContrastivePlan:
    """Ids only; no tensor, no weight. P = positives, K = candidates (batch, space and time together)."""

    rows: NDArray[np.int64]
    """(P,) index of each positive's impression in the batch."""
    positives: NDArray[np.int64]
    """(P,) item numbers."""
    candidates: NDArray[np.int64]
    """(K,) distinct item numbers."""
    allowed: NDArray[np.bool_]
    """(P, K) False where a candidate is the positive itself, the same content, an earlier take of this user, or an item
    that was taken after the same search."""
    log_q: NDArray[np.float32]
    """(K,) log of the probability that the item is among the candidates."""
    positive_log_q: NDArray[np.float32]
    """(P,) likewise for each positive."""


class TakeCounts:
    """Takes per item with exponential decay in event time: the q of the logQ correction.

    Source: sampling-bias-corrected neural modeling (Yi et al., RecSys 2019). New takes weigh more instead of all counts
    shrinking, so that a take costs one addition.
    """

    def __init__(self, half_life_seconds: float) -> None:
        self._rate = np.log(2.0) / half_life_seconds
        self._counts = np.zeros(1024)
        self._changed = ChangedRows()
        self._total = 0.0
        self._taken = 0
        self._origin: int | None = None

    def snapshot(self) -> State:
        """The decayed counts and their scale."""
        state = State(values={"total": self._total, "origin": self._origin})
        state.put_table("", Table(len(self._counts), self._changed, self._copied))
        return state

    def _copied(self, numbers: NDArray[np.int64]) -> Callable[[slice], State]:
        counts = self._counts[numbers]
        return lambda part: State({"counts": counts[part]})

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        self._counts, self._changed = state.arrays["counts"].copy(), ChangedRows()
        self._total, self._origin = state.values["total"], state.values["origin"]
        self._taken = int(np.count_nonzero(self._counts))

    def add(self, item: int, second: int) -> None:
        """Count one take."""
        if self._origin is None:
            self._origin = second
        exponent = self._rate * (second - self._origin)
        if exponent > 50:
            self._counts *= np.exp(-exponent)
            self._changed.touch(slice(0, len(self._counts)))
            self._total *= np.exp(-exponent)
            self._origin, exponent = second, 0.0
            self._taken = int(np.count_nonzero(self._counts))  # after years some are too small for a number
        if item >= len(self._counts):
            self._counts = np.concatenate(
                [self._counts, np.zeros(max(len(self._counts), item + 1 - len(self._counts)))]
            )
        weight = float(np.exp(exponent))
        self._taken += bool(weight and not self._counts[item])
        self._counts[item] += weight
        self._changed.touch(item)
        self._total += weight

    def log_q(self, items: NDArray[np.int64], *, draws: int = 1) -> NDArray[np.float32]:
        """Log of the probability that an item is among `draws` takes, 1 - (1 - q)^draws.

        q is the item's share of the takes, smoothed by a tenth of an average item's count. Candidates are distinct:
        correction by q alone would treat an item that is in every batch as if it were there many times.
        """
        if not self._total:
            return np.zeros(len(items), np.float32)
        inside = np.minimum(items, len(self._counts) - 1)
        counts = np.where(items < len(self._counts), self._counts[inside], 0.0)
        one = 0.1 * self._total / max(self._taken, 1)
        q = np.minimum((counts + one) / (self._total + one), 1 - 1e-9)
        return np.asarray(np.log(-np.expm1(draws * np.log1p(-q))), np.float32)


class SpaceTimeSampler:
    """Plans the contrastive term of one batch.

    Candidates are drawn without replacement from the window and from the bank with the given generator: the same batch,
    memory and generator state give the same plan. Too few takes give a smaller plan, not repeated rows.

    `needs_history` leaves out the takes of users without a past, where the history is the anchor. Rows with an anchor
    of their own (a search) do without.
    """

    def __init__(self, *, space: int, time: int, masks: bool = True, needs_history: bool = True) -> None:
        self._space = space
        self._time = time
        self._masks = masks
        self._needs_history = needs_history

    def plan(
        self,
        batch: Sequence[Impression],
        memory: SpaceTimeMemory,
        counts: TakeCounts,
        catalogue: ItemNumbers,
        rng: np.random.Generator,
    ) -> ContrastivePlan | None:
        """The plan for a batch; None if no positive of it has a vector and, where it needs one, a history."""
        anchored = [
            i
            for i, row in enumerate(batch)
            if row.label and not row.upgrade and (row.history or not self._needs_history)
        ]
        rows = np.array([i for i in anchored if catalogue.has_vector(batch[i].item)], np.int64)
        if not len(rows):
            return None
        positives = np.array([batch[i].item for i in rows], np.int64)
        now = max(row.second for row in batch)
        window = memory.window_items()
        bank = memory.bank_items(now)
        drawn = np.concatenate(
            [
                positives,
                rng.choice(window, min(self._space, len(window)), replace=False),
                rng.choice(bank, min(self._time, len(bank)), replace=False),
            ]
        )
        candidates = np.unique(drawn)
        candidates = candidates[catalogue.vector_mask(candidates)]
        return ContrastivePlan(
            rows=rows,
            positives=positives,
            candidates=candidates,
            allowed=_allowed(batch, rows, candidates, catalogue)
            if self._masks
            else positives[:, None] != candidates[None, :],
            log_q=counts.log_q(candidates, draws=len(drawn)),
            positive_log_q=counts.log_q(positives, draws=len(drawn)),
        )


def _allowed(
    batch: Sequence[Impression], rows: NDArray[np.int64], candidates: NDArray[np.int64], catalogue: ItemNumbers
) -> NDArray[np.bool_]:
    taken: dict[str, set[int]] = {}
    for row in batch:
        own = taken.setdefault(row.user_id, set())
        own.update(row.history)
        if row.label:
            own.add(row.item)
    place = {int(item): column for column, item in enumerate(candidates)}
    by_content: dict[str, list[int]] = {}
    for column, item in enumerate(candidates):
        by_content.setdefault(catalogue.content(int(item)), []).append(column)
    by_query: dict[str | bytes, set[int]] = {}
    for i in rows:
        for query in (batch[i].query_text, batch[i].query_image):
            if query:
                by_query.setdefault(query, set()).add(batch[i].item)
    allowed = np.ones((len(rows), len(candidates)), bool)
    for p, i in enumerate(rows):
        row = batch[i]
        blocked = [place[item] for item in taken[row.user_id] if item in place]
        blocked.extend(by_content.get(catalogue.content(row.item), ()))
        for query in (row.query_text, row.query_image):
            if query:
                blocked.extend(place[item] for item in by_query[query] if item in place)
        allowed[p, blocked] = False
    return allowed
