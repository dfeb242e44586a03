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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Protocol

import numpy as np
import structlog

from encoders.base import Prepared
from schemas.errors import BadMessage, ContentUnavailable, EncodingFailed, Reason, Unprocessable
from schemas.items import ImageRetry, ItemPublished, SourceOffset
from schemas.letters import DeadLetter
from streams.agents.index_config import IndexConfig, IndexReport
from streams.agents.item_changes import ItemChange, SourceRecord, is_newer, last_words, read_change
from streams.agents.item_encoding import ItemEncoding
from streams.delivery import Patience, deliver, hold
from streams.stores.dead_letters import DeadLetters
from streams.stores.item_index import MAX_TITLE_CHARACTERS, ItemIndex, ItemRow
from streams.stores.outbox import Outbox

log = structlog.get_logger()

Guard = Callable[[], Awaitable[None]]
"""Called right before a write; raises `Fenced` if this worker must not write any more."""


class Fetch(Protocol):
    """Gets a picture by its URL (`ImageFetcher.fetch`)."""

    async def __call__(self, url: str, *, timeout_seconds: float | None = None) -> bytes:
        """Raises `ContentUnavailable` or `Unprocessable`."""
        ...


@dataclass(frozen=True)
class Center:
    """What both agents of the item path work with."""

    index: ItemIndex
    outbox: Outbox
    dead_letters: DeadLetters
    encoding: ItemEncoding
    fetch: Fetch
    config: IndexConfig
    max_record_bytes: int
    patience: Patience
    now: Callable[[], datetime]
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from reading a row to having announced what replaced it."""


@dataclass
class _Plan:
    """What a batch comes to, item by item."""

    rewrite: list[ItemRow] = field(default_factory=list)
    encode: list[tuple[ItemChange, Prepared, float | None]] = field(default_factory=list)
    wait: list[tuple[ItemChange, float | None]] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    stale: list[ItemRow] = field(default_factory=list)
    retries: list[ImageRetry] = field(default_factory=list)
    letters: list[DeadLetter] = field(default_factory=list)


async def index_batch(center: Center, records: Sequence[SourceRecord], guard: Guard) -> IndexReport:
    """Bring the center up to date with a batch of `items`. When it returns, all records may be acknowledged.

    Holds while Milvus or Kafka is away. Raises `Fenced` from `guard`, and nothing else on purpose.
    """
    started = time.monotonic()
    plan = _Plan()
    changes = _decode(center, records, plan)
    newest = last_words(changes)
    held_seconds = 0.0
    encoded = 0
    async with center.writing:
        ids = [change.item_id for change in newest]
        rows = await hold(lambda: center.index.fetch(ids, pending=True), what="items.fetch", patience=center.patience)
        await _decide(center, newest, rows, plan)
        fresh = await _encode(center, plan)
        upserts = [*fresh, *plan.rewrite, *(_row(center, change, None, price) for change, price in plan.wait)]
        by_id = {change.item_id: change for change in newest}

        async def write(part: Sequence[ItemRow]) -> None:
            await guard()
            await center.index.upsert(part)

        async def refuse(row: ItemRow, error: Unprocessable) -> None:
            plan.letters.append(by_id[row.item_id].record.letter("write", error, failed_at=center.now()))

        written = await deliver(upserts, write=write, quarantine=refuse, what="items.upsert", patience=center.patience)
        held_seconds += written.waited_seconds
        encoded = sum(row.item_id in {f.item_id for f in fresh} for row in written.delivered)
        if plan.delete:

            async def delete() -> None:
                await guard()
                await center.index.delete(plan.delete)

            await hold(delete, what="items.delete", patience=center.patience)
        told = [*plan.stale, *written.delivered]
        gone = [*plan.delete, *(row.item_id for row in told if row.is_pending)]
        held = [row for row in told if not row.is_pending]

        async def announce() -> None:
            # also for rows that were only read: told by a worker that was replaced, they could overtake newer news
            await guard()
            await center.outbox.announce(held, gone)

        await hold(announce, what="embeddings.announce", patience=center.patience)
        if plan.retries:
            await hold(
                lambda: center.outbox.retry_later(plan.retries), what="items-retry.send", patience=center.patience
            )
    if plan.letters:
        await hold(lambda: center.dead_letters.bury(plan.letters), what="dead-letters.send", patience=center.patience)
    return _report(plan, records, changes, newest, encoded, held_seconds, time.monotonic() - started)


def _decode(center: Center, records: Sequence[SourceRecord], plan: _Plan) -> list[ItemChange]:
    changes: list[ItemChange] = []
    now = center.now()
    for record in records:
        try:
            changes.append(
                read_change(
                    record,
                    now=now,
                    max_bytes=center.max_record_bytes,
                    max_ahead=timedelta(seconds=center.config.max_ahead_seconds),
                    field_map=center.config.field_map,
                )
            )
        except BadMessage as error:
            plan.letters.append(record.letter("decode", error, failed_at=now))
    return changes


async def _decide(center: Center, newest: Sequence[ItemChange], rows: dict[str, ItemRow], plan: _Plan) -> None:
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
            elif row is not None and _is_complete(center, row, change.item):
                plan.rewrite.append(_rewritten(row, change, change.item))
            else:
                to_encode.append((change, change.item, change.first_price(row)))
        refused = await _prepare(center, to_encode, plan)
        waiting = [change.before for change in refused if change.before is not None]


def _is_complete(center: Center, row: ItemRow, item: ItemPublished) -> bool:
    """Whether the row's vector is the one that encoding `item` would give."""
    return (
        row.encoder_version == center.encoding.version
        and row.content_hash == item.content_hash()
        and row.has_image == bool(item.image or item.image_url)
        and not row.is_pending
    )


