"""The item path: publish, update and delete of a partition, in order, by one agent.

Write first, announce second, acknowledge third. A worker that dies in between does the same again from the last
acknowledged record, and ends in the same state: rows carry their source offset, and a write is a whole row.

A late picture (`retry_images`) is written under the same lock as the batches here, after comparing the row's source
with its own. That excludes every interleaving inside one worker. Between workers none can happen: `items` and
`items-retry` have the same number of partitions and are assigned together, and a retry goes to the partition of its
source, so both events of one item are always read by one worker.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import numpy as np
import structlog

from encoders.base import Prepared
from schemas.errors import Unprocessable
from schemas.items import ImageRetry, ItemPublished, SourceOffset
from schemas.letters import DeadLetter, RequeueHeaders
from streams.broker.records import SourceRecord
from streams.indexing.config import IndexReport
from streams.indexing.contents import ItemInputs, load_content
from streams.indexing.context import Guard, IndexContext
from streams.indexing.item_changes import ItemChange, is_newer, newest_changes
from streams.indexing.prefetch import Prefetched, Vector, decode_batch, is_complete
from streams.runtime.delivery import deliver, retry_until_available
from streams.stores.vectors.item_index import MAX_TITLE_CHARACTERS, ItemRow

log = structlog.get_logger()


@dataclass
class _Plan:
    """What a batch comes to, item by item."""

    rewrite: list[ItemRow] = field(default_factory=list)
    encode: list[tuple[ItemChange, Prepared, float | None, Vector | None]] = field(default_factory=list)
    wait: list[tuple[ItemChange, float | None]] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    stale: list[ItemRow] = field(default_factory=list)
    retries: list[ImageRetry] = field(default_factory=list)
    letters: list[DeadLetter] = field(default_factory=list)


async def index_batch(
    context: IndexContext, records: Sequence[SourceRecord], guard: Guard, ahead: Prefetched | None = None
) -> IndexReport:
    """Bring the center up to date with a batch of `items`. When it returns, all records may be acknowledged.

    `ahead` is what `prefetch` found for just these records. It saves time and decides nothing: what was guessed
    wrong, or not at all, is worked out here.

    Holds while Milvus or Kafka is away. Raises `Fenced` from `guard`, and nothing else on purpose.
    """
    started = time.monotonic()
    ahead = decode_batch(context, records) if ahead is None else ahead
    plan = _Plan(letters=list(ahead.letters))
    changes = ahead.changes
    newest = newest_changes(changes)
    held_seconds = 0.0
    encoded = 0
    async with context.writing:
        ids = [change.item_id for change in newest]
        rows = await retry_until_available(
            lambda: context.index.fetch(ids, pending=True), what="items.fetch", patience=context.patience
        )
        await _decide(context, newest, rows, ahead, plan)
        fresh = await _encode(context, plan)
        upserts = [*fresh, *plan.rewrite, *(_row(context, change, None, price) for change, price in plan.wait)]
        by_id = {change.item_id: change for change in newest}

        async def write(part: Sequence[ItemRow]) -> None:
            await context.upsert(part, guard)

        async def refuse(row: ItemRow, error: Unprocessable) -> None:
            plan.letters.append(by_id[row.item_id].record.letter("write", error, failed_at=context.now()))

        written = await deliver(upserts, write=write, quarantine=refuse, what="items.upsert", patience=context.patience)
        held_seconds += written.waited_seconds
        encoded = sum(row.item_id in {f.item_id for f in fresh} for row in written.delivered)
        if plan.delete:

            async def delete() -> None:
                await context.delete(plan.delete, guard)

            await retry_until_available(delete, what="items.delete", patience=context.patience)
        told = [*plan.stale, *written.delivered]
        gone = [*plan.delete, *(row.item_id for row in told if row.is_pending)]
        held = [row for row in told if not row.is_pending]

        async def announce() -> None:
            # also for rows that were only read: told by a worker that was replaced, they could overtake newer news
            await guard()
            await context.outbox.announce(held, gone)

        await retry_until_available(announce, what="embeddings.announce", patience=context.patience)
        if plan.retries:

            async def retry_later() -> None:
                await guard()
                await context.outbox.retry_later(plan.retries)

            await retry_until_available(retry_later, what="items-retry.send", patience=context.patience)
    if plan.letters:

        async def bury() -> None:
            await guard()
            await context.dead_letters.bury(plan.letters)

        await retry_until_available(bury, what="dead-letters.send", patience=context.patience)
    # a worker that was replaced while it waited for an answer acknowledges nothing
    await retry_until_available(guard, what="items.acknowledge", patience=context.patience)
    return _report(plan, records, changes, newest, encoded, held_seconds, time.monotonic() - started)


async def _decide(
    context: IndexContext, newest: Sequence[ItemChange], rows: dict[str, ItemRow], ahead: Prefetched, plan: _Plan
) -> None:
    """Sort every item's change into the plan. One that turns out to be unusable gives way to the one before it."""
    waiting = list(newest)
    while waiting:
        to_encode: list[tuple[ItemChange, ItemPublished, float | None]] = []
        for change in waiting:
            row = rows.get(change.item_id)
            if row is not None and is_newer(row, change.record):
                plan.stale.append(row)
            elif change.item is None:
                plan.delete.append(change.item_id)
            elif row is not None and is_complete(context, row, change, change.item):
                plan.rewrite.append(_rewritten(row, change, change.item))
            else:
                to_encode.append((change, change.item, change.first_price(row)))
        refused = await _prepare(context, to_encode, ahead, plan)
        waiting = [change.before for change in refused if change.before is not None]


