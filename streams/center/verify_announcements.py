"""Comparing the last announcement of each item with the center, and announcing again where they differ.

Readers of `embeddings` believe its last record of an item. A worker that was stopped between its guard and the
broker's accepting its announcement announces when it goes on, perhaps after its successor: then the last record is of
older content, or of an item that is gone.

A live worker announces a moment after it wrote, so differences are compared once more later.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition
from pydantic import ValidationError

from schemas.items import ItemEmbedding, SourceOffset, parse_embedding_key
from streams.broker.log_reader import LogReader
from streams.center.compare import CenterReport, Finding, compare_announcement
from streams.center.newest_records import NewestRecords, OnProgress
from streams.stores.vectors.item_index import ItemRow

COMPARED_AT_ONCE = 500

_UNREADABLE = SourceOffset.model_construct(partition=-1, offset=-1)
"""As good as an announcement of long ago: no row comes from this place."""

FetchRows = Callable[[Sequence[str]], Awaitable[Mapping[str, ItemRow]]]
"""Reads rows by item id, pending ones included."""


@dataclass(frozen=True, slots=True)
class _Announcement:
    """The last record of an item in `embeddings`."""

    key: bytes
    item_id: str
    partition: int
    offset: int
    source: SourceOffset | None
    """None: announced as gone."""

    def compare(self, rows: Mapping[str, ItemRow]) -> Finding | None:
        return compare_announcement(self.item_id, self.partition, self.offset, self.source, rows.get(self.item_id))


@dataclass
class AnnouncementCheck:
    """One comparison of `embeddings` with the center."""

    reader: LogReader
    fetch: FetchRows
    is_current: Callable[[str], bool]
    """Whether an encoder version is the one whose vectors the center holds."""
    settle: Callable[[], Awaitable[None]]
    """Waits until a live worker has announced what it had written."""
    reannounce: Callable[[Sequence[str]], Awaitable[None]] | None
    """Announces what the center holds of these items now; None: nothing is repaired."""
    on_progress: OnProgress

    async def run(self, report: CenterReport, *, but: Collection[str]) -> None:
        """Compare, and add to the report. Items `but` are left out: they are in the report already."""
        bounds = await self.reader.bounds(await self.reader.partitions("embeddings"))
        passes = ("reading announcements", "comparing announcements")
        records = NewestRecords(self.reader, bounds, self.on_progress, passes)
        newest = await records.find()
        differing: list[_Announcement] = []
        batch: list[_Announcement] = []
        async for record, _ in records.read(newest):
            announcement = self._decode(record)
            if announcement is not None and announcement.item_id not in but:
                batch.append(announcement)
            if len(batch) >= COMPARED_AT_ONCE:
                differing += await self._differing(batch)
                batch = []
        differing += await self._differing(batch)
        await self._judge(differing, {partition: end for partition, (_, end) in bounds.items()}, report)

    def _decode(self, record: Any) -> _Announcement | None:
        """What a record announces; None if its key is of another encoder version, or none of ours."""
        try:
            version, item_id = parse_embedding_key(record.key)
        except ValueError:
            return None
        if not self.is_current(version):
            return None
        source = None
        if record.value is not None:
            try:
                source = ItemEmbedding.model_validate_json(record.value).source
            except ValidationError:
                source = _UNREADABLE
        return _Announcement(record.key, item_id, record.partition, record.offset, source)

    async def _differing(self, batch: list[_Announcement]) -> list[_Announcement]:
        if not batch:
            return []
        rows = await self.fetch([one.item_id for one in batch])
        return [one for one in batch if one.compare(rows) is not None]

    async def _judge(
        self, differing: list[_Announcement], ends: Mapping[TopicPartition, int], report: CenterReport
    ) -> None:
        """Compare once more, after live workers had time to announce."""
        if not differing:
            return
        await self.settle()
        announced_since: set[bytes] = set()
        for partition, end in ends.items():
            async for record in self.reader.read(partition, end, await self.reader.end(partition)):
                announced_since.add(record.key or b"")
        stale: list[str] = []
        for start in range(0, len(differing), COMPARED_AT_ONCE):
            batch = differing[start : start + COMPARED_AT_ONCE]
            rows = await self.fetch([one.item_id for one in batch])
            for one in batch:
                if one.key in announced_since:
                    report.changed_meanwhile += 1
                elif (finding := one.compare(rows)) is not None:
                    report.add(finding)
                    stale.append(one.item_id)
        if self.reannounce is not None:
            for start in range(0, len(stale), COMPARED_AT_ONCE):
                await self.reannounce(stale[start : start + COMPARED_AT_ONCE])
            report.mended += len(stale)
