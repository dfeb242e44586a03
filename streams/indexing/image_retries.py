"""Late pictures: fetched beside the stream, written only if nothing newer has been said of the item since.

What decides is the row in the center: a picture is written if the row still comes from exactly the record of `items`
that asked for the picture. A newer publish has another offset, a delete leaves no row, and an item that had nothing
but its picture has a pending row to compare with. All of that is as durable as the rows themselves, so it holds after
a restart too.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import structlog
from numpy.typing import NDArray

from encoders.base import Prepared
from schemas.base import decode
from schemas.errors import BadMessage, ContentUnavailable, EncodingFailed, Reason, Unprocessable
from schemas.items import ImageRetry, SourceOffset
from schemas.letters import RequeueHeaders
from streams.broker.records import SourceRecord
from streams.indexing.config import RetryReport
from streams.indexing.contents import stage_of
from streams.indexing.context import Guard, IndexContext
from streams.runtime.delivery import retry_until_available
from streams.stores.vectors.item_index import ItemRow

log = structlog.get_logger()


def due_in_seconds(context: IndexContext, record: SourceRecord) -> float:
    """How long a record of `items-retry` has to wait still; 0 for one that cannot be read."""
    try:
        return max(0.0, (_read(context, record).not_before - context.now()).total_seconds())
    except BadMessage:
        return 0.0


async def retry_image(context: IndexContext, record: SourceRecord, guard: Guard) -> RetryReport:
    """Fetch and write one late picture. When it returns, the record may be acknowledged.

    Holds while Milvus or Kafka is away. Raises `Fenced` from `guard`, and nothing else on purpose.
    """
    try:
        retry = _read(context, record)
    except BadMessage as error:
        return await _give_up(context, record, None, "decode", error, guard)
    if await _row_of(context, retry) is None:
        return _done("superseded", retry)
    assert retry.item.image_url is not None
    try:
        picture = await context.fetch(retry.item.image_url)
    except ContentUnavailable as error:
        return await _try_again(context, record, retry, error, guard)
    except Unprocessable as error:
        return await _give_up(context, record, retry, "image", error, guard)
    row = await _row_of(context, retry)
    if row is None:
        return _done("superseded", retry)
    (prepared,) = await context.encoding.prepare([(retry.item, row.first_price, picture)])
    if isinstance(prepared, EncodingFailed):
        return await _give_up(context, record, retry, stage_of(prepared), prepared, guard)
    try:
        vectors = await context.encoding.encode([prepared])
        written = await _write(context, retry, prepared, vectors[0], guard)
    except Unprocessable as error:
        return await _give_up(context, record, retry, "write", error, guard)
    return _done("written" if written else "superseded", retry)


def _read(context: IndexContext, record: SourceRecord) -> ImageRetry:
    if record.value is None:
        raise BadMessage(Reason.WRONG_TYPE, "a record of items-retry needs a value")
    # a retry wraps an item, so it may be larger than what was allowed for the item; its times lie ahead on purpose
    retry = decode(
        ImageRetry,
        record.value,
        now=context.now(),
        max_bytes=2 * context.max_record_bytes,
        max_ahead=timedelta(days=365),
    )
    if retry.item.image_url is None:
        raise BadMessage(Reason.NO_CONTENT, "item: there is no image_url to fetch")
    return retry


async def _row_of(context: IndexContext, retry: ImageRetry) -> ItemRow | None:
    """The row that still waits for this picture (or has it from an earlier attempt), None if something newer won."""
    item_id = retry.item.item_id
    rows = await retry_until_available(
        lambda: context.index.fetch([item_id], pending=True), what="items-retry.fetch", patience=context.patience
    )
    row = rows.get(item_id)
    if row is None or SourceOffset(partition=row.source_partition, offset=row.source_offset) != retry.source:
        return None
    return row


async def _write(
    context: IndexContext, retry: ImageRetry, prepared: Prepared, vector: NDArray[np.float32], guard: Guard
) -> bool:
    async with context.writing:
        row = await _row_of(context, retry)
        if row is None:
            return False
        full = replace(row, vector=vector, has_title=prepared.has_title, has_image=prepared.has_image)

        async def write() -> None:
            await context.upsert([full], guard)

        async def announce() -> None:
            # told by a worker that was replaced, it could overtake newer news of the item
            await guard()
            await context.outbox.announce([full], [])

        await retry_until_available(write, what="items-retry.upsert", patience=context.patience)
        await retry_until_available(announce, what="embeddings.announce", patience=context.patience)
        return True


async def _try_again(
    context: IndexContext, record: SourceRecord, retry: ImageRetry, error: ContentUnavailable, guard: Guard
) -> RetryReport:
    failed = retry.attempt + 1
    if failed >= context.config.retry_max_attempts:
        final = Unprocessable(Reason.IMAGE_UNAVAILABLE, f"{error} ({failed} attempts)")
        return await _give_up(context, record, retry, "image", final, guard)
    wait = timedelta(seconds=context.config.retry_wait_seconds(failed))
    later = retry.model_copy(update={"attempt": failed, "not_before": context.now() + wait})

    async def retry_later() -> None:
        await guard()
        await context.outbox.retry_later([later])

    await retry_until_available(retry_later, what="items-retry.send", patience=context.patience)
    return _done("again", later)


async def _give_up(
    context: IndexContext,
    record: SourceRecord,
    retry: ImageRetry | None,
    stage: str,
    error: Unprocessable,
    guard: Guard,
) -> RetryReport:
    """Bury the retry. A vector of the title stays; a place that was only held for the picture is given up."""
    attempts = retry.attempt if retry else 1
    letter = record.letter(stage, error, failed_at=context.now(), attempts=attempts)
    if retry is not None and retry.requeued_from is not None and retry.first_failed_at is not None:
        again = RequeueHeaders(retry.requeued_from.encode(), retry.failed_before, retry.first_failed_at)
        letter = letter.after(again.headers())

    async def bury() -> None:
        await guard()
        await context.dead_letters.bury([letter])

    await retry_until_available(bury, what="dead-letters.send", patience=context.patience)
    if retry is not None:
        async with context.writing:
            row = await _row_of(context, retry)
            if row is not None and row.is_pending:

                async def delete() -> None:
                    await context.delete([row.item_id], guard)

                await retry_until_available(delete, what="items-retry.delete", patience=context.patience)
    report = RetryReport("given_up", attempts, {(stage, error.reason.value): 1})
    log.info("items.image_given_up", reason=error.reason.value, stage=stage, attempts=attempts)
    return report


def _done(outcome: str, retry: ImageRetry) -> RetryReport:
    log.info("items.image_retried", outcome=outcome, attempt=retry.attempt)
    return RetryReport(outcome, retry.attempt)
