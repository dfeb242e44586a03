"""Space-time negative sampling (ST-NGS) for the contrastive term: the negatives of each take of a batch.

Source: MIM (arXiv 2502.00321), section on space-time negative sampling. On one trainer, *space* is the takes of other
users in this batch and in the current window, *time* is the bank of earlier windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.negatives.memory_bank import SpaceTimeMemory
from trainer.samples.numbering import ItemNumbers
from trainer.samples.rows import Impression
from trainer.state import State, whole_numbers


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
    shrinking, so that a take costs one addition. Of more than `most_items` the half with the smallest counts is
    forgotten.
    """

    def __init__(self, half_life_seconds: float, *, most_items: int = 1 << 40) -> None:
        self._rate = np.log(2.0) / half_life_seconds
        self._counts: dict[int, float] = {}
        self._most = most_items
        self._total = 0.0
        self._origin: int | None = None

    def snapshot(self) -> State:
        """The decayed counts and their scale."""
        state, counts = State(values={"total": self._total, "origin": self._origin}), self._counts.copy()
        state.later(
            lambda: State({"items": whole_numbers(counts), "counts": np.array(list(counts.values()), np.float64)})
        )
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        counts = state.arrays["counts"]
        items = state.arrays.get("items", np.arange(len(counts)))  # an earlier build had a count for each number
        self._counts = {item: count for item, count in zip(items.tolist(), counts.tolist(), strict=True) if count}
        self._total, self._origin = state.values["total"], state.values["origin"]

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, item: int, second: int) -> None:
        """Count one take."""
        if self._origin is None:
            self._origin = second
        exponent = self._rate * (second - self._origin)
        if exponent > 50:
            scale = float(np.exp(-exponent))  # after years some counts are too small for a number
            self._counts = {one: scaled for one, count in self._counts.items() if (scaled := count * scale)}
            self._total *= scale
            self._origin, exponent = second, 0.0
        weight = float(np.exp(exponent))
        if weight:
            self._counts[item] = self._counts.get(item, 0.0) + weight
        self._total += weight
        if len(self._counts) > self._most:
            largest = sorted(self._counts.items(), key=lambda one: (-one[1], one[0]))
            self._counts = dict(largest[: (self._most + 1) // 2])

    def log_q(self, items: NDArray[np.int64], *, draws: int = 1) -> NDArray[np.float32]:
        """Log of the probability that an item is among `draws` takes, 1 - (1 - q)^draws.

        q is the item's share of the takes, smoothed by a tenth of an average item's count. Candidates are distinct:
        correction by q alone would treat an item that is in every batch as if it were there many times.
        """
        if not self._total:
            return np.zeros(len(items), np.float32)
        counts = np.array([self._counts.get(item, 0.0) for item in items.tolist()])
        one = 0.1 * self._total / max(len(self._counts), 1)
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
