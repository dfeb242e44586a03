"""Comparing the last announcement of each item with the center, and telling again what was not so.

Whoever follows `embeddings` believes its last word. A worker that was stopped between asking whether it may announce
and the broker's taking it in announces when it goes on, perhaps after its successor: then the last word is of older
content, or of an item that is gone.

A live worker announces a moment after it wrote, so what differs is looked at once more later.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition
from pydantic import ValidationError

from schemas.items import ItemEmbedding, SourceOffset, parse_embedding_key
from streams.broker.log_reader import LogReader
from streams.center.compare import CenterReport, Finding, KeyedOffsets, compare_announcement
from streams.stores.vectors.item_index import ItemRow

_COMPARED_AT_ONCE = 500
_TOLD_EVERY = 200


@dataclass(frozen=True, slots=True)
class _Announced:
    key: bytes
    item_id: str
    partition: int
    offset: int
    source: SourceOffset | None
    """None: announced as gone."""


@dataclass
class AnnouncementCheck:
    """One comparison of `embeddings` with the center."""

    reader: LogReader
    fetch: Callable[[list[str]], Awaitable[Mapping[str, ItemRow]]]
    """Rows by item id, pending ones included."""
    is_current: Callable[[str], bool]
    settle: Callable[[], Awaitable[None]]
    """Waits until a live worker has announced what it had written."""
    reannounce: Callable[[Sequence[str]], Awaitable[None]] | None
    """Announces what the center holds of these items now; None: nothing is mended."""
    on_progress: Callable[[str, int, int], None]

    async def run(self, report: CenterReport, *, but: Collection[str]) -> None:
        """Compare, and add to the report. Items `but` are known to be at fault already, or have just been mended."""
        bounds = await self.reader.bounds(await self.reader.partitions("embeddings"))
        total, passed = 2 * sum(end - start for start, end in bounds.values()), 0
        for partition, (start, end) in bounds.items():
            newest = KeyedOffsets()
            async for record in self.reader.read(partition, start, end):
                newest.add(record.key or b"", record.offset, deleted=record.value is None)
                self._tell("reading announcements", passed + record.offset - start, total)
            newest.settle()
            differing: list[_Announced] = []
            batch: list[_Announced] = []
            async for record in self.reader.read(partition, start, end):
                self._tell("comparing announcements", passed + end - 2 * start + record.offset, total)
                if not newest.is_newest(record.key or b"", record.offset):
                    continue
                announced = self._announced(record)
                if announced is not None and announced.item_id not in but:
                    batch.append(announced)
                if len(batch) >= _COMPARED_AT_ONCE:
                    differing += await self._differing(batch)
                    batch = []
            differing += await self._differing(batch)
            await self._judge(differing, partition, end, report)
            passed += 2 * (end - start)

    def _tell(self, what: str, done: int, total: int) -> None:
        if done % _TOLD_EVERY == 0:
            self.on_progress(what, done, total)

    def _announced(self, record: Any) -> _Announced | None:
        """What a record announces; None if it is of another encoder's generation, or of nobody."""
        try:
            version, item_id = parse_embedding_key(record.key or b"")
        except ValueError:
            return None
        if not self.is_current(version):
            return None
        source = None
        if record.value is not None:
            try:
                source = ItemEmbedding.model_validate_json(record.value).source
            except ValidationError:
                source = SourceOffset(partition=0, offset=0)  # nobody can read it: as good as one of long ago
        return _Announced(record.key, item_id, record.partition, record.offset, source)

    async def _differing(self, batch: list[_Announced]) -> list[_Announced]:
        if not batch:
            return []
        rows = await self.fetch([one.item_id for one in batch])
        return [one for one in batch if _compared(one, rows) is not None]

    async def _judge(
        self, differing: list[_Announced], partition: TopicPartition, end: int, report: CenterReport
    ) -> None:
        """Look at what differed once more, when live workers have had their say."""
        if not differing:
            return
        await self.settle()
        said_since: set[bytes] = set()
        async for record in self.reader.read(partition, end, await self.reader.end(partition)):
            said_since.add(record.key or b"")
        wrong: list[str] = []
        for start in range(0, len(differing), _COMPARED_AT_ONCE):
            batch = differing[start : start + _COMPARED_AT_ONCE]
            rows = await self.fetch([one.item_id for one in batch])
            for one in batch:
                if one.key in said_since:
                    report.changed_meanwhile += 1
                elif (finding := _compared(one, rows)) is not None:
                    report.add(finding)
                    wrong.append(one.item_id)
        if self.reannounce is not None:
            for start in range(0, len(wrong), _COMPARED_AT_ONCE):
                await self.reannounce(wrong[start : start + _COMPARED_AT_ONCE])
            report.mended += len(wrong)


def _compared(announced: _Announced, rows: Mapping[str, ItemRow]) -> Finding | None:
    row = rows.get(announced.item_id)
    return compare_announcement(announced.item_id, announced.partition, announced.offset, announced.source, row)
