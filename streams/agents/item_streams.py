"""The two Faust agents of the item path: thin loops around `index_batch` and `retry_image`.

Both take events without acknowledging (`noack_take`): Faust's other ways acknowledge an event also when the body
raised, or was stopped, before the event was written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from faust.types import EventT, StreamT

from streams.agents.flow import Flow, OrderedAcks
from streams.agents.index_items import Center, index_batch
from streams.agents.item_changes import SourceRecord
from streams.agents.retry_images import due_in_seconds, retry_image

IsCurrent = Callable[[Any], bool]
"""Whether an event was read since partitions were last handed out; older ones are read again."""

Report = Callable[[object], None]


def as_record(event: EventT[Any], topic: str) -> SourceRecord:
    """The record that a Faust event stands for; `topic` is its name without prefix."""
    message = event.message
    return SourceRecord(
        topic=topic,
        partition=message.partition,
        offset=message.offset,
        timestamp_ms=round(message.timestamp * 1000),
        key=message.key,
        value=message.value,
    )


async def index_items(
    center: Center, flow: Flow, is_current: IsCurrent, on_report: Report, stream: StreamT[bytes]
) -> None:
    """Handle publish, update and delete of `items`. One agent for all three: two would lose their order."""
    config = center.config
    async for events in stream.noack_take(config.batch_max_items, within=config.batch_within_seconds):
        async with flow.hand():
            current = [event for event in events if is_current(event)]
            if not current:
                continue
            on_report(await index_batch(center, [as_record(event, "items") for event in current], flow.guard()))
            for event in current:
                await stream.ack(event)


async def retry_images(
    center: Center,
    flow: Flow,
    is_current: IsCurrent,
    on_report: Report,
    sleep: Callable[[float], Awaitable[None]],
    stream: StreamT[bytes],
) -> None:
    """Handle `items-retry`: many wait at the same time, each until it is due."""
    room = asyncio.Semaphore(center.config.retry_max_waiting)
    acks: OrderedAcks[EventT[Any]] = OrderedAcks(stream.ack)

    async def handle(event: EventT[Any], done: Callable[[], Awaitable[None]]) -> None:
        try:
            record = as_record(event, "items-retry")
            while (left := due_in_seconds(center, record)) > 0:
                await sleep(min(left, 1.0))  # in pieces, so that a clock that is set forward is noticed
            async with flow.hand():
                if not is_current(event):
                    return
                on_report(await retry_image(center, record, flow.guard()))
                await done()
        finally:
            room.release()

    async with asyncio.TaskGroup() as waiting:
        async for events in stream.noack_take(center.config.batch_max_items, within=0.2):
            for event in events:
                if not is_current(event):
                    continue
                await room.acquire()
                line = (event.message.partition, event.message.generation_id)
                waiting.create_task(handle(event, acks.arrived(line, event)))
