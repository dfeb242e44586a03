"""Checking again, a while later, what was written: another worker may have overwritten it with something older.

Two workers can write the row of one item. After a take-over the former owner may: it stops as soon as its guard fails,
but a worker that is stopped between its guard and its write writes when it goes on, and a write that a store has
accepted may take effect later. And where producers choose partitions differently, the records of an item lie in two
partitions with two owners; each compares with the row as it read it, and writes over what came in between.

A write begins at most 0.6 sessions after the row was read, and ends within 0.8 more. So each worker remembers what it
wrote for 1.4 sessions, then compares it with the row. A row from an older record is written anew. The
row of a newer record from another partition is announced once more, and so is everything written right after a
take-over, in case the other worker's announcement came last. Later ones are found by `mimstream center verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from schemas.errors import BadMessage
from streams.broker.records import SourceRecord, read_item_id
from streams.indexing.context import Guard, IndexContext
from streams.indexing.index_batch import index_batch
from streams.indexing.reannounce import reannounce
from streams.stores.vectors.item_index import ItemRow

log = structlog.get_logger()

MAX_REMEMBERED_RECORDS = 50_000
MAX_REMEMBERED_BYTES = 64 * 1024 * 1024

AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class RecentWrite:
    """A record that was written, with the time that its row has."""

    record: SourceRecord
    is_after_take_over: bool = False
    """Whether a former owner may still announce the item."""


class RecentWrites:
    """The newest record of each item that was written in the last `window_seconds`.

    Bounded by `max_records` and `MAX_REMEMBERED_BYTES` of values: what is written beyond is not remembered. Of those
    written in the first window after a take-over, `max_taken_over` count as such.
    """

    def __init__(
        self, *, window_seconds: float, max_records: int, max_taken_over: int, clock: Callable[[], float]
    ) -> None:
        self._window_seconds = window_seconds
        self._max_records = max_records
        self._max_taken_over = max_taken_over
        self._clock = clock
        self._assigned_at: float | None = None
        self._taken_over: set[bytes] = set()
        self._writes: dict[bytes, tuple[float, SourceRecord]] = {}
        """By key, the next one to check first: when it is due, and the record."""
        self._bytes = 0

    def take_over(self) -> None:
        """Partitions were assigned to this worker: what it writes next, a former owner may write too.

        Earlier writes stay. A replaced worker that wakes up moves partitions itself, a moment after its late write.
        """
        self._assigned_at = self._clock()

    def add(self, records: Sequence[SourceRecord]) -> None:
        """Remember records that were written, each in place of an older one of its item."""
        if self._assigned_at is None:
            return
        now = self._clock()
        for record in records:
            key, size = record.key or b"", len(record.value or b"")
            if (known := self._writes.pop(key, None)) is not None:
                self._bytes -= len(known[1].value or b"")
            if len(self._writes) >= self._max_records or self._bytes + size > MAX_REMEMBERED_BYTES:
                continue
            self._writes[key] = now + self._window_seconds, record
            self._bytes += size
            if now - self._assigned_at < self._window_seconds and len(self._taken_over) < self._max_taken_over:
                self._taken_over.add(key)

    @property
    def is_due(self) -> bool:
        """Whether it is time to check a write."""
        return bool(self._writes) and self._clock() >= next(iter(self._writes.values()))[0]

    def pop_due(self, most: int = AT_ONCE) -> list[RecentWrite]:
        """The next writes to check, once; empty if it is not time for any."""
        found: list[RecentWrite] = []
        while self.is_due and len(found) < most:
            key, (_, record) = next(iter(self._writes.items()))
            del self._writes[key]
            self._bytes -= len(record.value or b"")
            found.append(RecentWrite(record, key in self._taken_over))
            self._taken_over.discard(key)
        return found

    def put_back(self, writes: Sequence[RecentWrite]) -> None:
        """Writes that were not checked after all are due again, unless a newer one of their item is remembered."""
        now, later = self._clock(), self._writes
        self._writes = {}
        for write in writes:
            key = write.record.key or b""
            if key not in later:
                self._writes[key] = now, write.record
                self._bytes += len(write.record.value or b"")
                self._taken_over |= {key} if write.is_after_take_over else set()
        self._writes |= later


def was_overwritten(record: SourceRecord, row: ItemRow | None) -> bool:
    """Whether a row is older than `record`, which was written into it."""
    if row is None:
        return True
    if (row.source_partition, row.source_offset) == (record.partition, record.offset):
        return False
    return not row.is_newer(record.partition, record.offset, record.timestamp_ms)


async def recheck(context: IndexContext, writes: Sequence[RecentWrite], guard: Guard) -> int:
    """Index records anew whose rows were overwritten, and announce others again whose announcement may be of another.

    Returns how many were overwritten.
    """
    by_id: dict[str, RecentWrite] = {}
    for write in writes:
        with suppress(BadMessage):  # a key that is no item id has no row
            by_id[read_item_id(write.record.key)] = write
    rows = await context.read_rows(list(by_id), what="take-over.fetch")
    overwritten: dict[str, SourceRecord] = {}
    unclear: list[str] = []
    for item_id, write in by_id.items():
        row = rows.get(item_id)
        if was_overwritten(write.record, row):
            overwritten[item_id] = write.record
        elif write.is_after_take_over or (row is not None and row.source_partition != write.record.partition):
            unclear.append(item_id)
    if overwritten:
        await index_batch(context, list(overwritten.values()), guard)
    if unclear:
        await reannounce(context, unclear, guard)
    if overwritten or unclear:
        log.info("index.looked_again", items=len(by_id), overwritten=len(overwritten), announced=len(unclear))
    return len(overwritten)
