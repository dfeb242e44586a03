"""Repair of the center: the newest record of an item goes the way of every write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

from aiokafka import TopicPartition

from schemas.errors import BadMessage
from streams.broker.log_reader import LogReader
from streams.broker.records import SourceRecord, read_item_id
from streams.center.compare import CenterReport, Expected, ExpectedContent, compare
from streams.indexing.context import Guard, IndexContext
from streams.indexing.index_batch import index_batch
from streams.indexing.item_changes import read_change
from streams.indexing.reannounce import reannounce
from streams.runtime.delivery import retry_until_available
from streams.stores.vectors.item_index import ItemRow
from streams.stores.vectors.row_scan import RowSource


class FetchRows(Protocol):
    """Where rows are read (`ItemIndex.fetch`)."""

    async def fetch(self, item_ids: Sequence[str], *, pending: bool = False) -> dict[str, ItemRow]:
        """Read the rows that are there."""
        ...


@dataclass(frozen=True)
class RecordDecoding:
    """How records of `items` are decoded: as the index worker does."""

    max_record_bytes: int
    field_map: Mapping[str, str]
    max_ahead: timedelta

    def expect(self, record: SourceRecord) -> Expected:
        """What a record asks of the center."""
        key = record.key or b""
        try:
            item_id = read_item_id(record.key)
        except BadMessage:
            return Expected(key, "", record.partition, record.offset, None, usable=False)
        try:
            change = read_change(
                record,
                max_bytes=self.max_record_bytes,
                max_ahead=self.max_ahead,
                field_map=self.field_map,
            )
        except BadMessage:
            return Expected(key, item_id, record.partition, record.offset, None, usable=False)
        content = ExpectedContent.of(change.item) if change.item is not None else None
        return Expected(key, item_id, record.partition, record.offset, content)


def as_source(record: Any) -> SourceRecord:
    """A record of `items` as the index path takes it."""
    return SourceRecord(
        topic="items",
        partition=record.partition,
        offset=record.offset,
        timestamp_ms=record.timestamp,
        key=record.key,
        value=record.value,
        headers=tuple(record.headers),
    )


class LogTail:
    """What was said in a partition since its end was noted."""

    def __init__(self, reader: LogReader, partition: TopicPartition, start: int) -> None:
        self._reader = reader
        self._partition = partition
        self._seen = start
        self._newest: dict[bytes, int] = {}

    async def catch_up(self) -> None:
        """Read on to the end as of now."""
        end = await self._reader.end(self._partition)
        async for record in self._reader.read(self._partition, self._seen, end):
            if record.key is not None:
                self._newest[record.key] = record.offset
        self._seen = max(self._seen, end)

    def newest(self, key: bytes) -> int | None:
        """Offset of the newest record of a key, if something was said of it at all."""
        return self._newest.get(key)

    async def record(self, offset: int) -> SourceRecord | None:
        """The record at an offset; None if it was compacted away, by a newer one."""
        found = await self._reader.one(self._partition, offset)
        return None if found is None else as_source(found)


@dataclass
class Repairer:
    """Mends what was found, through the index path."""

    context: IndexContext
    guard: Guard
    reading: RecordDecoding
    is_current: Callable[[str], bool]
    _wanted: dict[bytes, Expected | RowSource] = field(default_factory=dict)

    def take(self, key: bytes, wanted: Expected | RowSource) -> bool:
        """Note a fault: the newest record of an item, or a row without any. True if there are enough to go on."""
        self._wanted[key] = wanted
        return len(self._wanted) >= self.context.config.batch_max_items

    async def repair(self, tail: LogTail, report: CenterReport) -> None:
        """Mend what was noted, and look whether it helped."""
        wanted, self._wanted = self._wanted, {}
        written: dict[bytes, Expected | RowSource] = {}
        while True:
            await tail.catch_up()
            for key, asked in list(wanted.items()):
                newer = tail.newest(key)
                if newer is None or (isinstance(asked, Expected) and newer <= asked.offset):
                    continue
                if (record := await tail.record(newer)) is not None:
                    wanted[key] = self.reading.expect(record)
            todo = {key: asked for key, asked in wanted.items() if written.get(key) is not asked}
            if not todo:
                break
            records = [await tail.record(asked.offset) for asked in todo.values() if isinstance(asked, Expected)]
            if there := [record for record in records if record is not None]:
                await index_batch(self.context, there, self.guard)
            await self._remove([asked for asked in todo.values() if isinstance(asked, RowSource)])
            written |= todo
        await self._count(wanted, report)

    async def reannounce(self, item_ids: Sequence[str]) -> None:
        """Announce what the center holds of these items now."""
        await reannounce(self.context, item_ids, self.guard)

    async def _remove(self, rows: Sequence[RowSource]) -> None:
        """Delete rows that no record asks for, if they still are those that were judged."""
        if not rows:
            return
        async with self.context.writing:
            patience = self.context.patience
            ids = [row.item_id for row in rows]
            held = await retry_until_available(
                lambda: self.context.index.fetch(ids, pending=True), what="center.fetch", patience=patience
            )
            gone = [row.item_id for row in rows if row.item_id in held and _source(held[row.item_id]) == row]

            async def delete() -> None:
                await self.context.delete(gone, self.guard)
                await self.context.outbox.announce([], gone)

            if gone:
                await retry_until_available(delete, what="center.delete", patience=patience)

    async def _count(self, wanted: Mapping[bytes, Expected | RowSource], report: CenterReport) -> None:
        ids = [asked.item_id for asked in wanted.values()]
        rows = await retry_until_available(
            lambda: self.context.index.fetch(ids, pending=True), what="center.fetch", patience=self.context.patience
        )
        for asked in wanted.values():
            row = rows.get(asked.item_id)
            if isinstance(asked, RowSource):
                is_left = row is not None and _source(row) == asked
            else:
                is_left = asked.usable and compare(asked, row, is_current=self.is_current) is not None
            report.left += is_left
            report.mended += not is_left


def _source(row: ItemRow) -> RowSource:
    return RowSource(row.item_id, row.source_partition, row.source_offset)
