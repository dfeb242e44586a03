"""How long a behaviour may wait for the vector of its item."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any


class EmbeddingWait:
    """Knows which items have a vector and since when behaviours wait for the others.

    The wait counts from when the first such behaviour was produced, so several items wait at the same time, and a click
    log of yesterday does not wait at all for an item that nobody will ever encode. Given up once, an item is not waited
    for again until a vector has come. Memory: one id per item, and at most `most_waits` waits.
    """

    def __init__(self, *, hold_seconds: float, most_waits: int = 100_000) -> None:
        self._hold_seconds = hold_seconds
        self._most_waits = most_waits
        self._known: set[str] = set()
        self._since: dict[str, float] = {}
        self.given_up = 0

    def answered(self, item_id: str, *, has_vector: bool) -> None:
        """A vector or a tombstone has come."""
        self._since.pop(item_id, None)
        if has_vector:
            self._known.add(item_id)
        else:
            self._known.discard(item_id)

    def needed(self, item_id: str, produced_at: float) -> None:
        """A behaviour on this item was read; `produced_at` in seconds since 1970."""
        if item_id in self._known or item_id in self._since:
            return
        if len(self._since) >= self._most_waits:
            del self._since[next(iter(self._since))]
        self._since[item_id] = produced_at

    def overdue(self, missing: Collection[str], now: float) -> set[str]:
        """Which of the items that are waited for have been waited for long enough."""
        for item_id in missing:
            self._since.setdefault(item_id, now)  # needed by something that is not a behaviour of its own
        return {item_id for item_id in missing if now - self._since[item_id] >= self._hold_seconds}

    def snapshot(self) -> dict[str, Any]:
        """What is waited for since when, and how much was given up; which items have a vector is the trainer's."""
        return {"since": dict(self._since), "given_up": self.given_up}

    def restore(self, state: Mapping[str, Any], known: Iterable[str]) -> None:
        """Stand where `snapshot` was taken; `known` are the items that have a vector."""
        self._since, self.given_up = dict(state["since"]), int(state["given_up"])
        self._known = set(known)

    def give_up(self, item_ids: Collection[str]) -> None:
        """These are not waited for any longer."""
        for item_id in item_ids:
            self._since.pop(item_id, None)
        self.given_up += len(item_ids)
