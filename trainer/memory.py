"""Takes remembered for negatives: the current window (space) and a bank of earlier ones (time)."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from trainer.impressions import Take


class TakeBank:
    """A ring of takes, bounded by count and by event time.

    The ring keeps item numbers and user hashes, not projected vectors: whoever learns from it projects the stored
    vectors with today's weights, so its rows cannot go stale however old they are (the drift that cross-batch memory,
    arXiv 1912.06798, has to live with).
    """

    def __init__(self, capacity: int, *, max_age_seconds: float) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}, it must be at least 1")
        self._items = np.zeros(capacity, np.int64)
        self._seconds = np.zeros(capacity, np.int64)
        self._next = 0
        self._count = 0
        self._max_age = max_age_seconds

    def __len__(self) -> int:
        return self._count

    def add(self, take: Take) -> None:
        """Put one take in, in event-time order; the oldest makes room."""
        capacity = len(self._items)
        self._items[self._next] = take.item
        self._seconds[self._next] = take.second
        self._next = (self._next + 1) % capacity
        self._count = min(self._count + 1, capacity)

    def items(self, now: int) -> NDArray[np.int64]:
        """Item numbers of the takes that are young enough at event time `now`, oldest first."""
        capacity = len(self._items)
        order = (self._next - self._count + np.arange(self._count)) % capacity
        return self._items[order[self._seconds[order] >= now - self._max_age]]

    def purge(self, item: int) -> int:
        """Take every row of an item out (it was deleted); returns how many there were."""
        capacity = len(self._items)
        order = (self._next - self._count + np.arange(self._count)) % capacity
        kept = order[self._items[order] != item]
        removed = self._count - len(kept)
        if removed:
            items, seconds = self._items[kept], self._seconds[kept]
            self._items[: len(kept)], self._seconds[: len(kept)] = items, seconds
            self._next, self._count = len(kept) % capacity, len(kept)
        return removed


class SpaceTimeMemory:
    """Where space-time negatives come from: `window` holds what anyone took lately, `bank` what was taken before that.

    A take enters the window and moves on to the bank when it is `window_seconds` old or the window is full.
    """

    def __init__(self, *, window_seconds: float, window_takes: int, bank_takes: int, bank_seconds: float) -> None:
        self._window: deque[Take] = deque()
        self._window_seconds = window_seconds
        self._window_takes = window_takes
        self.bank = TakeBank(bank_takes, max_age_seconds=bank_seconds)

    def add(self, take: Take) -> None:
        """Put one take in, in event-time order."""
        self._window.append(take)
        oldest = take.second - self._window_seconds
        while len(self._window) > self._window_takes or self._window[0].second < oldest:
            self.bank.add(self._window.popleft())

    def window_items(self) -> NDArray[np.int64]:
        """Item numbers of the takes in the window, oldest first."""
        return np.fromiter((take.item for take in self._window), np.int64, len(self._window))

    def bank_items(self, now: int) -> NDArray[np.int64]:
        """Item numbers of the takes in the bank that are young enough at event time `now`."""
        return self.bank.items(now)

    def purge(self, item: int) -> None:
        """Forget a deleted item."""
        self._window = deque(take for take in self._window if take.item != item)
        self.bank.purge(item)
