"""Ids of the events of a span of time, as 64-bit hashes in generations: about 20 bytes an id."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from trainer.state import State, whole_numbers

_GENERATIONS = 8
BYTES_PER_ID = 24
"""Of a full memory: 12 in a closed generation, about 75 in the eighth of them that is open."""


def id_hash(event_id: str) -> int:
    """64 bits of an id, the same in every process; never 0."""
    return int.from_bytes(blake2b(event_id.encode(), digest_size=8).digest(), "little") or 1


@dataclass(slots=True)
class _Closed:
    """Hashes in an open-addressing table whose places rise with the hashes; 0 is an empty place."""

    newest: int
    places: int
    table: NDArray[np.uint64]
    view: memoryview

    @classmethod
    def of(cls, hashes: NDArray[np.uint64], newest: int) -> _Closed:
        ordered = np.sort(hashes)
        places = len(ordered) * 3 // 2 + 8
        first = ((ordered >> np.uint64(32)) * np.uint64(places) >> np.uint64(32)).astype(np.int64)
        running = np.arange(len(ordered))
        at = np.maximum.accumulate(first - running) + running
        table = np.zeros(max(places, int(at[-1]) + 1 if len(at) else 0) + 1, np.uint64)
        table[at] = ordered
        return cls(newest, places, table, table.data)

    def holds(self, wanted: int) -> bool:
        view, at = self.view, (wanted >> 32) * self.places >> 32
        while (found := view[at]) and found <= wanted:
            if found == wanted:
                return True
            at += 1
        return False


class RecentIds:
    """Ids of at least the last `horizon_seconds`, by the seconds that they are added with, and at most `most` of them.

    The oldest eighth is forgotten at once when all of it is older; of two ids with the same hash (1 in 2^64 pairs) the
    second counts as known.
    """

    def __init__(self, *, horizon_seconds: float, most: int) -> None:
        self._horizon = horizon_seconds
        self._most = max(most // _GENERATIONS, 1)
        self._closed: deque[_Closed] = deque()
        self._open: set[int] = set()
        self._began = self._newest = 0
        self.dropped = 0
        """Ids that were forgotten before their time, because there were too many."""

    def __len__(self) -> int:
        return len(self._open) + sum(int(np.count_nonzero(one.table)) for one in self._closed)

    def __contains__(self, wanted: int) -> bool:
        return wanted in self._open or any(one.holds(wanted) for one in self._closed)

    def add(self, hashed: int, second: int, *, now: int) -> None:
        """Add an id of an event of this second; `now` is the newest second of the log, and never falls."""
        if self._open and (len(self._open) >= self._most or now - self._began >= self._horizon / _GENERATIONS):
            self._close()
        if not self._open:
            self._began, self._newest = now, second
        self._open.add(hashed)
        self._newest = max(self._newest, second)
        while self._closed and self._closed[0].newest < now - self._horizon:
            self._closed.popleft()

    def _close(self) -> None:
        self._closed.append(_Closed.of(np.fromiter(self._open, np.uint64, len(self._open)), self._newest))
        self._open = set()
        if len(self._closed) > _GENERATIONS and sum(len(one.table) for one in self._closed) > 12 * self._most:
            self.dropped += int(np.count_nonzero(self._closed.popleft().table))

    def snapshot(self) -> State:
        """The hashes by generation, the open one last."""
        state = State(values={"began": self._began, "dropped": self.dropped})
        state.arrays["newest"] = whole_numbers([*(one.newest for one in self._closed), self._newest])
        tables, open_ids = [one.table for one in self._closed], np.fromiter(self._open, np.uint64, len(self._open))
        state.later(lambda: _packed(tables, open_ids))
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`. Raises `ValueError` if its generations do not fit its hashes."""
        hashes, ends = state.arrays["hashes"].view(np.uint64), state.arrays["ends"].tolist()
        newest = state.arrays["newest"].tolist()
        if len(ends) != len(newest) or ends[-1] != len(hashes) or sorted(ends) != ends:
            raise ValueError(f"{len(hashes)} ids do not fit their generations")
        parts = [hashes[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        self._closed = deque(_Closed.of(part, at) for part, at in zip(parts[:-1], newest, strict=False))
        self._open, self._newest = set(parts[-1].tolist()), newest[-1]
        self._began, self.dropped = state.values["began"], state.values["dropped"]


def _packed(tables: list[NDArray[np.uint64]], open_ids: NDArray[np.uint64]) -> State:
    parts = [*(table[table > 0] for table in tables), np.sort(open_ids)]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return State({"hashes": np.concatenate(parts).view(np.int64), "ends": ends})
