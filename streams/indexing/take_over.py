"""Looking again at what was written around a take-over.

A worker that lost its partitions writes nothing more, as far as it can know: it asks before each write. But one that is
stopped between asking and writing writes when it goes on, and a write that a store has taken in may take effect later.
What such a worker had in hand is what its successor reads first, so the successor remembers the newest records of those
items, and looks at their rows once more when the former owner's writes must have arrived. What was overwritten is
written anew from its record. (A record with a dead letter may get a second one by that.) All others are announced once
more, in case that a former owner's announcement came last. Later still, only `mimstream center verify` finds them.
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
from streams.runtime.delivery import retry_until_available
from streams.stores.vectors.item_index import ItemRow

log = structlog.get_logger()

MAX_REMEMBERED_BYTES = 64 * 1024 * 1024


class RecentWrites:
    """The newest records of the items that were written since partitions were handed out, for some time."""

    def __init__(self, *, window_seconds: float, max_records: int, clock: Callable[[], float]) -> None:
        self._window_seconds = window_seconds
        self._max_records = max_records
        self._clock = clock
        self._due_at: float | None = None
        self._records: dict[bytes, SourceRecord] = {}
        self._bytes = 0

    def began(self) -> None:
        """Partitions were handed out, to us."""
        self._due_at = self._clock() + self._window_seconds
        self._records.clear()
        self._bytes = 0

    def saw(self, records: Sequence[SourceRecord]) -> None:
        """These were indexed. The first items count, with their newest record."""
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
        """Whether it is time to look again."""
        return self._due_at is not None and self._clock() >= self._due_at

    def due(self) -> list[SourceRecord]:
        """What is to be looked at again now; once."""
        if not self.is_due:
            return []
        records = list(self._records.values())
        self._due_at = None
        self._records.clear()
        self._bytes = 0
        return records


def was_overwritten(record: SourceRecord, row: ItemRow | None) -> bool:
    """Whether a row is not what indexing `record`, the newest of its item, would have left."""
    if row is None:
        return record.value is not None
    return row.source_partition == record.partition and row.source_offset < record.offset


async def recheck(context: IndexContext, records: Sequence[SourceRecord], guard: Guard) -> int:
    """Index those records anew whose rows were overwritten, announce the other rows again; returns how many of those
    that were overwritten.
    """
    by_id: dict[str, SourceRecord] = {}
    for record in records:
        with suppress(BadMessage):  # whose key is no item's has no row
            by_id[read_item_id(record.key)] = record
    rows = await retry_until_available(
        lambda: context.index.fetch(list(by_id), pending=True), what="take-over.fetch", patience=context.patience
    )
    overwritten = [record for item_id, record in by_id.items() if was_overwritten(record, rows.get(item_id))]
    if overwritten:
        await index_batch(context, overwritten, guard)
    again = {record.key for record in overwritten}
    await reannounce(context, [name for name, record in by_id.items() if record.key not in again], guard)
    log.info("index.looked_again", items=len(by_id), overwritten=len(overwritten))
    return len(overwritten)
