"""The item path: publish, update and delete of a partition, in order, by one agent.

Write first, announce second, acknowledge third. A worker that dies in between does the same again from the last
acknowledged record, and ends in the same state: rows carry their source offset, and a write is a whole row.

A late picture (`retry_images`) is written under the same lock as the batches here, after comparing the row's source
with its own. That excludes every interleaving inside one worker. Between workers none can happen: `items` and
`items-retry` have the same number of partitions and are assigned together, and a retry goes to the partition of its
source, so both events of one item are always read by one worker.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import structlog

from schemas.errors import Unprocessable
from streams.broker.records import SourceRecord
from streams.indexing.batch_plan import BatchPlan, BatchPlanner
from streams.indexing.config import IndexReport
from streams.indexing.context import Guard, IndexContext
from streams.indexing.guarded_writer import GuardedWriter
from streams.indexing.prefetch import Prefetched, decode_batch
from streams.runtime.delivery import DeliveryReport, deliver, retry_until_available
from streams.stores.vectors.item_index import ItemRow

log = structlog.get_logger()


async def index_batch(
    context: IndexContext, records: Sequence[SourceRecord], guard: Guard, prefetched: Prefetched | None = None
) -> IndexReport:
    """Bring the center up to date with a batch of `items`. When it returns, all records may be acknowledged.

    `prefetched` is what `prefetch` found for just these records. It saves time and decides nothing: what it lacks or
    predicts wrong is worked out here.

    Waits while Milvus or Kafka is away. Raises `Fenced` from `guard`, and nothing else on purpose.
    """
    started = time.monotonic()
    batch = _BatchRun(context, GuardedWriter(context, guard), prefetched or decode_batch(context, records))
    delivery = await batch.run()
    report = batch.report(len(records), delivery, time.monotonic() - started)
    log.info(
        "items.indexed",
        count=report.events,
        encoded=report.encoded,
        rewritten=report.rewritten,
        deleted=report.deleted,
        stale=report.stale,
        image_retries=report.image_retries,
        dead_lettered=sum(report.dead_lettered.values()),
        partitions=sorted({record.partition for record in records}),
        seconds=round(report.seconds, 4),
    )
    return report


class _BatchRun:
    """One batch on its way into the center."""

    def __init__(self, context: IndexContext, writer: GuardedWriter, prefetched: Prefetched) -> None:
        self._context = context
        self._writer = writer
        self._prefetched = prefetched
        self._item_ids = list(dict.fromkeys(change.item_id for change in prefetched.changes))
        self._plan = BatchPlan(letters=list(prefetched.letters))
        self._read_at = context.now()
        self._overtaken: dict[str, ItemRow] = {}
        """Newer rows that another worker wrote since the rows were read."""

    async def run(self) -> DeliveryReport[ItemRow]:
        """Decide from a fresh read, write, announce, and pass on what failed."""
        async with self._context.writing:
            self._read_at = self._context.now()
            rows = await self._context.read_rows(self._item_ids, what="items.fetch")
            await BatchPlanner(self._context, self._prefetched, self._plan, rows).decide()
            delivery = await self._write()
            await self._announce(delivery.delivered)
            if self._plan.retries:
                await self._writer.retry_later(self._plan.retries)
        if self._plan.letters:
            await self._writer.publish_letters(self._plan.letters)
        # a worker that was replaced while it waited for an answer acknowledges nothing
        await self._writer.check_guard(what="items.acknowledge")
        return delivery

    async def _write(self) -> DeliveryReport[ItemRow]:
        delivery = await deliver(
            self._plan.upserts,
            write=self._upsert_once,
            quarantine=self._refuse,
            what="items.upsert",
            patience=self._context.patience,
        )
        if self._plan.deleted:
            await retry_until_available(self._bury_once, what="items.delete", patience=self._context.patience)
        return delivery

    async def _upsert_once(self, rows: Sequence[ItemRow]) -> None:
        await self._writer.upsert_once(await self._newest_still(rows))

    async def _bury_once(self) -> None:
        await self._writer.bury_once(await self._newest_still(self._plan.deleted))

    async def _newest_still(self, rows: Sequence[ItemRow]) -> list[ItemRow]:
        """Those that no other worker has overtaken. The center is read again if that was long ago.

        A worker that wrote something newer looks for it again later, but not later than a write may take that was
        decided before.
        """
        now = self._context.now()
        age = (now - self._read_at).total_seconds()
        if not 0 <= age < self._context.config.read_ahead_seconds:
            held = await self._context.index.fetch(self._item_ids, pending=True)
            self._read_at = now
            self._overtaken |= {
                row.item_id: found
                for row in [*self._plan.upserts, *self._plan.deleted]
                if (found := held.get(row.item_id)) is not None
                and found.is_newer(row.source_partition, row.source_offset, row.produced_at_ms)
            }
        return [row for row in rows if row.item_id not in self._overtaken]

    async def _refuse(self, row: ItemRow, error: Unprocessable) -> None:
        record = self._plan.changes.pop(row.item_id).record
        self._plan.letters.append(record.letter("write", error, failed_at=self._context.now()))

    async def _announce(self, delivered: Sequence[ItemRow]) -> None:
        """Announce what was written, and stale rows again: a replaced worker may have announced older content last."""
        rows = [self._overtaken.get(row.item_id, row) for row in [*self._plan.stale, *self._plan.deleted, *delivered]]
        gone = [row.item_id for row in rows if not row.is_searchable]
        await self._writer.announce([row for row in rows if row.is_searchable], gone)

    def report(self, events: int, delivery: DeliveryReport[ItemRow], seconds: float) -> IndexReport:
        """What became of the batch."""
        plan = self._plan
        encoded = {row.item_id for row in plan.encoded}
        return IndexReport(
            events=events,
            superseded=len(self._prefetched.changes) - len(self._item_ids),
            encoded=sum(row.item_id in encoded for row in delivery.delivered),
            rewritten=len(plan.rewritten),
            pending=len(plan.pending),
            deleted=len(plan.deleted),
            stale=len(plan.stale),
            image_retries=len(plan.retries),
            dead_lettered=Counter((letter.stage, letter.reason.value) for letter in plan.letters),
            held_seconds=delivery.waited_seconds,
            seconds=seconds,
            written=[
                replace(self._plan.changes[row.item_id].record, timestamp_ms=row.produced_at_ms)
                for row in [*plan.deleted, *delivery.delivered]
                if row.item_id in plan.changes and row.item_id not in self._overtaken
            ],
        )