async def _prepare(
    context: IndexContext,
    to_encode: Sequence[tuple[ItemChange, ItemPublished, float | None]],
    ahead: Prefetched,
    plan: _Plan,
) -> list[ItemChange]:
    """Get pictures and prepare, where that was not done ahead. Returns the changes that are refused."""
    found = await asyncio.gather(*(_found(context, change, item, price, ahead) for change, item, price in to_encode))
    refused: list[ItemChange] = []
    for (change, item, price), (inputs, vector) in zip(to_encode, found, strict=True):
        if inputs.late:
            plan.retries.append(_first_retry(context, change, item))
        for stage, error in inputs.errors:
            plan.letters.append(change.record.letter(stage, error, failed_at=context.now()))
        if inputs.prepared is not None:
            plan.encode.append((change, inputs.prepared, price, vector))
        elif inputs.errors:
            refused.append(change)
        else:
            plan.wait.append((change, price))
    return refused


async def _found(
    context: IndexContext, change: ItemChange, item: ItemPublished, price: float | None, ahead: Prefetched
) -> tuple[ItemInputs, Vector | None]:
    prediction = ahead.predictions.get((change.record.partition, change.record.offset))
    if prediction is not None and prediction.price == price:
        return prediction.inputs, prediction.vector
    return await load_content(context, item, price), None


def _first_retry(context: IndexContext, change: ItemChange, item: ItemPublished) -> ImageRetry:
    again = RequeueHeaders.from_headers(change.record.headers)
    return ImageRetry(
        item=item,
        source=SourceOffset(partition=change.record.partition, offset=change.record.offset),
        attempt=1,
        not_before=context.now() + timedelta(seconds=context.config.retry_wait_seconds(1)),
        requeued_from=again.letter_key.decode() if again else None,
        failed_before=again.attempts if again else 0,
        first_failed_at=again.first_failed_at if again else None,
    )


async def _encode(context: IndexContext, plan: _Plan) -> list[ItemRow]:
    rows = [
        _row(context, change, prepared, price, vector)
        for change, prepared, price, vector in plan.encode
        if vector is not None
    ]
    left = [(change, prepared, price) for change, prepared, price, vector in plan.encode if vector is None]

    async def encode(part: Sequence[tuple[ItemChange, Prepared, float | None]]) -> None:
        vectors = await context.encoding.encode([prepared for _, prepared, _ in part])
        rows.extend(
            _row(context, change, prepared, price, vector)
            for (change, prepared, price), vector in zip(part, vectors, strict=True)
        )

    async def refuse(one: tuple[ItemChange, Prepared, float | None], error: Unprocessable) -> None:
        plan.letters.append(one[0].record.letter("encode", error, failed_at=context.now()))

    await deliver(left, write=encode, quarantine=refuse, what="items.encode", patience=context.patience)
    return rows


def _row(
    context: IndexContext,
    change: ItemChange,
    prepared: Prepared | None,
    first_price: float | None,
    vector: Vector | None = None,
) -> ItemRow:
    assert change.item is not None
    return ItemRow(
        item_id=change.item_id,
        encoder_version=context.encoding.version,
        vector=np.zeros(context.encoding.dim, np.float32) if vector is None else vector,
        content_hash=change.item.content_hash(),
        published_at=change.item.published_at,
        category=change.item.category or None,
        price=change.item.price,
        first_price=first_price,
        has_title=prepared is not None and prepared.has_title,
        has_image=prepared is not None and prepared.has_image,
        source_partition=change.record.partition,
        source_offset=change.record.offset,
        produced_at_ms=change.record.timestamp_ms,
        title=change.item.title[:MAX_TITLE_CHARACTERS],
    )


def _rewritten(row: ItemRow, change: ItemChange, item: ItemPublished) -> ItemRow:
    return replace(
        row,
        published_at=item.published_at,
        price=item.price,
        source_partition=change.record.partition,
        source_offset=change.record.offset,
        produced_at_ms=change.record.timestamp_ms,
    )


def _report(
    plan: _Plan,
    records: Sequence[SourceRecord],
    changes: Sequence[ItemChange],
    newest: Sequence[ItemChange],
    encoded: int,
    held_seconds: float,
    seconds: float,
) -> IndexReport:
    report = IndexReport(
        events=len(records),
        superseded=len(changes) - len(newest),
        encoded=encoded,
        rewritten=len(plan.rewrite),
        pending=len(plan.wait),
        deleted=len(plan.delete),
        stale=len(plan.stale),
        image_retries=len(plan.retries),
        dead_lettered=Counter((letter.stage, letter.reason.value) for letter in plan.letters),
        held_seconds=held_seconds,
        seconds=seconds,
    )
    log.info(
        "items.indexed",
        count=report.events,
        encoded=report.encoded,
        rewritten=report.rewritten,
        deleted=report.deleted,
        stale=report.stale,
        image_retries=report.image_retries,
        dead_lettered=len(plan.letters),
        partitions=sorted({record.partition for record in records}),
        seconds=round(report.seconds, 4),
    )
    return report
