"""Late pictures: fetched beside the stream, written only if the item has no newer record since.

What decides is the row in the center: a picture is written if the row still comes from exactly the record of `items`
that asked for the picture. A newer publish has another offset, a delete leaves no row, and an item that had nothing
but its picture has a pending row to compare with. All of that is as durable as the rows themselves, so it holds after
a restart too.

Pictures are loaded one by one, because each comes when it comes; what became of them is read, encoded and written in
batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial

import structlog

from encoders.base import Prepared
from schemas.base import decode
from schemas.errors import BadMessage, ContentUnavailable, EncodingFailed, Reason, Unprocessable
from schemas.items import ImageRetry, SourceOffset
from schemas.letters import DeadLetter, RequeueHeaders
from streams.broker.records import SourceRecord
from streams.indexing.config import RetryReport
from streams.indexing.contents import stage_of
from streams.indexing.context import Guard, IndexContext
from streams.indexing.guarded_writer import GuardedWriter
from streams.indexing.prefetch import Vector
from streams.runtime.delivery import deliver, retry_until_available
from streams.stores.vectors.item_index import ItemRow, deletion_mark

log = structlog.get_logger()


@dataclass(frozen=True, eq=False)
class Attempt:
    """One attempt at one late picture, and what it came to before anything is written."""

    record: SourceRecord
    retry: ImageRetry | None
    """None: the record cannot be read."""
    is_superseded: bool = False
    """Whether the item was replaced already when the attempt began; nothing is loaded then."""
    first_price: float | None = None
    prepared: Prepared | None = None
    late: ContentUnavailable | None = None
    error: tuple[str, Unprocessable] | None = None
    """Why the picture is given up, with the stage of its dead letter."""

    @property
    def item_id(self) -> str:
        """The item; empty if the record cannot be read."""
        return "" if self.retry is None else self.retry.item.item_id

    @property
    def number(self) -> int:
        """The number of this attempt, from 1."""
        return 1 if self.retry is None else self.retry.attempt

    def waiting_row(self, rows: dict[str, ItemRow]) -> ItemRow | None:
        """The row that waits for this picture (or has it from an earlier attempt); None if it was replaced."""
        row = rows.get(self.item_id)
        if row is None or row.is_deleted or self.retry is None:
            return None
        source = SourceOffset(partition=row.source_partition, offset=row.source_offset)
        return row if source == self.retry.source else None


def due_in_seconds(context: IndexContext, record: SourceRecord) -> float:
    """How long a record of `items-retry` has to wait still; 0 for one that cannot be read."""
    try:
        return max(0.0, (_decode(context, record).not_before - context.now()).total_seconds())
    except BadMessage:
        return 0.0


async def begin(context: IndexContext, records: Sequence[SourceRecord]) -> list[Attempt]:
    """Attempts at records that are due, in their order."""
    attempts: list[Attempt] = []
    for record in records:
        try:
            attempts.append(Attempt(record, _decode(context, record)))
        except BadMessage as error:
            attempts.append(Attempt(record, None, error=("decode", error)))
    rows = await _read_rows(context, attempts, what="items-retry.fetch")
    begun: list[Attempt] = []
    for attempt in attempts:
        row = attempt.waiting_row(rows)
        if row is not None:
            attempt = replace(attempt, first_price=row.first_price)
        begun.append(replace(attempt, is_superseded=row is None and attempt.error is None))
    return begun


async def load(context: IndexContext, attempt: Attempt) -> Attempt:
    """Fetch and prepare one picture. Writes nothing."""
    if attempt.retry is None or attempt.is_superseded:
        return attempt
    item = attempt.retry.item
    assert item.image_url is not None
    try:
        async with context.fetch(item.image_url) as picture:
            prepared = await context.encoding.prepare(item, attempt.first_price, picture)
    except ContentUnavailable as error:
        return replace(attempt, late=error)
    except Unprocessable as error:
        return replace(attempt, error=("image", error))
    if isinstance(prepared, EncodingFailed):
        return replace(attempt, error=(stage_of(prepared), prepared))
    return replace(attempt, prepared=prepared)


async def settle(context: IndexContext, attempts: Sequence[Attempt], guard: Guard) -> list[RetryReport]:
    """Write what the attempts came to. When it returns, all their records may be acknowledged.

    Waits while Milvus or Kafka is away. Raises `Fenced` from `guard`, and nothing else on purpose.
    """
    return await _Settlement(context, GuardedWriter(context, guard), attempts).run()


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


async def _read_rows(context: IndexContext, attempts: Sequence[Attempt], *, what: str) -> dict[str, ItemRow]:
    item_ids = list(dict.fromkeys(attempt.item_id for attempt in attempts if attempt.item_id))
    return await context.read_rows(item_ids, what=what) if item_ids else {}


@dataclass
class _Settlement:
    """The writes of several attempts."""

    context: IndexContext
    writer: GuardedWriter
    attempts: Sequence[Attempt]
    _vectors: dict[Attempt, Vector] = field(default_factory=dict)
    _written: dict[Attempt, ItemRow] = field(default_factory=dict)
    _errors: dict[Attempt, tuple[str, Unprocessable]] = field(default_factory=dict)

    async def run(self) -> list[RetryReport]:
        self._errors = {attempt: attempt.error for attempt in self.attempts if attempt.error is not None}
        await self._write([attempt for attempt in self.attempts if attempt.prepared is not None])
        later = self._later()
        if later:
            await self.writer.retry_later(list(later.values()))
        if self._errors:
            await self._give_up()
        return [self._report(attempt, later) for attempt in self.attempts]

    async def _write(self, loaded: Sequence[Attempt]) -> None:
        await deliver(
            loaded,
            write=self._encode,
            quarantine=partial(self._refuse, "encode"),
            what="items-retry.encode",
            patience=self.context.patience,
        )
        if not self._vectors:
            return
        async with self.context.writing:
            await deliver(
                list(self._vectors),
                write=self._write_once,
                quarantine=partial(self._refuse, "write"),
                what="items-retry.upsert",
                patience=self.context.patience,
            )
            if self._written:
                rows = {row.item_id: row for row in self._written.values()}
                await self.writer.announce(list(rows.values()), [])

    async def _write_once(self, part: Sequence[Attempt]) -> None:
        """Rows are read right before each attempt: an owner of another partition may write them meanwhile."""
        rows = await _read_rows(self.context, part, what="items-retry.fetch")
        full: dict[Attempt, ItemRow] = {}
        for attempt in part:
            row, prepared = attempt.waiting_row(rows), attempt.prepared
            if row is not None and prepared is not None:
                has_title, has_image = prepared.has_title, prepared.has_image
                full[attempt] = replace(row, vector=self._vectors[attempt], has_title=has_title, has_image=has_image)
        if full:  # by item: a record may be met twice
            await self.writer.upsert_once(list({row.item_id: row for row in full.values()}.values()))
        self._written |= full

    async def _encode(self, part: Sequence[Attempt]) -> None:
        vectors = await self.context.encoding.encode([one.prepared for one in part if one.prepared is not None])
        self._vectors.update(zip(part, vectors, strict=True))

    async def _refuse(self, stage: str, attempt: Attempt, error: Unprocessable) -> None:
        self._errors[attempt] = (stage, error)

    def _later(self) -> dict[Attempt, ImageRetry]:
        """What is tried again; what has been tried often enough is given up."""
        found: dict[Attempt, ImageRetry] = {}
        for attempt in self.attempts:
            if attempt.late is None or attempt.retry is None:
                continue
            failed, config = attempt.number + 1, self.context.config
            if failed >= config.retry_max_attempts:
                final = Unprocessable(Reason.IMAGE_UNAVAILABLE, f"{attempt.late} ({failed} attempts)")
                self._errors[attempt] = ("image", final)
                continue
            due = self.context.now() + timedelta(seconds=config.retry_wait_seconds(failed))
            found[attempt] = attempt.retry.model_copy(update={"attempt": failed, "not_before": due})
        return found

    async def _give_up(self) -> None:
        """Send dead letters. A vector of the title stays; a row that only waited gives way to a mark."""
        await self.writer.publish_letters([self._letter(attempt, *why) for attempt, why in self._errors.items()])
        async with self.context.writing:
            await retry_until_available(self._bury_once, what="items-retry.delete", patience=self.context.patience)

    async def _bury_once(self) -> None:
        """A mark keeps the place of a record: nothing older takes it, and nobody looks for a row that was lost."""
        rows = await _read_rows(self.context, list(self._errors), what="items-retry.fetch")
        waiting = [row for attempt in self._errors if (row := attempt.waiting_row(rows)) is not None]
        pending = {row.item_id: row for row in waiting if row.is_pending}
        until = self.context.now() + self.context.deletions_kept
        marks = [
            deletion_mark(
                row.item_id,
                encoder_version=row.encoder_version,
                dim=len(row.vector),
                partition=row.source_partition,
                offset=row.source_offset,
                time_ms=row.produced_at_ms,
                until=until,
            )
            for row in pending.values()
        ]
        if marks:
            await self.writer.bury_once(marks)

    def _letter(self, attempt: Attempt, stage: str, error: Unprocessable) -> DeadLetter:
        letter = attempt.record.letter(stage, error, failed_at=self.context.now(), attempts=attempt.number)
        retry = attempt.retry
        if retry is None or retry.requeued_from is None or retry.first_failed_at is None:
            return letter
        requeued = RequeueHeaders(retry.requeued_from.encode(), retry.failed_before, retry.first_failed_at)
        return letter.after(requeued.headers())

    def _report(self, attempt: Attempt, later: dict[Attempt, ImageRetry]) -> RetryReport:
        if (why := self._errors.get(attempt)) is not None:
            stage, reason = why[0], why[1].reason.value
            log.info("items.image_given_up", reason=reason, stage=stage, attempts=attempt.number)
            return RetryReport("given_up", attempt.number, {(stage, reason): 1})
        if (again := later.get(attempt)) is not None:
            outcome, number = "again", again.attempt
        else:
            outcome, number = "written" if attempt in self._written else "superseded", attempt.number
        log.info("items.image_retried", outcome=outcome, attempt=number)
        return RetryReport(outcome, number)
