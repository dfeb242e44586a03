"""Comparing `items` with the center, and repairing it, beside index workers that go on working.

The log is the truth and is never written to. It is read twice: first for the newest record of each key, in whatever
partition, then to compare those with their rows. Records that no worker has acknowledged yet are not judged, and
neither are items with a newer record since the ends of the partitions were noted.

Repair takes the index path: the newest record of an item goes through `index_batch`, which compares source offsets
before it writes. Between that comparison and the write a live worker may write something newer, which is then
overwritten. Hence the end of the log is read again after every write; newer records go through the index path as well,
until there are none since the last write. Whatever was in the log by then is in the center; whatever comes later is
written by the worker later. A repair that dies in between leaves a fault that the next run finds. In the end the last
announcement of each item is compared with its row (see `verify_announcements`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta

from aiokafka import TopicPartition
from pydantic import ValidationError

from schemas.items import ImageRetry
from schemas.letters import DeadLetter
from streams.broker.clients import BrokerConfig
from streams.broker.log_reader import LogReader
from streams.broker.partitioning import home_partition
from streams.broker.records import SourceRecord
from streams.broker.topics import TopicsConfig
from streams.center.compare import (
    CenterReport,
    Expected,
    Finding,
    KeyedOffsets,
    Overdue,
    Position,
    compare,
    overdue,
    waits_in_vain,
)
from streams.center.newest_records import NewestRecords, OnProgress
from streams.center.repair import LogTail, RecordDecoding, Repairer
from streams.center.verify_announcements import COMPARED_AT_ONCE, AnnouncementCheck, FetchRows
from streams.runtime.delivery import Patience, retry_until_available
from streams.stores.vectors.row_scan import RowScan, RowSource, source_of

_ANNOUNCED_SECONDS = 2.0
"""In so much time a live worker has announced what it wrote."""


class CenterVerification:
    """One comparison of the topic with the center.

    It needs two readers: the end of a partition is read while the partition itself is.
    """

    def __init__(
        self,
        reader: LogReader,
        tail_reader: LogReader,
        fetch: FetchRows,
        scan: RowScan,
        decoding: RecordDecoding,
        *,
        is_current: Callable[[str], bool],
        retries_since: datetime,
        repairer: Repairer | None,
        on_progress: OnProgress,
    ) -> None:
        self._reader = reader
        self._tail_reader = tail_reader
        self._fetch = fetch
        self._scan = scan
        self._decoding = decoding
        self._is_current = is_current
        self._retries_since_ms = retries_since.timestamp() * 1000
        """A title whose picture is missing is judged only from here on: what became of older ones is forgotten."""
        self._repairer = repairer
        self._on_progress = on_progress
        self._report = CenterReport(repaired=repairer is not None)
        self._faulty_items: set[str] = set()
        self._refused: dict[int, set[int]] = {}

    async def run(self) -> CenterReport:
        """Compare everything; repair, if there is a repairer. Raises `Unavailable` while a part is away."""
        started = time.monotonic()
        await self._read_letters()
        partitions = await self._reader.partitions("items")
        # before any row is read: what is below it was written
        committed = await retry_until_available(
            lambda: self._reader.committed("index"), what="center.positions", patience=Patience()
        )
        awaited = await self._read_retries(committed)  # after the positions: what those acknowledge has sent its retry
        bounds = await self._reader.bounds(partitions)
        records = NewestRecords(self._reader, bounds, self._on_progress, ("reading", "comparing"))
        newest = await records.find()
        self._report.records, self._report.items = records.records, newest.count_live()
        self._report.split = newest.count_split()
        tail = LogTail(self._tail_reader, {partition: end for partition, (_, end) in bounds.items()})
        await self._compare_records(records, newest, committed, awaited, tail)
        # also those from beyond the ends: of newer records, or of a log before this one
        unknown = await self._scan.choose(lambda row: not newest.has_key(row.item_id.encode()))
        await self._judge_rows(unknown, tail)
        await AnnouncementCheck(
            self._reader,
            fetch=self._fetch,
            is_current=self._is_current,
            settle=lambda: asyncio.sleep(_ANNOUNCED_SECONDS),
            reannounce=None if self._repairer is None else self._repairer.reannounce,
            on_progress=self._on_progress,
        ).run(self._report, but=self._faulty_items)
        self._report.seconds = time.monotonic() - started
        return self._report

    async def _read_letters(self) -> None:
        """Which records of `items` were refused, or wait for a picture that was given up."""
        bounds = await self._reader.bounds(await self._reader.partitions("dead-letters"))
        for partition, (start, end) in bounds.items():
            async for record in self._reader.read(partition, start, end):
                try:
                    letter = DeadLetter.from_record(record.value, record.headers)
                    if letter.topic == "items":
                        self._refused.setdefault(letter.partition, set()).add(letter.offset)
                    elif letter.topic == "items-retry":
                        source = ImageRetry.model_validate_json(letter.value or b"").source
                        self._refused.setdefault(source.partition, set()).add(source.offset)
                except (KeyError, ValueError, ValidationError):
                    continue  # what became of a letter, or no letter of this pipeline

    async def _read_retries(self, committed: Mapping[TopicPartition, int]) -> set[tuple[int, int]]:
        """The records of `items` whose pictures are still to be fetched."""
        awaited = set()
        for partition, (start, end) in (
            await self._reader.bounds(await self._reader.partitions("items-retry"))
        ).items():
            async for record in self._reader.read(partition, max(start, committed.get(partition, 0)), end):
                with suppress(ValidationError):
                    source = ImageRetry.model_validate_json(record.value or b"").source
                    awaited.add((source.partition, source.offset))
        return awaited

    async def _compare_records(
        self,
        records: NewestRecords,
        newest: KeyedOffsets,
        committed: Mapping[TopicPartition, int],
        awaited: Container[tuple[int, int]],
        tail: LogTail,
    ) -> None:
        batch: list[Expected] = []
        async for record, time_ms in records.read(newest):
            self._report.foreign += home_partition(record.key, len(records.bounds)) != record.partition
            if record.offset >= committed.get(TopicPartition(record.topic, record.partition), 0):
                self._report.waiting += 1
                continue
            batch.append(self._decoding.expect(SourceRecord.of(record, "items"), time_ms))
            if len(batch) >= COMPARED_AT_ONCE:
                await self._judge(batch, awaited, tail)
                batch = []
        await self._judge(batch, awaited, tail)

    async def _judge(self, batch: Sequence[Expected], awaited: Container[tuple[int, int]], tail: LogTail) -> None:
        rows = await self._fetch([one.item_id for one in batch if one.usable])
        await tail.catch_up()  # after the rows: records beyond our end that a worker wrote into them are seen here
        for one in batch:
            if tail.has_key(one.key):
                self._report.changed_meanwhile += 1
                continue
            if not one.usable:
                self._report.unusable += 1
                continue
            row = rows.get(one.item_id)
            finding = compare(one, row, is_current=self._is_current)
            if finding is None and row is not None and (row.is_pending or one.time_ms >= self._retries_since_ms):
                finding = waits_in_vain(one, row, awaited)
            if finding is None:
                continue
            if one.offset in self._refused.get(one.partition, ()):
                self._report.unusable += 1
                continue
            await self._add(finding, one.key, one, tail)
        await self._repair(tail)

    async def _judge_rows(self, unknown: Sequence[RowSource], tail: LogTail) -> None:
        """Rows of which the topic holds no record any more: their delete has been compacted away."""
        marks = [row for row in unknown if row.is_deleted]
        unknown = [row for row in unknown if not row.is_deleted]
        if self._repairer is not None:
            for start in range(0, len(marks), COMPARED_AT_ONCE):
                await self._repairer.forget(marks[start : start + COMPARED_AT_ONCE], tail)
        for start in range(0, len(unknown), COMPARED_AT_ONCE):
            batch = unknown[start : start + COMPARED_AT_ONCE]
            rows = await self._fetch([row.item_id for row in batch])
            await tail.catch_up()
            for row in batch:
                held, key = rows.get(row.item_id), row.item_id.encode()
                if held is None or source_of(held) != row or tail.has_key(key):
                    self._report.changed_meanwhile += 1
                    continue
                detail = f"there from {row.partition}/{row.offset}, yet the topic holds no record of it"
                await self._add(Finding("resurrected", row.item_id, row.partition, None, detail), key, row, tail)
            await self._repair(tail)

    async def _add(self, finding: Finding, key: bytes, fault: Expected | RowSource, tail: LogTail) -> None:
        self._report.add(finding)
        self._faulty_items.add(finding.item_id)
        if self._repairer is not None and self._repairer.add(key, fault):
            await self._repairer.repair(tail, self._report)

    async def _repair(self, tail: LogTail) -> None:
        if self._repairer is not None:
            await self._repairer.repair(tail, self._report)


async def find_overdue(
    broker: BrokerConfig, topics: TopicsConfig, *, now: datetime, center_is_empty: bool, center_is_filled: bool
) -> list[Overdue]:
    """Partitions of `items` that have to be compared with the center before the index workers read on."""
    async with LogReader(broker, topics) as reader:
        partitions = await reader.partitions("items")
        committed = await reader.committed("index")
        bounds = await reader.bounds(partitions)
        recent = await reader.first_since(partitions, now - timedelta(hours=topics.tombstone_retention_hours))
        for one in partitions:
            (start, end), at = bounds[one], committed.get(one)
            if at is not None and start <= at < end and not await _has_record(reader, one, at, end):
                bounds[one] = (start, at)  # only markers of transactions follow, which no group acknowledges
    positions = [Position(one.partition, committed.get(one), *bounds[one], recent[one]) for one in partitions]
    return overdue(positions, center_is_empty=center_is_empty, center_is_filled=center_is_filled)


async def _has_record(reader: LogReader, partition: TopicPartition, start: int, end: int) -> bool:
    async for _ in reader.read(partition, start, end):
        return True
    return False
