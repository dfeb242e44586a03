"""From the click log to rows in training order, and what became of every event on the way.

```text
observe ──> window ──> join ──> rows that are ready ──> next_batch ──> trained
                          └───> takes ──────────────> takes_until
```

Rows become ready strictly in order: one that waits for an embedding holds back everything behind it, so that the order
of training never depends on when embeddings came.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from operator import attrgetter

import numpy as np

from schemas.behaviours import Behaviour
from trainer.online.config import TrainerConfig
from trainer.online.remembered_items import RememberedItems
from trainer.samples.catalogue import Catalogue
from trainer.samples.join_rules import JoinRules
from trainer.samples.late_events import LateEvent, LateEvents
from trainer.samples.offsets import OffsetTracker
from trainer.samples.rows import Impression, Take, pack_impressions, row_bytes, unpack_impressions
from trainer.samples.searches import SearchUse
from trainer.samples.window import Observed, ObserveResult
from trainer.state import State

_NEVER = -(1 << 62)
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


@dataclass(frozen=True, slots=True)
class _QueuedTake:
    """A take that training has not come to yet, with its place in the log."""

    take: Take
    partition: int
    offset: int


_TAKE_COLUMNS = (
    *("take.second", "take.item", "partition", "offset", "take.event", "take.announces", "take.query", "take.trigger"),
)


class EventIntake:
    """Events in, batches out, and for each event whether it is still pending.

    `window` orders the events by event time; `offsets` says per partition how far reading and training have got.
    """

    def __init__(self, config: TrainerConfig, catalogue: Catalogue, partitions: Collection[int]) -> None:
        rules = JoinRules.of(config, partitions)
        self._batch_rows = config.batch_rows
        self._memory_takes = config.window_takes + config.bank_takes
        self._catalogue = catalogue
        searches = SearchUse.NUMBERED if config.features.queries else SearchUse.NOTHING
        self.window, self._join = rules.window(), rules.join(catalogue, searches=searches)
        self.offsets = OffsetTracker(partitions)
        self.kinds: Counter[str] = Counter()
        """Accepted events by kind."""
        self.searched = 0
        """Accepted events that say what was searched."""
        self.late = LateEvents()
        """Events that came too late."""
        self._ready: deque[Impression] = deque()
        self._takes: deque[_QueuedTake] = deque()
        self._deleted = RememberedItems(config.remembered_items)
        self._timed_out = RememberedItems(config.remembered_items)
        self._finished = False
        self._held_back = 0
        self._batches = 0
        self._surplus: dict[int, dict[int, int]] = {}  # by batch, then by its rows ready: takes up to which second
        self._counts = dict.fromkeys(_COUNTS, 0)

    # ---- events --------------------------------------------------------------------------------------------------

    def observe(
        self, partition: int, offset: int, behaviour: Behaviour, *, written_at: float | None = None
    ) -> ObserveResult:
        """Add one event of the click log; `written_at` is as in `EventWindow.observe`."""
        self._counts["received"] += 1
        result = self.window.observe(partition, offset, behaviour, written_at=written_at)
        self.offsets.read(partition, offset, done=result is not ObserveResult.ACCEPTED)
        self._counts["late"] += result is ObserveResult.LATE
        if result is ObserveResult.ACCEPTED:
            self.kinds[behaviour.kind] += 1
            self.searched += behaviour.query_text is not None or behaviour.query_image is not None
        elif result is ObserveResult.LATE:
            at, newest = behaviour.occurred_at.timestamp(), self.window.newest(partition)
            behind = 0.0 if newest is None else newest - at
            self.late.add(LateEvent(partition, offset, behaviour.event_id, at, behind))
        self._counts["duplicate"] += result is ObserveResult.DUPLICATE
        return result

    def observe_broken(self, partition: int, offset: int) -> None:
        """Count an event that could not be read; the recorder writes its dead letter."""
        self._count_only("dead_lettered", partition, offset)

    def observe_erased(self, partition: int, offset: int) -> None:
        """Count an event of a user who asked to be forgotten, and use nothing else of it."""
        self._count_only("erased", partition, offset)

    def _count_only(self, name: str, partition: int, offset: int) -> None:
        self._counts["received"] += 1
        self._counts[name] += 1
        self.offsets.read(partition, offset, done=True)

    def forget(self, user_id: str) -> int:
        """Remove a user: held events, history, waiting and ready impressions; returns how many events."""
        places = [(event.partition, event.offset) for event in self.window.forget(user_id)]
        rows = self._join.forget(user_id)
        rows += [row for row in self._ready if row.user_id == user_id and row.own_event]
        self._ready = deque(row for row in self._ready if row.user_id != user_id)
        self._counts["corrections_ready"] = sum(not row.own_event for row in self._ready)
        places += [(row.partition, row.offset) for row in rows]
        for partition, offset in places:
            self.offsets.discard(partition, offset)
        for queued in self._takes:
            if queued.take.user_id == user_id:
                self.offsets.discard(queued.partition, queued.offset)
        self._takes = deque(queued for queued in self._takes if queued.take.user_id != user_id)
        self._counts["erased"] += len(places)
        return len(places)

    def finish(self) -> None:
        """Nothing more will come: `advance` releases everything, and the last batch may be a short one."""
        self._finished = True

    def hold_back(self, rows: int) -> None:
        """Keep the last `rows` rows of the log, or up to a batch more, from `next_batch` until called with 0.

        Which rows form a batch stays the same.
        """
        self._held_back = rows

    @property
    def at_last_rows(self) -> bool:
        """Whether nothing but rows that are held back is left to learn from."""
        return bool(self._held_back and self._ready) and self._drained and len(self._ready) < self._enough

    @property
    def last_rows(self) -> int:
        """Rows that are ready."""
        return len(self._ready)

    @property
    def _drained(self) -> bool:
        return self._finished and not self.window.buffered and not self._join.waiting

    @property
    def _enough(self) -> int:
        """Ready rows from which on a batch may be taken before the end."""
        return self._batch_rows + self._held_back

    # ---- embeddings that rows wait for ---------------------------------------------------------------------------

    def embedding_came(self, item_id: str) -> None:
        """The catalogue has an embedding of this item now."""
        self._deleted.discard(item_id)
        self._timed_out.discard(item_id)

    def item_deleted(self, item_id: str) -> None:
        """No row waits for an embedding of this item any more."""
        self._deleted.add(item_id)

    def missing(self) -> frozenset[str]:
        """Items whose embedding the next batch waits for."""
        head = [self._ready[i] for i in range(min(len(self._ready), self._batch_rows))]
        items = {number for row in head for number in (row.item, row.query) if number}
        # takes that the memory is about to hold: whether they may be negatives must not depend on when vectors came
        surplus = self._surplus.get(self._batches, {})
        until = max([_NEVER, *surplus.values(), *(row.second for row in head)])
        due = takewhile(lambda queued: queued.take.second <= until, self._takes)
        items |= {queued.take.item for queued in due}
        return frozenset(
            item_id
            for item in items
            if not self._catalogue.has_vector(item)
            and (item_id := self._catalogue.item_id(item)) not in self._deleted
            and item_id not in self._timed_out
        )

    # ---- motion --------------------------------------------------------------------------------------------------

    def advance(self, *, timed_out: Collection[str] = ()) -> frozenset[str]:
        """Make ready what event time allows, up to a few batches; returns `missing()`.

        Rows of the items `timed_out` pass without an embedding.
        """
        for item_id in timed_out:
            self._timed_out.add(item_id)
        budget = 4 * self._batch_rows + self._held_back
        if len(self._ready) < budget:
            for events in self.window.released(everything=self._finished):
                # labels settle before the second is added, so that no take can answer an impression that is overdue
                self._settle(before=events[0].second)
                self._add_second(events)
                if len(self._ready) >= budget:
                    break
            else:
                self._settle(before=float("inf") if self._finished else self.window.complete_before)
        return self.missing()

    def items_in_use(self) -> Iterator[int]:
        """Numbers of the items that anything on its way to training names."""
        yield from self._join.items_in_use()
        for row in self._ready:
            yield from filter(None, (row.item, row.query, *row.history))
        for queued in self._takes:
            yield from queued.take.numbers

    def _add_second(self, events: list[Observed]) -> None:
        taken = (event for event in events if event.behaviour.kind.is_take)
        for take, event in zip(self._join.add_second(events, self.window.ahead), taken, strict=True):
            self._takes.append(_QueuedTake(take, event.partition, event.offset))
            self._counts["trained"] += 1
            self.offsets.commit(event.partition, event.offset)
        corrections = self._join.corrections()
        self._ready.extend(corrections)
        self._counts["corrections_ready"] += len(corrections)
        surplus = len(self._takes) - self._memory_takes
        if surplus > 0 and not self._join.unresolved:  # said here, of the next batch to fill: a matter of the log alone
            batches, rows = divmod(len(self._ready), self._batch_rows)
            of_batch = self._surplus.setdefault(self._batches + batches, {})
            of_batch[rows] = self._takes[surplus - 1].take.second
        if self._catalogue.crowded:  # here, where what is in use does not depend on how far training has got
            self._catalogue.retire(self._join.items_in_use())

    def _settle(self, *, before: float) -> None:
        for row in self._join.resolved(before):
            self._ready.append(row)
            self._counts["corrections_ready"] += not row.own_event

    @property
    def takes_too_late(self) -> int:
        """Takes that name an exposure which is too old for them, or not known (any more): learned as history alone."""
        return self._join.too_late

    def next_batch(self) -> list[Impression]:
        """The next full batch; empty while there is none, or while it waits for embeddings."""
        size = self._batch_rows
        may_be_short = self._drained and not self._held_back
        if not self._ready or (len(self._ready) < self._enough and not may_be_short) or self.missing():
            return []
        self._surplus.pop(self._batches, None)
        self._batches += 1
        return [self._ready.popleft() for _ in range(min(size, len(self._ready)))]

    def surplus_takes(self) -> Iterator[tuple[list[Take], list[Impression]]]:
        """The oldest of a queue that no row follows: a log of takes without exposures must not fill the memory.

        They come with the rows of the next batch that are older. Ask before each `next_batch`: they are in the memory
        of that batch, however much was read before it.
        """
        if self._batches in self._surplus and not self.missing():
            for rows, until in self._surplus.pop(self._batches).items():
                yield self.takes_until(until), list(islice(self._ready, rows))

    def takes_until(self, second: int) -> list[Take]:
        """The queued takes up to this second, oldest first; they leave the queue."""
        takes = []
        while self._takes and self._takes[0].take.second <= second:
            queued = self._takes.popleft()
            self.offsets.trained(queued.partition, queued.offset)
            takes.append(queued.take)
        return takes

    def note_features(self, rows: Sequence[Impression]) -> None:
        """These rows have their features now."""
        self._join.note_features(rows)

    def trained(self, rows: Sequence[Impression]) -> None:
        """The weights include these rows now."""
        others = sum(not row.own_event for row in rows)
        self._counts["trained"] += len(rows) - others
        self._counts["corrections_ready"] -= others
        for row in rows:
            if row.own_event:  # the take's own place is settled where the take is
                self.offsets.commit(row.partition, row.offset)
                self.offsets.trained(row.partition, row.offset)

    # ---- where it stands -----------------------------------------------------------------------------------------

    @property
    def counts(self) -> EventCounts:
        """The balance, at any moment."""
        events = {name: count for name, count in self._counts.items() if name != "corrections_ready"}
        return EventCounts(**events, pending=self.pending)

    @property
    def pending(self) -> int:
        """Events held in memory: not yet released, waiting for their label, or for a full batch."""
        return self.window.buffered + self._join.waiting + len(self._ready) - self._counts["corrections_ready"]

    @property
    def pending_bytes(self) -> int:
        """About how much memory `pending` takes; of the rows that are ready the first stands for all."""
        ready = row_bytes(self._ready[0]) * len(self._ready) if self._ready else 0
        return self.window.buffered_bytes + self._join.waiting_bytes + ready

    def snapshot(self) -> State:
        """Everything that was read and not trained on, and the counts."""
        state = State(
            values={
                **self._counts,
                "given_up": list(self._timed_out),
                "dropped": list(self._deleted),
                "surplus": {
                    str(batch - self._batches): list(of_batch.items()) for batch, of_batch in self._surplus.items()
                },
                "kinds": dict(self.kinds),
                "searched": self.searched,
                "late_in": {str(partition): count for partition, count in self.late.by_partition.items()},
            }
        )
        takes = list(self._takes)
        columns = attrgetter(*_TAKE_COLUMNS)
        state.arrays["takes"] = np.array([columns(queued) for queued in takes], np.int64).reshape(
            -1, len(_TAKE_COLUMNS)
        )
        state.put_texts("takes.user", (queued.take.user_id for queued in takes))
        state.put("window", self.window.snapshot())
        state.put("join", self._join.snapshot())
        state.put("offsets", self.offsets.snapshot())
        state.put("ready", pack_impressions(self._ready))
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`; a `finish` before it does not count."""
        self._counts = {name: state.values[name] for name in _COUNTS}
        for items, name in ((self._timed_out, "given_up"), (self._deleted, "dropped")):
            items.restore(state.values[name])
        surplus = state.values["surplus"].items()
        self._batches, self._surplus = 0, {int(batch): dict(events) for batch, events in surplus}
        self.kinds = Counter(state.values.get("kinds", {}))
        self.searched = state.values.get("searched", 0)
        self.late.by_partition = Counter({int(p): count for p, count in state.values.get("late_in", {}).items()})
        self.window.restore(state.part("window"))
        self._join.restore(state.part("join"))
        self.offsets.restore(state.part("offsets"))
        self._ready = deque(unpack_impressions(state.part("ready")))
        self._join.share_moments(self._ready)
        places = state.arrays["takes"]
        # an earlier build knew no searches, or no triggers
        places = np.pad(places, ((0, 0), (0, len(_TAKE_COLUMNS) - places.shape[1])))
        self._takes = deque(
            _QueuedTake(Take(second, user, item, event, bool(announces), *led_to), partition, offset)
            for (second, item, partition, offset, event, announces, *led_to), user in zip(
                places.tolist(), state.texts("takes.user"), strict=True
            )
        )
        self._finished = False
