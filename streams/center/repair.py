"""Repair of the center: the newest record of an item goes the way of every write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

from aiokafka import TopicPartition

from schemas.errors import BadMessage
from streams.broker.log_reader import LogReader
from streams.broker.records import SourceRecord, read_item_id
from streams.center.compare import CenterReport, Expected, ExpectedContent, compare, is_ahead
from streams.indexing.context import Guard, IndexContext
from streams.indexing.guarded_writer import GuardedWriter
from streams.indexing.index_batch import index_batch
from streams.indexing.item_changes import read_change
from streams.indexing.reannounce import reannounce
from streams.runtime.delivery import retry_until_available
from streams.stores.vectors.item_index import ItemRow
from streams.stores.vectors.row_scan import RowSource


@dataclass(frozen=True)
class RecordDecoding:
    """How records of `items` are decoded: as the index worker does."""

    max_record_bytes: int
    field_map: Mapping[str, str]
    max_ahead: timedelta

    def expect(self, record: SourceRecord) -> Expected:
        """What the center must hold by a record; not usable if it cannot be decoded."""
        key, item_id = record.key or b"", ""
        try:
            item_id = read_item_id(record.key)
            change = read_change(
                record, max_bytes=self.max_record_bytes, max_ahead=self.max_ahead, field_map=self.field_map
            )
        except BadMessage:
            return Expected(key, item_id, record.partition, record.offset, None, usable=False)
        content = ExpectedContent.of(change.item) if change.item is not None else None
        return Expected(key, item_id, record.partition, record.offset, content)


def source_of(row: ItemRow) -> RowSource:
    """The record of `items` that a row comes from."""
    return RowSource(row.item_id, row.source_partition, row.source_offset)


class LogTail:
    """The records of a partition since its end was noted."""

    def __init__(self, reader: LogReader, partition: TopicPartition, start: int) -> None:
        self._reader = reader
        self._partition = partition
        self._next = start
        self._newest: dict[bytes, int] = {}

    async def catch_up(self) -> None:
        """Read on to the end as of now."""
        end = await self._reader.end(self._partition)
        async for record in self._reader.read(self._partition, self._next, end):
            if record.key is not None:
                self._newest[record.key] = record.offset
        self._next = max(self._next, end)

    def newest(self, key: bytes) -> int | None:
        """Offset of the newest record of a key; None if there is none since the end was noted."""
        return self._newest.get(key)

    async def record(self, offset: int) -> SourceRecord | None:
        """The record at an offset; None if it was compacted away, by a newer one."""
        found = await self._reader.one(self._partition, offset)
        return None if found is None else SourceRecord.of(found, "items")


@dataclass
class Repairer:
    """Collects faults of one partition and repairs them through the index path."""

    context: IndexContext
    guard: Guard
    decoding: RecordDecoding
    is_current: Callable[[str], bool]
    """Whether an encoder version is the one whose vectors the center holds."""
    _faults: dict[bytes, Expected | RowSource] = field(default_factory=dict)

    def add(self, key: bytes, fault: Expected | RowSource) -> bool:
        """Add the newest record of an item, or a row without one. True if there are enough for a batch."""
        self._faults[key] = fault
        return len(self._faults) >= self.context.config.batch_max_items

    async def repair(self, tail: LogTail, report: CenterReport) -> None:
        """Repair what was added, then count what that left.

        After each write the end of the log is read again, and newer records of these items are written as well, until
        there are none.
        """
        faults, self._faults = self._faults, {}
        written: dict[bytes, Expected | RowSource] = {}
        while True:
            await tail.catch_up()
            for key, fault in list(faults.items()):
                newer = tail.newest(key)
                if newer is None or (isinstance(fault, Expected) and newer <= fault.offset):
                    continue
                if (record := await tail.record(newer)) is not None:
                    faults[key] = self.decoding.expect(record)
            todo = {key: fault for key, fault in faults.items() if written.get(key) is not fault}
            if not todo:
                break
            records = [await tail.record(fault.offset) for fault in todo.values() if isinstance(fault, Expected)]
            await self._remove(await self._rows_ahead([one for one in todo.values() if isinstance(one, Expected)]))
            if present := [record for record in records if record is not None]:
                await index_batch(self.context, present, self.guard)
            await self._remove([fault for fault in todo.values() if isinstance(fault, RowSource)])
            written |= todo
        await self._count(list(faults.values()), report)

    async def reannounce(self, item_ids: Sequence[str]) -> None:
        """Announce what the center holds of these items now."""
        await reannounce(self.context, item_ids, self.guard)

    async def _remove(self, sources: Sequence[RowSource]) -> None:
        """Delete rows that no record asks for, if they still are those that were judged."""
        if not sources:
            return
        async with self.context.writing:
            rows = await self._read_rows(sources)
            same = [one.item_id for one in sources if one.item_id in rows and source_of(rows[one.item_id]) == one]
            if same:
                await retry_until_available(
                    partial(self._delete, same), what="center.delete", patience=self.context.patience
                )

    async def _rows_ahead(self, faults: Sequence[Expected]) -> list[RowSource]:
        """Rows from beyond the newest record of their item, as of an aborted transaction: the index path keeps them."""
        rows = await self._read_rows(faults)
        expected = [(fault, rows[fault.item_id]) for fault in faults if fault.item_id in rows]
        return [source_of(row) for fault, row in expected if is_ahead(row, fault.partition, fault.offset)]

    async def _delete(self, item_ids: Sequence[str]) -> None:
        await GuardedWriter(self.context, self.guard).delete_once(item_ids)
        await self.context.outbox.announce([], item_ids)

    async def _count(self, faults: Sequence[Expected | RowSource], report: CenterReport) -> None:
        rows = await self._read_rows(faults)
        for fault in faults:
            row = rows.get(fault.item_id)
            if isinstance(fault, RowSource):
                is_left = row is not None and source_of(row) == fault
            else:
                is_left = fault.usable and compare(fault, row, is_current=self.is_current) is not None
            report.left += is_left
            report.mended += not is_left

    async def _read_rows(self, faults: Sequence[Expected | RowSource]) -> dict[str, ItemRow]:
        return await self.context.read_rows([fault.item_id for fault in faults], what="center.fetch")
