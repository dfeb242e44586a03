"""Merges the partitions of a log by event time, so that none runs far ahead of the others.

```text
partition 0   10:00:01  10:00:04  10:00:09      order: 0, 1, 1, 0, ... always the partition whose clock is furthest
partition 1   10:00:02  10:00:03                behind; none while a partition with more records to fetch is empty
```

A window over all partitions then buffers little more than its own length, and the order of the events depends on the
log alone, not on the size of the broker's responses.

A partition that is read to its end is passed over only after some silence, since its part of a burst may still be
under way: an event is returned once each such partition was found empty some time after the event was produced.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from schemas.behaviours import Behaviour


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of the click log."""

    partition: int
    offset: int
    produced_at: float
    """Time of production as far as known, in seconds since 1970; never later than the time of the fetch."""
    behaviour: Behaviour | None
    """None for a record that cannot be read."""
    written_at: float | None = None
    """Time of production as stated by the log; None trusts the event's own time."""


class PartitionMerge:
    """Buffers the fetched records of each partition and returns them in merged order.

    A partition's clock is the newest event time it has returned, none later than its time of writing to the log; a
    single event from the far past does not set it back. A partition with `room_per_partition` buffered entries should
    not be fetched. `silence_seconds` is how long after an event's production the partitions without events must have
    been silent.
    """

    def __init__(self, partitions: Collection[int], *, room_per_partition: int, silence_seconds: float = 0.0) -> None:
        self._buffers: dict[int, deque[Entry]] = {partition: deque() for partition in partitions}
        self._clocks = dict.fromkeys(partitions, float("-inf"))
        self._room = room_per_partition
        self._heads: list[tuple[float, int]] = []
        self._empty = set(partitions)
        self._exhausted: Mapping[int, float] = {}
        self._silence = silence_seconds

    def add(self, partition: int, entries: Sequence[Entry]) -> None:
        """Append the fetched entries of one partition, in the order of their offsets."""
        if not entries:
            return
        buffer = self._buffers[partition]
        buffer.extend(entries)
        if partition in self._empty:
            self._empty.discard(partition)
            heapq.heappush(self._heads, (self._clock_of_head(partition), partition))

    def set_exhausted(self, partitions: Mapping[int, float]) -> None:
        """Set the partitions with nothing more to fetch, and until when that is known (seconds since 1970)."""
        self._exhausted = dict(partitions)

    def with_room(self) -> list[int]:
        """Partitions that should be fetched."""
        return [partition for partition, buffer in self._buffers.items() if len(buffer) < self._room]

    def empty_and_exhausted(self) -> list[int]:
        """Partitions of which everything was returned."""
        return sorted(self._empty & self._exhausted.keys())

    def pop(self, most: int, *, only: Collection[int] | None = None) -> list[Entry]:
        """Remove and return up to `most` entries; fewer where a partition with more records must be fetched first.

        `only` leaves the entries of all other partitions where they are.
        """
        popped: list[Entry] = []
        passed_over: list[tuple[float, int]] = []
        complete_until = self._complete_until()
        while len(popped) < most and self._heads:
            clock, partition = self._heads[0]
            buffer = self._buffers[partition]
            if only is not None and partition not in only:
                passed_over.append(heapq.heappop(self._heads))
                continue
            if buffer[0].produced_at > complete_until:
                break
            heapq.heappop(self._heads)
            popped.append(buffer.popleft())
            self._clocks[partition] = clock
            if buffer:
                heapq.heappush(self._heads, (self._clock_of_head(partition), partition))
            else:
                self._empty.add(partition)
                complete_until = self._complete_until()
        for head in passed_over:
            heapq.heappush(self._heads, head)
        return popped

    def _complete_until(self) -> float:
        """Entries produced until this time can be returned: no partition without events has any of that time."""
        silent_until = (self._exhausted.get(partition, float("-inf")) for partition in self._empty)
        return min(silent_until, default=float("inf")) - self._silence

    def _clock_of_head(self, partition: int) -> float:
        entry = self._buffers[partition][0]
        clock = self._clocks[partition]
        if entry.behaviour is None:
            return clock
        at = entry.behaviour.occurred_at.timestamp()
        return max(clock, at if entry.written_at is None else min(at, entry.written_at))
