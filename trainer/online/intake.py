"""From the click log to rows in training order, and what became of every event on the way.

```text
observe ──> window ──> join ──> rows that are ready ──> next_batch ──> learned
                          └───> takes ──────────────> takes_until
```

Rows become ready strictly in order: one that waits for a vector holds back everything behind it, so that the order of
training never depends on when vectors came.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from schemas.behaviours import Behaviour
from trainer.online.config import TrainerConfig
from trainer.samples.catalogue import Catalogue
from trainer.samples.join_rules import JoinRules
from trainer.samples.offsets import OffsetTracker
from trainer.samples.rows import Impression, Take, pack_impressions, unpack_impressions
from trainer.samples.window import Observed, ObserveResult
from trainer.state import State

_COUNTS = ("received", "trained", "late", "duplicate", "dead_lettered", "erased", "corrections_ready")


@dataclass(frozen=True)
class EventCounts:
    """Where every event went: received = trained + late + duplicate + dead_lettered + erased + pending."""

    received: int
    trained: int
    late: int
    duplicate: int
    dead_lettered: int
    erased: int
    """Events of users who were forgotten before anything was learned from them."""
    pending: int

    @property
    def balanced(self) -> bool:
        """Whether nothing is missing and nothing was counted twice."""
        settled = self.trained + self.late + self.duplicate + self.dead_lettered + self.erased
        return self.received == settled + self.pending


@dataclass(frozen=True, slots=True)
class _QueuedTake:
    """A take that training has not come to yet, with its place in the log."""

    take: Take
    partition: int
    offset: int


class EventIntake:
    """Takes events in, gives batches out, and knows for each event whether anything is still owed for it."""

    def __init__(self, config: TrainerConfig, catalogue: Catalogue, partitions: Collection[int]) -> None:
        rules = JoinRules.of(config, partitions)
        self._batch_rows = config.batch_rows
        self._catalogue = catalogue
        self._window, self._join = rules.window(), rules.join(catalogue)
        self._ready: deque[Impression] = deque()
        self._takes: deque[_QueuedTake] = deque()
        self._offsets = OffsetTracker(partitions)
        self._dropped: set[str] = set()
        self._given_up: set[str] = set()
        self._finished = False
        self._received = self._trained = self._late = self._duplicate = self._dead_lettered = self._erased = 0
        self._corrections_ready = 0

    # ---- events --------------------------------------------------------------------------------------------------

    def observe(
        self, partition: int, offset: int, behaviour: Behaviour, *, written_at: float | None = None
    ) -> ObserveResult:
        """Take in one event of the click log; `written_at`: see `EventWindow.observe`."""
        self._received += 1
        verdict = self._window.observe(partition, offset, behaviour, written_at=written_at)
        self._offsets.read(partition, offset, settled=verdict is not ObserveResult.ACCEPTED)
        self._late += verdict is ObserveResult.LATE
        self._duplicate += verdict is ObserveResult.DUPLICATE
        return verdict

    def observe_broken(self, partition: int, offset: int) -> None:
        """Count an event that could not be read."""
        self._received += 1
        self._dead_lettered += 1
        self._offsets.read(partition, offset, settled=True)

    def observe_erased(self, partition: int, offset: int) -> None:
        """Count an event of a user who wants to be forgotten."""
        self._received += 1
        self._erased += 1
        self._offsets.read(partition, offset, settled=True)

    def forget(self, user_id: str) -> int:
        """Remove a user: held events, history, waiting and ready impressions; returns how many events."""
        places = [(event.partition, event.offset) for event in self._window.forget(user_id)]
        rows = self._join.forget(user_id)
        rows += [row for row in self._ready if row.user_id == user_id and not row.correction]
        self._ready = deque(row for row in self._ready if row.user_id != user_id)
        self._corrections_ready = sum(row.correction for row in self._ready)
        places += [(row.partition, row.offset) for row in rows]
        for partition, offset in places:
            self._offsets.discard(partition, offset)
        for queued in self._takes:
            if queued.take.user_id == user_id:
                self._offsets.discard(queued.partition, queued.offset)
        self._takes = deque(queued for queued in self._takes if queued.take.user_id != user_id)
        self._erased += len(places)
        return len(places)

    def idle(self, partitions: Collection[int]) -> None:
        """These partitions have nothing more to read now; the watermark does not wait for them."""
        self._window.idle(partitions)

    def finish(self) -> None:
        """Nothing more will come: everything held is released, and the last batch may be a short one."""
        self._finished = True

    # ---- vectors that rows wait for ------------------------------------------------------------------------------

    def vector_came(self, item_id: str) -> None:
        """The catalogue holds a vector of this item now."""
        self._dropped.discard(item_id)
        self._given_up.discard(item_id)

    def deleted(self, item_id: str) -> None:
        """The item is gone: no row waits for its vector any more."""
        self._dropped.add(item_id)

    def missing(self) -> frozenset[str]:
        """Items whose vector the next batch waits for."""
        head = [self._ready[i] for i in range(min(len(self._ready), self._batch_rows))]
        items = {row.item for row in head}
        if head:
            # takes that the memory is about to hold: whether they may be negatives must not depend on when vectors came
            due = takewhile(lambda queued: queued.take.second <= head[-1].second, self._takes)
            items |= {queued.take.item for queued in due}
        return frozenset(
            item_id
            for item in items
            if not self._catalogue.has_vector(item)
            and (item_id := self._catalogue.item_id(item)) not in self._dropped
            and item_id not in self._given_up
        )

    # ---- motion --------------------------------------------------------------------------------------------------

    def advance(self, *, give_up_on: Collection[str] = ()) -> None:
        """Make ready what event time allows, up to a few batches. Rows of `give_up_on` pass without their vectors."""
        self._given_up.update(give_up_on)
        budget = 4 * self._batch_rows
        if len(self._ready) < budget:
            for events in self._window.released(everything=self._finished):
                # labels settle before the second is added, so that no take can answer an impression that is overdue
                self._settle(before=events[0].second)
                self._add_second(events)
                if len(self._ready) >= budget:
                    break
            else:
                self._settle(before=float("inf") if self._finished else self._window.complete_before)

    def _add_second(self, events: list[Observed]) -> None:
        taken = (event for event in events if event.behaviour.kind.is_take)
        for take, event in zip(self._join.add_second(events), taken, strict=True):
            self._takes.append(_QueuedTake(take, event.partition, event.offset))
            self._trained += 1
            self._offsets.settle(event.partition, event.offset)
        corrections = self._join.corrections()
        self._ready.extend(corrections)
        self._corrections_ready += len(corrections)

    def _settle(self, *, before: float) -> None:
        self._ready.extend(self._join.resolved(before))

    def next_batch(self) -> list[Impression]:
        """Hand out the next full batch; nothing while there is none, or while vectors of it are still awaited."""
        size = self._batch_rows
        drained = self._finished and not self._window.held and not self._join.waiting
        if not self._ready or (len(self._ready) < size and not drained) or self.missing():
            return []
        return [self._ready.popleft() for _ in range(min(size, len(self._ready)))]

    def takes_until(self, second: int) -> list[Take]:
        """Hand out the takes up to this second, oldest first."""
        taken = []
        while self._takes and self._takes[0].take.second <= second:
            queued = self._takes.popleft()
            self._offsets.learned(queued.partition, queued.offset)
            taken.append(queued.take)
        return taken

    def learned(self, rows: Sequence[Impression]) -> None:
        """These rows of a batch have become part of what the weights stand on."""
        corrections = sum(row.correction for row in rows)
        self._trained += len(rows) - corrections
        self._corrections_ready -= corrections
        for row in rows:
            if not row.correction:  # the take's own place is settled where the take is
                self._offsets.settle(row.partition, row.offset)
                self._offsets.learned(row.partition, row.offset)

    # ---- where it stands -----------------------------------------------------------------------------------------

    @property
    def accounts(self) -> EventCounts:
        """The balance, at any moment."""
        return EventCounts(
            received=self._received,
            trained=self._trained,
            late=self._late,
            duplicate=self._duplicate,
            dead_lettered=self._dead_lettered,
            erased=self._erased,
            pending=self.pending,
        )

    @property
    def pending(self) -> int:
        """Events held in memory: not yet released, waiting for their label, or for a full batch."""
        return self._window.held + self._join.waiting + len(self._ready) - self._corrections_ready

    def settled_below(self) -> dict[int, int]:
        """Next offset to read per partition such that everything below it is settled (trained or counted)."""
        return self._offsets.settled_below()

    def next_to_read(self) -> dict[int, int]:
        """Next offset to observe per partition; 0 for one of which nothing was observed yet."""
        return self._offsets.next_to_read()

    def learned_below(self) -> dict[int, int]:
        """Per partition, the offset after the last event learned from of which all before are settled."""
        return self._offsets.learned_below()

    @property
    def overtaken(self) -> list[tuple[int, int]]:
        """Partition and offset of events that were late only because the other partitions had gone on."""
        return list(self._window.overtaken)

    def forget_overtaken(self, below: Mapping[int, int]) -> None:
        """Let go of those that the log does not hold any more."""
        self._window.forget_overtaken(below)

    def snapshot(self) -> State:
        """Everything that was read and not learned from, and the accounts."""
        state = State(
            values={
                **{name: getattr(self, f"_{name}") for name in _COUNTS},
                "given_up": sorted(self._given_up),
                "dropped": sorted(self._dropped),
            }
        )
        state.put("window", self._window.snapshot())
        state.put("join", self._join.snapshot())
        state.put("offsets", self._offsets.snapshot())
        state.put("ready", pack_impressions(self._ready))
        places = [(q.take.second, q.take.item, q.partition, q.offset) for q in self._takes]
        state.arrays["takes"] = np.array(places, np.int64).reshape(-1, 4)
        state.put_texts("takes.user", (queued.take.user_id for queued in self._takes))
        return state

    def restore(self, state: State) -> None:
        """Stand where `snapshot` was taken, with more to come."""
        for name in _COUNTS:
            setattr(self, f"_{name}", state.values[name])
        self._given_up, self._dropped = set(state.values["given_up"]), set(state.values["dropped"])
        self._window.restore(state.part("window"))
        self._join.restore(state.part("join"))
        self._offsets.restore(state.part("offsets"))
        self._ready = deque(unpack_impressions(state.part("ready")))
        takes = zip(state.arrays["takes"].tolist(), state.texts("takes.user"), strict=True)
        self._takes = deque(_QueuedTake(Take(s, user, item), p, offset) for (s, item, p, offset), user in takes)
        self._finished = False
