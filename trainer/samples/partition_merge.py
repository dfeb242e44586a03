"""Puts the partitions of a log side by side by event time, so that none runs far ahead of the others.

```text
partition 0   10:00:01  10:00:04  10:00:09      handed out: 0, 1, 1, 0, ... always the partition whose clock is
partition 1   10:00:02  10:00:03                furthest behind; none while one that has more to give is empty
```

Read so, a window over all partitions holds little more than its own length, and the order in which events are handed
out depends on the log alone, not on how large the broker's answers were.

A partition that is read to its end is passed by only when it is really silent, and not when its share of a burst is
still under way: an event is handed out once each such partition was found empty some time after the event was made.
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
    """When it was produced, as far as known, in seconds since 1970; never later than when it was fetched."""
    behaviour: Behaviour | None
    """None for a record that cannot be read."""
    written_at: float | None = None
    """When it was produced, as the log says; None trusts the event's own time."""


class AlignedReading:
    """Buffers what was fetched of each partition and hands it out aligned.

    A partition's clock is the newest event time it has handed out, none later than it was written to the log; a single
    event from the far past does not set it back. `room_per_partition` is how many entries of one partition are buffered
    before it should not be fetched; `silence_seconds` is how long after an event's production the partitions without
    events must have been silent.
    """

    def __init__(self, partitions: Collection[int], *, room_per_partition: int, silence_seconds: float = 0.0) -> None:
        self._buffers: dict[int, deque[Entry]] = {partition: deque() for partition in partitions}
        self._clocks = dict.fromkeys(partitions, float("-inf"))
        self._room = room_per_partition
        self._waiting: list[tuple[float, int]] = []
        self._hungry = set(partitions)
        self._exhausted: Mapping[int, float] = {}
        self._silence = silence_seconds

    def offer(self, partition: int, entries: Sequence[Entry]) -> None:
        """Append what was fetched of one partition, in the order of its offsets."""
        if not entries:
            return
        buffer = self._buffers[partition]
        buffer.extend(entries)
        if partition in self._hungry:
            self._hungry.discard(partition)
            heapq.heappush(self._waiting, (self._clock_of_head(partition), partition))

    def exhausted(self, partitions: Mapping[int, float]) -> None:
        """Say which partitions have nothing more to fetch, and until when that is known (seconds since 1970)."""
        self._exhausted = dict(partitions)

    def with_room(self) -> list[int]:
        """Partitions that should be fetched."""
        return [partition for partition, buffer in self._buffers.items() if len(buffer) < self._room]

    def empty_and_exhausted(self) -> list[int]:
        """Partitions of which everything was handed out."""
        return sorted(self._hungry & self._exhausted.keys())

    def take(self, most: int) -> list[Entry]:
        """Hand out up to `most` entries; fewer where a partition that has more to give must be fetched first."""
        taken: list[Entry] = []
        settled_until = self._settled_until()
        while len(taken) < most and self._waiting:
            clock, partition = self._waiting[0]
            buffer = self._buffers[partition]
            if buffer[0].produced_at > settled_until:
                break
            heapq.heappop(self._waiting)
            taken.append(buffer.popleft())
            self._clocks[partition] = clock
            if buffer:
                heapq.heappush(self._waiting, (self._clock_of_head(partition), partition))
            else:
                self._hungry.add(partition)
                settled_until = self._settled_until()
        return taken

    def _settled_until(self) -> float:
        """What was produced until this moment can be handed out: the partitions without events have none of then."""
        silent_until = (self._exhausted.get(partition, float("-inf")) for partition in self._hungry)
        return min(silent_until, default=float("inf")) - self._silence

    def _clock_of_head(self, partition: int) -> float:
        entry = self._buffers[partition][0]
        clock = self._clocks[partition]
        if entry.behaviour is None:
            return clock
        at = entry.behaviour.occurred_at.timestamp()
        return max(clock, at if entry.written_at is None else min(at, entry.written_at))
