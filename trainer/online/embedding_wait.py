"""How long a behaviour may wait for the embedding of its item."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


class EmbeddingWait:
    """Since when behaviours wait for the embeddings of their items.

    A wait is counted from when its first behaviour was produced, so several items wait at the same time, and a click
    log of yesterday does not wait at all for an item that is never encoded. An item that timed out is not waited for
    again before an embedding has come. Memory: `max_waits` waits, or those of one batch.
    """

    def __init__(self, *, timeout_seconds: float, max_waits: int = 100_000) -> None:
        self._timeout_seconds = timeout_seconds
        self._max_waits = max_waits
        self._since: dict[str, float] = {}
        self.timeouts = 0
        """Items that timed out so far."""

    def resolved(self, item_id: str) -> None:
        """An embedding or a tombstone has come."""
        self._since.pop(item_id, None)

    def needed(self, item_id: str, produced_at: float) -> None:
        """A behaviour on an item without embedding was read; `produced_at` in seconds since 1970."""
        if item_id in self._since:
            return
        if len(self._since) >= self._max_waits:
            del self._since[next(iter(self._since))]
        self._since[item_id] = produced_at

    def overdue(self, missing: Collection[str], now: float) -> set[str]:
        """Which of the `missing` items have been waited for long enough."""
        for item_id in missing:
            self._since.setdefault(item_id, now)  # needed by something that is not a behaviour of its own
        return {item_id for item_id in missing if now - self._since[item_id] >= self._timeout_seconds}

    def timed_out(self, item_ids: Collection[str]) -> None:
        """Stop waiting for these items."""
        for item_id in item_ids:
            self._since.pop(item_id, None)
        self.timeouts += len(item_ids)

    def snapshot(self) -> dict[str, Any]:
        """The waits and the number of timeouts."""
        return {"since": dict(self._since), "given_up": self.timeouts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to the state of `snapshot`."""
        self._since, self.timeouts = dict(state["since"]), int(state["given_up"])
