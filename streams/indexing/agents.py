"""The two Faust agents of the item path: loops around `index_batch` and `image_retries`, with state of one stream each.

Both read events without acknowledging (`noack_take`): Faust's other ways acknowledge an event also when the body
raised, or was stopped, before the event was written.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import structlog
from faust.types import EventT, StreamT

from schemas.errors import Fenced, Unavailable
from streams.broker.partitioning import FIX, home_partition
from streams.broker.records import SourceRecord
from streams.indexing.config import PartitioningReport
from streams.indexing.context import Guard, IndexContext
from streams.indexing.flow import Flow, OrderedAcks
from streams.indexing.image_retries import Attempt, begin, due_in_seconds, load, settle
from streams.indexing.index_batch import index_batch
from streams.indexing.prefetch import Prefetched, decode_batch, prefetch
from streams.indexing.take_over import RecentWrites, recheck

log = structlog.get_logger()

_DUE_EVERY_SECONDS = 1.0
_FORGET_EVERY = timedelta(hours=1)

IsCurrent = Callable[[Any], bool]
"""Whether an event was read under the present assignment of partitions; older ones are read again."""

Report = Callable[[object], None]


def as_record(event: EventT[Any], topic: str) -> SourceRecord:
    """The record that a Faust event stands for; `topic` is its name without prefix."""
    message = event.message
    headers = message.headers or ()
    return SourceRecord(
        topic=topic,
        partition=message.partition,
        offset=message.offset,
        timestamp_ms=round(message.timestamp * 1000),
        key=message.key,
        value=message.value,
        headers=tuple(headers.items() if isinstance(headers, Mapping) else headers),
    )


@dataclass(eq=False)
class _Batch:
    """Events on their way from the topic to the center."""

    events: Sequence[EventT[Any]]
    records: Sequence[SourceRecord]
    epoch: int
    """The assignment of partitions in which they were read."""
    prefetched: Prefetched
    prefetching: asyncio.Task[None]
    item_ids: frozenset[str]


@dataclass(eq=False)
class ItemPipeline:
    """Handles publish, update and delete of `items`. One agent for all three: two would lose their order.

    Batches are decided, written and acknowledged strictly one after another. Only what no order can change, decoding
    and encoding, is done ahead for the next ones. Three loops share the queue: `run` reads and prefetches,
    `_write_in_order` writes, `_recheck_when_due` checks what was written again.
    """

    context: IndexContext
    flow: Flow
    recent: RecentWrites
    is_current: IsCurrent
    on_report: Report
    stream: StreamT[bytes]
    count_partitions: Callable[[], int] = lambda: 0
    """How many partitions `items` has; 0 if that is not known."""

    def __post_init__(self) -> None:
        self._room = asyncio.Semaphore(1 + self.context.config.batches_ahead)
        self._queue: deque[_Batch] = deque()
        self._arrived = asyncio.Condition()
        self._told_foreign = False
        self._forgot_at: datetime | None = None
        self._in_turn = asyncio.Lock()  # a recheck between a write and its being remembered would undo that write

    async def run(self) -> None:
        """Read until cancelled."""
        config = self.context.config
        loops = [asyncio.ensure_future(loop) for loop in (self._write_in_order(), self._recheck_when_due())]
        for loop in loops:
            loop.add_done_callback(self._fail)
        try:
            await self._room.acquire()
            async for events in self.stream.noack_take(config.batch_max_items, within=config.batch_within_seconds):
                async with self.flow.hand():
                    await self._enqueue(events)
                await self._room.acquire()
        finally:
            for loop in loops:
                loop.remove_done_callback(self._fail)
            under_way = [*loops, *(batch.prefetching for batch in self._queue)]
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _enqueue(self, events: Sequence[EventT[Any]]) -> None:
        """Decode a batch, begin to prefetch it, and line it up."""
        records = [as_record(event, "items") for event in events]
        self._report_partitioning(records)
        prefetched = decode_batch(self.context, records)
        unwritten = frozenset().union(*(batch.item_ids for batch in self._queue))
        prefetching = asyncio.create_task(prefetch(self.context, prefetched, unwritten))
        item_ids = frozenset(change.item_id for change in prefetched.changes)
        async with self._arrived:
            self._queue.append(_Batch(events, records, self.flow.epoch, prefetched, prefetching, item_ids))
            self._arrived.notify()

    def _report_partitioning(self, records: Sequence[SourceRecord]) -> None:
        if not (partitions := self.count_partitions()):
            return
        foreign = [one for one in records if one.key and home_partition(one.key, partitions) != one.partition]
        self.on_report(PartitioningReport(home=len(records) - len(foreign), foreign=len(foreign)))
        if foreign and not self._told_foreign:
            self._told_foreign = True
            log.warning(
                "items.foreign_partition",
                partition=foreign[0].partition,
                offset=foreign[0].offset,
                partitions=partitions,
                fix=FIX,
            )

    async def _write_in_order(self) -> None:
        while True:
            async with self._arrived:
                await self._arrived.wait_for(lambda: bool(self._queue))
            batch = self._queue[0]
            async with self.flow.hand(batch.epoch), self._in_turn:
                await self._write(batch)
            self._queue.popleft()
            self._room.release()

    async def _write(self, batch: _Batch) -> None:
        """Write and acknowledge what of a batch is current; all of it is dropped if partitions moved since."""
        await batch.prefetching
        current = [event for event in batch.events if self.is_current(event)]
        if batch.epoch != self.flow.epoch or not current:
            return
        whole = len(current) == len(batch.events)
        records = batch.records if whole else [as_record(event, "items") for event in current]
        guard = self.flow.guard(batch.epoch)
        report = await index_batch(self.context, records, guard, batch.prefetched if whole else None)
        self.on_report(report)
        self.recent.add(report.written)
        for event in current:
            await self.stream.ack(event)

    async def _recheck_when_due(self) -> None:
        while True:
            await asyncio.sleep(_DUE_EVERY_SECONDS)
            while self.recent.is_due:
                epoch = self.flow.epoch
                async with self.flow.hand(epoch), self._in_turn:
                    await self._recheck(self.flow.guard(epoch))
            epoch, now = self.flow.epoch, self.context.now()
            if self._forgot_at is None or now - self._forgot_at >= _FORGET_EVERY:
                self._forgot_at = now
                async with self.flow.hand(epoch), self._in_turn:
                    await self._forget_deleted(now, self.flow.guard(epoch))

    async def _recheck(self, guard: Guard) -> None:
        writes = self.recent.pop_due()
        try:
            await recheck(self.context, writes, guard)
        except Fenced:  # partitions moved
            self.recent.put_back(writes)
            raise

    async def _forget_deleted(self, now: datetime, guard: Guard) -> None:
        """Remove marks of deleted items whose time is over. A center that is away is asked the next time."""
        with suppress(Unavailable):
            async with self.context.writing:
                await guard()
                await self.context.index.forget_deleted(now)

    def _fail(self, task: asyncio.Future[None]) -> None:
        """Stop the process if a loop ends by itself: a worker that reads and does not write looks alive."""
        self.flow.fail(RuntimeError(f"the item path stopped writing by itself: {task!r}; start the worker again"))


@dataclass(eq=False)
class _Late:
    """An event of `items-retry` on its way."""

    event: EventT[Any]
    record: SourceRecord
    acknowledge: Callable[[], Awaitable[None]]
    attempt: Attempt | None = None


@dataclass(eq=False)
class ImageRetryPool:
    """Handles `items-retry`: many wait at the same time, each until it is due. Acknowledged in their order.

    What is due begins in batches, is loaded side by side, and is written in batches: each of two loops takes what has
    gathered since it last did.
    """

    context: IndexContext
    flow: Flow
    is_current: IsCurrent
    on_report: Report
    sleep: Callable[[float], Awaitable[None]]
    stream: StreamT[bytes]

    def __post_init__(self) -> None:
        self._room = asyncio.Semaphore(self.context.config.retry_max_waiting)
        self._acks: OrderedAcks[EventT[Any]] = OrderedAcks(self.stream.ack)
        self._generation: int | None = None
        self._due: asyncio.Queue[_Late] = asyncio.Queue()  # both bounded by the room
        self._loaded: asyncio.Queue[_Late] = asyncio.Queue()

    async def run(self) -> None:
        """Read until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._spawn = tasks.create_task
            for queue, step in ((self._due, self._begin), (self._loaded, self._settle)):
                tasks.create_task(self._in_batches(queue, step))
            async for events in self.stream.noack_take(self.context.config.batch_max_items, within=0.2):
                for event in events:
                    if not self.is_current(event):
                        continue
                    await self._room.acquire()
                    if event.message.generation_id != self._generation:  # what is left of another is never acknowledged
                        self._acks, self._generation = OrderedAcks(self.stream.ack), event.message.generation_id
                    acknowledge = self._acks.arrived(event.message.partition, event)
                    late = _Late(event, as_record(event, "items-retry"), acknowledge)
                    tasks.create_task(self._until_due(late))

    async def _until_due(self, late: _Late) -> None:
        try:
            while (left := due_in_seconds(self.context, late.record)) > 0:
                await self.sleep(min(left, 1.0))  # in pieces, so that a clock that is set forward is noticed
            self._due.put_nowait(late)
        except Exception as error:
            self.flow.fail(error)

    async def _in_batches(self, queue: asyncio.Queue[_Late], step: Callable[[list[_Late]], Awaitable[None]]) -> None:
        try:
            while True:
                batch = [await queue.get()]
                while not queue.empty() and len(batch) < self.context.config.batch_max_items:
                    batch.append(queue.get_nowait())
                await step(batch)
        except Exception as error:
            self.flow.fail(error)

    async def _begin(self, batch: list[_Late]) -> None:
        for late, attempt in zip(batch, await begin(self.context, [late.record for late in batch]), strict=True):
            self._spawn(self._load(late, attempt))

    async def _load(self, late: _Late, attempt: Attempt) -> None:
        try:
            late.attempt = await load(self.context, attempt)
            self._loaded.put_nowait(late)
        except Exception as error:
            self.flow.fail(error)

    async def _settle(self, batch: list[_Late]) -> None:
        """Write and acknowledge what of a batch is current; partitions' new owners read the rest again."""
        epoch = self.flow.epoch
        async with self.flow.hand(epoch):
            current = [late for late in batch if self.is_current(late.event)]
            attempts = [late.attempt for late in current if late.attempt is not None]
            reports = await settle(self.context, attempts, self.flow.guard(epoch))
            for late, report in zip(current, reports, strict=True):
                self.on_report(report)
                await late.acknowledge()
        for _ in batch:
            self._room.release()
