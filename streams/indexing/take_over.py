"""Checking again what was written around a take-over of partitions.

A worker that lost its partitions stops writing as soon as its guard fails. But a worker that is stopped between its
guard and its write writes when it goes on, and a write that a store has accepted may take effect later. The records
that such a worker was working on are the first that its successor reads. So the successor remembers the newest records
of those items, and checks their rows once more when the former owner's writes must have arrived. A row that was
overwritten is written anew from its record. (A record with a dead letter may get a second one by that.) All others are
announced once more, in case a former owner's announcement came last. Later ones are found by `mimstream center verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog

from schemas.errors import BadMessage
from streams.broker.records import SourceRecord, read_item_id
from streams.indexing.context import Guard, IndexContext
from streams.indexing.index_batch import index_batch
from streams.indexing.reannounce import reannounce
from streams.stores.vectors.item_index import ItemRow

log = structlog.get_logger()

MAX_REMEMBERED_BYTES = 64 * 1024 * 1024


class RecentWrites:
    """The newest records of the items that were written since the last assignment of partitions, for some time.

    Bounded: the first `max_records` items, and `MAX_REMEMBERED_BYTES` of values.
    """

    def __init__(self, *, window_seconds: float, max_records: int, clock: Callable[[], float]) -> None:
        self._window_seconds = window_seconds
        self._max_records = max_records
        self._clock = clock
        self._due_at: float | None = None
        self._records: dict[bytes, SourceRecord] = {}
        self._bytes = 0

    def restart(self) -> None:
        """Begin anew: partitions were assigned to this worker."""
        self._due_at = self._clock() + self._window_seconds
        self._records = {}
        self._bytes = 0

    def add(self, records: Sequence[SourceRecord]) -> None:
        """Remember records that were indexed, each in place of an older one of its item."""
        if self._due_at is None:
            return
        for record in records:
            if record.key is None:
                continue
            size = len(record.value or b"")
            known = self._records.get(record.key)
            if known is not None:
                self._bytes -= len(known.value or b"")
            elif len(self._records) >= self._max_records or self._bytes + size > MAX_REMEMBERED_BYTES:
                continue
            self._records[record.key] = record
            self._bytes += size

    @property
    def is_due(self) -> bool:
        """Whether it is time to check them."""
        return self._due_at is not None and self._clock() >= self._due_at

    def pop_due(self) -> list[SourceRecord]:
        """The records to check now, once; empty before it is time."""
        if not self.is_due:
            return []
        records, self._records = list(self._records.values()), {}
        self._due_at = None
        self._bytes = 0
        return records


def was_overwritten(record: SourceRecord, row: ItemRow | None) -> bool:
    """Whether a row is not what indexing `record`, the newest of its item, leaves."""
    if row is None:
        return record.value is not None
    return row.source_partition == record.partition and row.source_offset < record.offset


async def recheck(context: IndexContext, records: Sequence[SourceRecord], guard: Guard) -> int:
    """Index records anew whose rows were overwritten, and announce the other rows again.

    Returns how many were overwritten.
    """
    by_id: dict[str, SourceRecord] = {}
    for record in records:
        with suppress(BadMessage):  # a key that is no item id has no row
            by_id[read_item_id(record.key)] = record
    rows = await context.read_rows(list(by_id), what="take-over.fetch")
    overwritten = {item_id: record for item_id, record in by_id.items() if was_overwritten(record, rows.get(item_id))}
    if overwritten:
        await index_batch(context, list(overwritten.values()), guard)
    await reannounce(context, [item_id for item_id in by_id if item_id not in overwritten], guard)
    log.info("index.looked_again", items=len(by_id), overwritten=len(overwritten))
    return len(overwritten)
