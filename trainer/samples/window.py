"""Event-time window: orders behaviours of several partitions, rejects late and duplicate ones.

```text
partition 0   10:00:01  10:00:04  10:00:09 ...        newest 10:00:09
partition 1   10:00:02  10:00:03 ...                  newest 10:00:03
watermark     = min over partitions that are not idle - lateness
released      = whole seconds before the watermark, each second at once
```

Which events are late or duplicate is decided per partition, from that partition's own past alone. Kafka fixes the order
inside a partition, so the results do not depend on how fetches of several partitions interleave.

A device whose clock is fast makes no other event late: its event keeps its own time, but moves the watermark no further
than the time at which the log wrote it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from schemas.behaviours import Behaviour
from trainer.samples.recent_ids import RecentIds, id_hash
from trainer.state import State


class ObserveResult(Enum):
    """Whether an observed event was accepted, and if not, why."""

    ACCEPTED = auto()
    LATE = auto()
    DUPLICATE = auto()


@dataclass(frozen=True, slots=True)
class Observed:
    """A behaviour with the place it was read from."""

    partition: int
    offset: int
    second: int
    behaviour: Behaviour

    @property
    def order(self) -> tuple[bool, str, int, int]:
        """Order inside one second: exposures first, then by id and place in the log, never by arrival."""
        return (self.behaviour.kind.is_take, self.behaviour.event_id, self.partition, self.offset)


@dataclass(slots=True)
class _Partition:
    seen: RecentIds
    """Ids of everything inside the horizon."""
    newest: int | None = None
    idle: bool = False


class EventWindow:
    """Orders behaviours by event time and releases each second once, when nothing on time can still join it.

    `lateness_seconds` is how far behind its partition's newest event an event may lie and still be accepted;
    `horizon_seconds` is how long an `event_id` is remembered (an older duplicate is rejected as late), and
    `most_ids` how many are.
    Memory grows with the events inside these two spans only.

    A second is released only when everything up to `hold_seconds` behind it is known too; `ahead` shows that part.

    One result alone depends on the order of reading: an event is late if the other partitions passed it while its own
    was idle. These events are listed in `dropped_by_idle`; a window that is given the list rejects them again, so that
    a second reading of the log gives the same rows.
    """

    def __init__(
        self,
        partitions: Collection[int],
        *,
        lateness_seconds: float,
        horizon_seconds: float,
        hold_seconds: int = 0,
        most_ids: int = 1 << 40,
        dropped_by_idle: Collection[tuple[int, int]] = (),
    ) -> None:
        self._lateness = lateness_seconds
        self._horizon = max(horizon_seconds, lateness_seconds)
        self._most_ids = most_ids // max(len(partitions), 1)
        self._partitions = {partition: _Partition(self._no_ids()) for partition in partitions}
        self._hold = hold_seconds
        self._by_second: dict[int, list[Observed]] = {}
        self._seconds: list[int] = []
        self._released_before: int | None = None
        self.buffered = 0
        """Events that were accepted and not yet released."""
        self.buffered_bytes = 0
        """About how much memory they take."""
        self.dropped_by_idle = dict.fromkeys(dropped_by_idle)
        """(partition, offset) of events that were late because their partition was idle, in the order of reading."""

    def observe(
        self, partition: int, offset: int, behaviour: Behaviour, *, written_at: float | None = None
    ) -> ObserveResult:
        """Add one event; only an accepted one is released later.

        `written_at` is the time of writing as stated by the log, in seconds since 1970; None trusts the event's own
        time.
        """
        state = self._partitions[partition]
        state.idle = False
        second = math.floor(behaviour.occurred_at.timestamp())
        hashed = id_hash(behaviour.event_id)
        if hashed in state.seen and state.newest is not None and second >= state.newest - self._horizon:
            return ObserveResult.DUPLICATE
        if state.newest is not None and second < state.newest - self._lateness:
            return ObserveResult.LATE
        if (partition, offset) in self.dropped_by_idle:
            return ObserveResult.LATE
        if self._released_before is not None and second < self._released_before:
            self.dropped_by_idle[partition, offset] = None
            return ObserveResult.LATE
        at_most = second if written_at is None else min(second, math.floor(written_at))
        state.newest = at_most if state.newest is None else max(state.newest, at_most)
        state.seen.add(hashed, second, now=state.newest)
        if second not in self._by_second:
            self._by_second[second] = []
            heapq.heappush(self._seconds, second)
        self._by_second[second].append(Observed(partition, offset, second, behaviour))
        self.buffered += 1
        self.buffered_bytes += _bytes(behaviour)
        return ObserveResult.ACCEPTED

    def newest(self, partition: int) -> int | None:
        """Second of the newest event of a partition; None before the first."""
        return self._partitions[partition].newest

    @property
    def ids_dropped(self) -> int:
        """Event ids that were forgotten before their time, because there were more than `most_ids`."""
        return sum(state.seen.dropped for state in self._partitions.values())

    def _no_ids(self) -> RecentIds:
        return RecentIds(horizon_seconds=self._horizon, most=self._most_ids)

    def idle(self, partitions: Collection[int]) -> None:
        """Mark partitions with nothing more to read; the watermark ignores them until their next event."""
        for partition in partitions:
            self._partitions[partition].idle = True

    @property
    def slowest(self) -> set[int]:
        """The partitions that the watermark waits for; none while all are idle."""
        waiting = {number: state.newest for number, state in self._partitions.items() if not state.idle}
        unread = {number for number, newest in waiting.items() if newest is None}
        least = min((newest for newest in waiting.values() if newest is not None), default=None)
        return unread or {number for number, newest in waiting.items() if newest == least}

    @property
    def watermark(self) -> float:
        """No event on time can still come before this time (seconds since 1970); -inf while a partition is unread."""
        waiting = [state.newest for state in self._partitions.values() if not state.idle]
        if any(newest is None for newest in waiting):
            return -math.inf
        known = [newest for newest in waiting if newest is not None]
        if known:
            return min(known) - self._lateness
        newest_of_all = [state.newest for state in self._partitions.values() if state.newest is not None]
        # all idle: everything read is complete but for the newest second, which may get further events
        return max(newest_of_all) if newest_of_all else -math.inf

    @property
    def complete_before(self) -> float:
        """No event released from now on lies before this time, whichever idle partition resumes."""
        if not any(state.idle for state in self._partitions.values()):
            return self.watermark - self._hold
        released_before = -math.inf if self._released_before is None else self._released_before
        return min(self.watermark, released_before) - self._hold

    def released(self, *, everything: bool = False) -> Iterator[list[Observed]]:
        """Yield the complete seconds, oldest first, each with its events in a fixed order.

        Stops where the caller stops iterating; the rest stays for the next call.
        """
        while self._seconds and (everything or self._seconds[0] + self._hold < self.watermark):
            second = heapq.heappop(self._seconds)
            events = self._by_second.pop(second)
            self._released_before = second + 1 + self._hold  # what a second was released with does not change any more
            self.buffered -= len(events)
            self.buffered_bytes -= sum(_bytes(event.behaviour) for event in events)
            yield sorted(events, key=lambda event: event.order)

    def ahead(self, first: int, last: int) -> Iterator[list[Observed]]:
        """The seconds from `first` to `last` that wait for their release, each with its events in their fixed order."""
        for second in sorted(second for second in self._by_second if first <= second <= last):
            yield sorted(self._by_second[second], key=lambda event: event.order)

    def buffered_events(self) -> Iterator[Observed]:
        """The events that were accepted and not yet released, in no particular order."""
        for events in self._by_second.values():
            yield from events

    def forget(self, user_id: str) -> list[Observed]:
        """Remove and return the buffered events of a user."""
        found = [event for event in self.buffered_events() if event.behaviour.user_id == user_id]
        for second in {event.second for event in found}:
            others = [event for event in self._by_second.pop(second) if event.behaviour.user_id != user_id]
            if others:  # a second without events would count as released, but not after a restart
                self._by_second[second] = others
        self._seconds = sorted(self._by_second)
        self.buffered -= len(found)
        self.buffered_bytes -= sum(_bytes(event.behaviour) for event in found)
        return found

    def forget_dropped_by_idle(self, below: Mapping[int, int]) -> None:
        """Remove from `dropped_by_idle` the events that the log has deleted, which bounds their number."""
        self.dropped_by_idle = {(p, o): None for p, o in self.dropped_by_idle if o >= below.get(p, 0)}

    def snapshot(self) -> State:
        """Everything but which partitions are idle: that has to be set again after `restore`."""
        state = State(values={"released_before": self._released_before, "newest": {}})
        state.arrays["overtaken"] = np.array(list(self.dropped_by_idle), np.int64).reshape(-1, 2)
        for number, partition in self._partitions.items():
            state.values["newest"][str(number)] = partition.newest
            state.put(f"ids{number}", partition.seen.snapshot())
        buffered = list(self.buffered_events())
        state.later(lambda: _packed(buffered))
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`. Raises `ValueError` if the partitions differ."""
        newest = state.values["newest"]
        if set(newest) != {str(number) for number in self._partitions}:
            raise ValueError(f"the window had partitions {sorted(newest)}, not {sorted(self._partitions)}")
        for number in self._partitions:
            partition = self._partitions[number] = _Partition(self._no_ids(), newest=newest[str(number)])
            if f"ids{number}" in state.values:
                partition.seen.restore(state.part(f"ids{number}"))
                continue
            order = zip(state.arrays[f"seen{number}.seconds"].tolist(), state.texts(f"seen{number}"), strict=True)
            for second, event_id in order:  # an earlier build kept the ids themselves
                partition.seen.add(id_hash(event_id), second, now=second)
        self._released_before = state.values["released_before"]
        self.dropped_by_idle = {(int(p), int(o)): None for p, o in state.arrays["overtaken"].tolist()}
        self._by_second, self.buffered, self.buffered_bytes = {}, 0, 0
        places = state.arrays["held.places"].reshape(-1, 3).tolist()
        for (partition_, offset, second), text in zip(places, state.texts("held"), strict=True):
            event = Observed(partition_, offset, second, Behaviour.model_validate_json(text))
            self._by_second.setdefault(second, []).append(event)
            self.buffered += 1
            self.buffered_bytes += _bytes(event.behaviour)
        self._seconds = sorted(self._by_second)


def _packed(events: list[Observed]) -> State:
    state = State()
    places = [(event.partition, event.offset, event.second) for event in events]
    state.arrays["held.places"] = np.array(places, np.int64).reshape(-1, 3)
    state.put_texts("held", (event.behaviour.model_dump_json() for event in events))
    return state


def _bytes(behaviour: Behaviour) -> int:
    return 1700 + len(behaviour.query_image or b"")
