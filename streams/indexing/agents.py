"""The two Faust agents of the item path: thin loops around `index_batch` and `retry_image`.

Both take events without acknowledging (`noack_take`): Faust's other ways acknowledge an event also when the body
raised, or was stopped, before the event was written.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from faust.types import EventT, StreamT

from streams.broker.records import SourceRecord
from streams.indexing.context import IndexContext
from streams.indexing.flow import Flow, OrderedAcks
from streams.indexing.image_retries import due_in_seconds, retry_image
from streams.indexing.index_batch import index_batch
from streams.indexing.prefetch import Prefetched, decode_batch, prefetch
from streams.indexing.take_over import RecentWrites, recheck

_DUE_EVERY_SECONDS = 1.0

IsCurrent = Callable[[Any], bool]
"""Whether an event was read since partitions were last handed out; older ones are read again."""

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
    ahead: Prefetched
    looking: asyncio.Task[None]
    item_ids: frozenset[str]


async def index_items(
    context: IndexContext,
    flow: Flow,
    take_over: RecentWrites,
    is_current: IsCurrent,
    on_report: Report,
    stream: StreamT[bytes],
) -> None:
    """Handle publish, update and delete of `items`. One agent for all three: two would lose their order.

    Batches are decided, written and acknowledged strictly one after another. Only what no order can change, decoding
    and encoding, is done ahead for the next ones.
    """
    config = context.config
    room = asyncio.Semaphore(1 + config.batches_ahead)
    line: deque[_Batch] = deque()
    arrived = asyncio.Condition()
    in_turn = asyncio.Lock()  # looking again between a write and its being remembered would undo that write

    async def write(batch: _Batch) -> None:
        await batch.looking
        current = [event for event in batch.events if is_current(event)]
        if batch.epoch != flow.epoch or not current:
            return
        whole = len(current) == len(batch.events)
        records = batch.records if whole else [as_record(event, "items") for event in current]
        guard = flow.guard(batch.epoch)
        on_report(await index_batch(context, records, guard, batch.ahead if whole else None))
        take_over.saw(records)
        for event in current:
            await stream.ack(event)

    async def write_in_order() -> None:
        while True:
            async with arrived:
                await arrived.wait_for(lambda: bool(line))
            async with flow.hand(line[0].epoch), in_turn:
                await write(line[0])
            line.popleft()
            room.release()

    async def look_again_when_due() -> None:
        while True:
            await asyncio.sleep(_DUE_EVERY_SECONDS)
            epoch = flow.epoch
            if take_over.is_due:
                async with flow.hand(epoch), in_turn:
                    await recheck(context, take_over.due(), flow.guard(epoch))

    def ended_by_itself(task: asyncio.Future[None]) -> None:
        # a worker that reads and does not write looks alive
        flow.fail(RuntimeError(f"the item path stopped writing by itself: {task!r}; start the worker again"))

    writing = asyncio.ensure_future(write_in_order())
    looking_again = asyncio.ensure_future(look_again_when_due())
    for task in (writing, looking_again):
        task.add_done_callback(ended_by_itself)
    try:
        await room.acquire()
        async for events in stream.noack_take(config.batch_max_items, within=config.batch_within_seconds):
            async with flow.hand():
                records = [as_record(event, "items") for event in events]
                ahead = decode_batch(context, records)
                unwritten = frozenset().union(*(batch.item_ids for batch in line))
                looking = asyncio.create_task(prefetch(context, ahead, unwritten))
                item_ids = frozenset(change.item_id for change in ahead.changes)
                async with arrived:
                    line.append(_Batch(events, records, flow.epoch, ahead, looking, item_ids))
                    arrived.notify()
            await room.acquire()
    finally:
        under_way = [writing, looking_again, *(batch.looking for batch in line)]
        for task in under_way:
            task.remove_done_callback(ended_by_itself)
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def retry_images(
    context: IndexContext,
    flow: Flow,
    is_current: IsCurrent,
    on_report: Report,
    sleep: Callable[[float], Awaitable[None]],
    stream: StreamT[bytes],
) -> None:
    """Handle `items-retry`: many wait at the same time, each until it is due."""
    room = asyncio.Semaphore(context.config.retry_max_waiting)
    acks: OrderedAcks[EventT[Any]] = OrderedAcks(stream.ack)

    async def handle(event: EventT[Any], done: Callable[[], Awaitable[None]]) -> None:
        try:
            record = as_record(event, "items-retry")
            while (left := due_in_seconds(context, record)) > 0:
                await sleep(min(left, 1.0))  # in pieces, so that a clock that is set forward is noticed
            async with flow.hand():
                if not is_current(event):
                    return
                on_report(await retry_image(context, record, flow.guard()))
                await done()
        except Exception as error:  # before it was in hand
            flow.fail(error)
        finally:
            room.release()

    async with asyncio.TaskGroup() as waiting:
        async for events in stream.noack_take(context.config.batch_max_items, within=0.2):
            for event in events:
                if not is_current(event):
                    continue
                await room.acquire()
                line = (event.message.partition, event.message.generation_id)
                waiting.create_task(handle(event, acks.arrived(line, event)))
