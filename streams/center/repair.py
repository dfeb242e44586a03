"""Repair of the center: the newest record of an item goes the way of every write."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial

from aiokafka import TopicPartition

from schemas.errors import BadMessage
from schemas.field_maps import FieldMap
from streams.broker.log_reader import LogReader
from streams.broker.records import SourceRecord, read_item_id
from streams.center.compare import CenterReport, Expected, ExpectedContent, compare
from streams.indexing.context import Guard, IndexContext
from streams.indexing.guarded_writer import GuardedWriter
from streams.indexing.index_batch import index_batch
from streams.indexing.item_changes import read_change
from streams.indexing.reannounce import reannounce
from streams.runtime.delivery import retry_until_available
from streams.stores.vectors.item_index import ItemRow
from streams.stores.vectors.row_scan import RowSource, source_of


@dataclass(frozen=True)
class RecordDecoding:
    """How records of `items` are decoded: as the index worker does."""

    max_record_bytes: int
    field_map: FieldMap
    max_ahead: timedelta
    outcomes: Collection[str] = ()
    """Attributes that are left out."""

    def expect(self, record: SourceRecord, time_ms: int) -> Expected:
        """What the center must hold by a record; not usable if it cannot be decoded.

        `time_ms` is the newest timestamp of the item's records of its partition.
        """
        key, item_id = record.key or b"", ""
        place = record.partition, record.offset, time_ms
        try:
            item_id = read_item_id(record.key)
            change = read_change(
                record, max_bytes=self.max_record_bytes, max_ahead=self.max_ahead, field_map=self.field_map
            )
        except BadMessage:
            return Expected(key, item_id, *place, None, usable=False)
        content = ExpectedContent.of(change.item, self.outcomes) if change.item is not None else None
        return Expected(key, item_id, *place, content)


class LogTail:
    """The records of `items` since the ends of its partitions were noted."""

    def __init__(self, reader: LogReader, ends: Mapping[TopicPartition, int]) -> None:
        self._reader = reader
        self._next = dict(ends)
        self._newest: dict[bytes, dict[int, tuple[int, int]]] = {}
        """By key and partition: newest timestamp, and offset of the newest record."""

    async def catch_up(self) -> None:
        """Read on to the ends as of now."""
        for partition, (_, end) in (await self._reader.bounds(list(self._next))).items():
            async for record in self._reader.read(partition, self._next[partition], end):
                self.note(record.key, partition.partition, record.offset, record.timestamp)
            self._next[partition] = max(self._next[partition], end)

    def note(self, key: bytes | None, partition: int, offset: int, time_ms: int) -> None:
        """Note a record, the next of its partition."""
        if key is not None:
            its = self._newest.setdefault(key, {})
            its[partition] = max(its.get(partition, (time_ms, 0))[0], time_ms), offset

    def has_key(self, key: bytes) -> bool:
        """Whether there is a record of a key since the ends were noted."""
        return key in self._newest

    def newest(self, key: bytes, fault: Expected | RowSource) -> tuple[int, int, int] | None:
        """The newest record of a key that is newer than `fault`: (timestamp, partition, offset). None if there is none.

        A row without a record is older than any.
        """
        places = []
        for partition, (time_ms, offset) in self._newest.get(key, {}).items():
            if isinstance(fault, Expected) and fault.partition == partition:
                time_ms = max(time_ms, fault.time_ms)
            places.append((time_ms, partition, offset))
        newest = max(places, default=None)
        if isinstance(fault, Expected) and newest is not None:
            return newest if newest > (fault.time_ms, fault.partition, fault.offset) else None
        return newest

    async def record(self, partition: int, offset: int) -> SourceRecord | None:
        """The record at a place; None if it was compacted away, by a newer one."""
        at = next(one for one in self._next if one.partition == partition)
        found = await self._reader.one(at, offset)
        return None if found is None else SourceRecord.of(found, "items")


@dataclass
class Repairer:
    """Collects faults and repairs them through the index path."""

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
                if (newer := tail.newest(key, fault)) is None:
                    continue
                time_ms, *place = newer
                if (record := await tail.record(*place)) is not None:
                    faults[key] = self.decoding.expect(record, time_ms)
            todo = {key: fault for key, fault in faults.items() if written.get(key) is not fault}
            if not todo:
                break
            expected = [fault for fault in todo.values() if isinstance(fault, Expected)]
            records = [await self._record(tail, fault) for fault in expected]
            await self._remove(await self._rows_ahead(expected))
            if present := [record for record in records if record is not None]:
                await index_batch(self.context, present, self.guard)
            await self._remove([fault for fault in todo.values() if isinstance(fault, RowSource)])
            written |= todo
        await self._count(list(faults.values()), report)

    async def _record(self, tail: LogTail, fault: Expected) -> SourceRecord | None:
        """The record of a fault, at the time that orders it among those of other partitions."""
        record = await tail.record(fault.partition, fault.offset)
        return None if record is None else replace(record, timestamp_ms=fault.time_ms)

    async def forget(self, marks: Sequence[RowSource], tail: LogTail) -> None:
        """Remove marks of deleted items of which the topic holds no record, nor got one meanwhile."""
        await tail.catch_up()
        await self._remove([mark for mark in marks if not tail.has_key(mark.item_id.encode())])

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
        """Rows that claim to be newer than the newest record, as of an aborted one: the index path keeps them."""
        rows = await self._read_rows(faults)
        expected = [(fault, rows[fault.item_id]) for fault in faults if fault.item_id in rows]
        return [source_of(row) for fault, row in expected if fault.is_behind(row)]

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
