"""Puts the partitions of a log side by side by event time, so that none runs far ahead of the others.

```text
partition 0   10:00:01  10:00:04  10:00:09      handed out: 0, 1, 1, 0, ... always the partition whose clock is
partition 1   10:00:02  10:00:03                furthest behind; none while one that has more to give is empty
```

Read so, a window over all partitions holds little more than its own length, and the order in which events are handed
out depends on the log alone, not on how large the broker's answers were.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from schemas.behaviours import Behaviour


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of the click log."""

    partition: int
    offset: int
    produced_at: float
    """The record's own timestamp, in seconds since 1970."""
    behaviour: Behaviour | None
    """None for a record that cannot be read."""


class AlignedReading:
    """Buffers what was fetched of each partition and hands it out aligned.

    A partition's clock is the newest event time it has handed out; a single event from the far past does not set it
    back. `room_per_partition` is how many entries of one partition are buffered before it should not be fetched.
    """

    def __init__(self, partitions: Collection[int], *, room_per_partition: int) -> None:
        self._buffers: dict[int, deque[Entry]] = {partition: deque() for partition in partitions}
        self._clocks = dict.fromkeys(partitions, float("-inf"))
        self._room = room_per_partition
        self._waiting: list[tuple[float, int]] = []
        self._hungry = set(partitions)
        self._exhausted: set[int] = set()

    def offer(self, partition: int, entries: Sequence[Entry]) -> None:
        """Append what was fetched of one partition, in the order of its offsets."""
        if not entries:
            return
        buffer = self._buffers[partition]
        buffer.extend(entries)
        if partition in self._hungry:
            self._hungry.discard(partition)
            heapq.heappush(self._waiting, (self._clock_of_head(partition), partition))

    def exhausted(self, partitions: Collection[int]) -> None:
        """Say which partitions have nothing more to fetch at this moment: the others do not wait for them."""
        self._exhausted = set(partitions)

    def with_room(self) -> list[int]:
        """Partitions that should be fetched."""
        return [partition for partition, buffer in self._buffers.items() if len(buffer) < self._room]

    def empty_and_exhausted(self) -> list[int]:
        """Partitions of which everything was handed out."""
        return sorted(self._hungry & self._exhausted)

    def take(self, most: int) -> list[Entry]:
        """Hand out up to `most` entries; fewer where a partition that has more to give must be fetched first."""
        taken: list[Entry] = []
        while len(taken) < most and self._waiting and self._hungry <= self._exhausted:
            clock, partition = heapq.heappop(self._waiting)
            buffer = self._buffers[partition]
            taken.append(buffer.popleft())
            self._clocks[partition] = clock
            if buffer:
                heapq.heappush(self._waiting, (self._clock_of_head(partition), partition))
            else:
                self._hungry.add(partition)
        return taken

    def _clock_of_head(self, partition: int) -> float:
        behaviour = self._buffers[partition][0].behaviour
        clock = self._clocks[partition]
        return clock if behaviour is None else max(clock, behaviour.occurred_at.timestamp())
