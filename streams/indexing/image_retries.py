"""Late pictures: fetched beside the stream, written only if the item has no newer record since.

What decides is the row in the center: a picture is written if the row still comes from exactly the record of `items`
that asked for the picture. A newer publish has another offset, a delete leaves no row, and an item that had nothing
but its picture has a pending row to compare with. All of that is as durable as the rows themselves, so it holds after
a restart too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import structlog

from encoders.base import Prepared
from schemas.base import decode
from schemas.errors import BadMessage, ContentUnavailable, EncodingFailed, Reason, Unprocessable
from schemas.items import ImageRetry, SourceOffset
from schemas.letters import RequeueHeaders
from streams.broker.records import SourceRecord
from streams.indexing.config import RetryReport
from streams.indexing.contents import stage_of
from streams.indexing.context import Guard, IndexContext
from streams.indexing.guarded_writer import GuardedWriter
from streams.indexing.prefetch import Vector
from streams.runtime.delivery import retry_until_available
from streams.stores.vectors.item_index import ItemRow, deletion_mark

log = structlog.get_logger()


def due_in_seconds(context: IndexContext, record: SourceRecord) -> float:
    """How long a record of `items-retry` has to wait still; 0 for one that cannot be read."""
    try:
        return max(0.0, (_decode(context, record).not_before - context.now()).total_seconds())
    except BadMessage:
        return 0.0


async def retry_image(context: IndexContext, record: SourceRecord, guard: Guard) -> RetryReport:
    """Fetch and write one late picture. When it returns, the record may be acknowledged.

    Waits while Milvus or Kafka is away. Raises `Fenced` from `guard`, and nothing else on purpose.
    """
    writer = GuardedWriter(context, guard)
    try:
        retry = _decode(context, record)
    except BadMessage as error:
        letter = record.letter("decode", error, failed_at=context.now(), attempts=1)
        await writer.publish_letters([letter])
        return _given_up(1, "decode", error)
    return await _Retry(context, writer, record, retry).run()


def _decode(context: IndexContext, record: SourceRecord) -> ImageRetry:
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


@dataclass(frozen=True)
class _Retry:
    """One attempt at one late picture."""

    context: IndexContext
    writer: GuardedWriter
    record: SourceRecord
    retry: ImageRetry

    async def run(self) -> RetryReport:
        retry = self.retry
        if await self._waiting_row() is None:
            return _done("superseded", retry)
        assert retry.item.image_url is not None
        try:
            picture = await self.context.fetch(retry.item.image_url)
        except ContentUnavailable as error:
            return await self._try_again(error)
        except Unprocessable as error:
            return await self._give_up("image", error)
        row = await self._waiting_row()
        if row is None:
            return _done("superseded", retry)
        prepared = await self.context.encoding.prepare(retry.item, row.first_price, picture)
        if isinstance(prepared, EncodingFailed):
            return await self._give_up(stage_of(prepared), prepared)
        try:
            vectors = await retry_until_available(
                lambda: self.context.encoding.encode([prepared]),
                what="items-retry.encode",
                patience=self.context.patience,
            )
            written = await self._write(prepared, vectors[0])
        except Unprocessable as error:
            return await self._give_up("encode" if isinstance(error, EncodingFailed) else "write", error)
        return _done("written" if written else "superseded", retry)

    async def _waiting_row(self) -> ItemRow | None:
        """The row that still waits for this picture (or has it from an earlier attempt); None if it was replaced."""
        item_id = self.retry.item.item_id
        row = (await self.context.read_rows([item_id], what="items-retry.fetch")).get(item_id)
        if row is None or row.is_deleted:
            return None
        if SourceOffset(partition=row.source_partition, offset=row.source_offset) != self.retry.source:
            return None
        return row

    async def _write(self, prepared: Prepared, vector: Vector) -> bool:
        async with self.context.writing:
            written = await retry_until_available(
                partial(self._write_once, prepared, vector), what="items-retry.upsert", patience=self.context.patience
            )
            if written is not None:
                await self.writer.announce([written], [])
            return written is not None

    async def _write_once(self, prepared: Prepared, vector: Vector) -> ItemRow | None:
        """The row is read right before each attempt: an owner of another partition may write it meanwhile."""
        row = await self._waiting_row()
        if row is None:
            return None
        full = replace(row, vector=vector, has_title=prepared.has_title, has_image=prepared.has_image)
        await self.writer.upsert_once([full])
        return full

    async def _try_again(self, error: ContentUnavailable) -> RetryReport:
        failed, config = self.retry.attempt + 1, self.context.config
        if failed >= config.retry_max_attempts:
            final = Unprocessable(Reason.IMAGE_UNAVAILABLE, f"{error} ({failed} attempts)")
            return await self._give_up("image", final)
        due = self.context.now() + timedelta(seconds=config.retry_wait_seconds(failed))
        later = self.retry.model_copy(update={"attempt": failed, "not_before": due})
        await self.writer.retry_later([later])
        return _done("again", later)

    async def _give_up(self, stage: str, error: Unprocessable) -> RetryReport:
        """Send a dead letter. A vector of the title stays; a row that only waited gives way to a mark."""
        retry = self.retry
        letter = self.record.letter(stage, error, failed_at=self.context.now(), attempts=retry.attempt)
        if retry.requeued_from is not None and retry.first_failed_at is not None:
            requeued = RequeueHeaders(retry.requeued_from.encode(), retry.failed_before, retry.first_failed_at)
            letter = letter.after(requeued.headers())
        await self.writer.publish_letters([letter])
        async with self.context.writing:
            await retry_until_available(self._bury_once, what="items-retry.delete", patience=self.context.patience)
        return _given_up(retry.attempt, stage, error)

    async def _bury_once(self) -> None:
        """A mark keeps the place of the record: nothing older takes it, and nobody looks for a row that was lost."""
        row = await self._waiting_row()
        if row is not None and row.is_pending:
            until = self.context.now() + self.context.deletions_kept
            mark = deletion_mark(
                row.item_id,
                encoder_version=row.encoder_version,
                dim=len(row.vector),
                partition=row.source_partition,
                offset=row.source_offset,
                time_ms=row.produced_at_ms,
                until=until,
            )
            await self.writer.bury_once([mark])


def _given_up(attempts: int, stage: str, error: Unprocessable) -> RetryReport:
    log.info("items.image_given_up", reason=error.reason.value, stage=stage, attempts=attempts)
    return RetryReport("given_up", attempts, {(stage, error.reason.value): 1})


def _done(outcome: str, retry: ImageRetry) -> RetryReport:
    log.info("items.image_retried", outcome=outcome, attempt=retry.attempt)
    return RetryReport(outcome, retry.attempt)