async def _prepare(
    center: Center, to_encode: Sequence[tuple[ItemChange, ItemPublished, float | None]], plan: _Plan
) -> list[ItemChange]:
    """Get pictures and prepare. Returns the changes that are refused.

    What an event carries itself must be whole, else the event is refused. Where only what its URL leads to is broken
    or missing, the title is encoded and stays.
    """
    pictures = await asyncio.gather(*(_picture(center, item) for _, item, _ in to_encode))
    refused: list[ItemChange] = []
    ready: list[tuple[ItemChange, ItemPublished, float | None, bytes | None]] = []
    for (change, item, price), picture in zip(to_encode, pictures, strict=True):
        if isinstance(picture, ContentUnavailable):
            plan.retries.append(_first_retry(center, change, item))
            if not _has_text(item):
                plan.wait.append((change, price))
                continue
        elif isinstance(picture, Unprocessable):
            plan.letters.append(change.record.letter("image", picture, failed_at=center.now()))
            if not _has_text(item):
                refused.append(change)
                continue
        ready.append((change, item, price, picture if isinstance(picture, bytes) else None))
    prepared = await center.encoding.prepare([(item, price, picture) for _, item, price, picture in ready])
    titles_only: list[tuple[ItemChange, ItemPublished, float | None]] = []
    for (change, item, price, picture), outcome in zip(ready, prepared, strict=True):
        if isinstance(outcome, Prepared):
            plan.encode.append((change, outcome, price))
            continue
        plan.letters.append(change.record.letter(stage_of(outcome), outcome, failed_at=center.now()))
        if picture is not None and item.image is None and _has_text(item):
            titles_only.append((change, item, price))
        else:
            refused.append(change)
    again = await center.encoding.prepare([(item, price, None) for _, item, price in titles_only])
    for (change, _, price), outcome in zip(titles_only, again, strict=True):
        if isinstance(outcome, Prepared):
            plan.encode.append((change, outcome, price))
        else:
            refused.append(change)
    return refused


async def _picture(center: Center, item: ItemPublished) -> bytes | Unprocessable | ContentUnavailable | None:
    if item.image is not None or item.image_url is None:
        return item.image
    try:
        return await center.fetch(item.image_url, timeout_seconds=center.config.fetch_budget_seconds)
    except (Unprocessable, ContentUnavailable) as error:
        return error


def stage_of(error: EncodingFailed) -> str:
    """The stage that a failed preparation belongs to."""
    return "image" if error.reason in (Reason.BAD_IMAGE, Reason.IMAGE_TOO_LARGE) else "encode"


def _has_text(item: ItemPublished) -> bool:
    return bool(item.title.strip() or item.text.strip())


def _first_retry(center: Center, change: ItemChange, item: ItemPublished) -> ImageRetry:
    return ImageRetry(
        item=item,
        source=SourceOffset(partition=change.record.partition, offset=change.record.offset),
        attempt=1,
        not_before=center.now() + timedelta(seconds=center.config.retry_wait_seconds(1)),
    )


async def _encode(center: Center, plan: _Plan) -> list[ItemRow]:
    rows: list[ItemRow] = []

    async def encode(part: Sequence[tuple[ItemChange, Prepared, float | None]]) -> None:
        vectors = await center.encoding.encode([prepared for _, prepared, _ in part])
        rows.extend(
            _row(center, change, prepared, price, vector)
            for (change, prepared, price), vector in zip(part, vectors, strict=True)
        )

    async def refuse(one: tuple[ItemChange, Prepared, float | None], error: Unprocessable) -> None:
        plan.letters.append(one[0].record.letter("encode", error, failed_at=center.now()))

    await deliver(plan.encode, write=encode, quarantine=refuse, what="items.encode", patience=center.patience)
    return rows


def _row(
    center: Center,
    change: ItemChange,
    prepared: Prepared | None,
    first_price: float | None,
    vector: np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None = None,
) -> ItemRow:
    assert change.item is not None
    return ItemRow(
        item_id=change.item_id,
        encoder_version=center.encoding.version,
        vector=np.zeros(center.encoding.dim, np.float32) if vector is None else vector,
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
        first_price=change.first_price(row),
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
