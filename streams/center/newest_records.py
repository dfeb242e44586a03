"""Reading a topic twice: for the newest record of each key, then for those records themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition

from streams.broker.log_reader import LogReader
from streams.center.compare import KeyedOffsets

_PROGRESS_EVERY = 200

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, and how many of how many offsets have been passed."""


@dataclass
class NewestRecords:
    """The newest record of each key of a topic, within bounds. Records without key are left out."""

    reader: LogReader
    bounds: Mapping[TopicPartition, tuple[int, int]]
    on_progress: OnProgress
    passes: tuple[str, str]
    """What the two readings are called for `on_progress`."""
    records: int = 0
    """Records of the first readings so far, those without key included."""
    _passed: int = 0

    async def find(self) -> KeyedOffsets:
        """First reading: the place of the newest record of each key."""
        newest = KeyedOffsets()
        for partition in self.bounds:
            async for record in self._read(partition, self.passes[0]):
                self.records += 1
                if record.key is not None:
                    newest.add(record.key, record.offset, record.timestamp, deleted=record.value is None)
            newest.end_partition(partition.partition)
        return newest

    async def read(self, newest: KeyedOffsets) -> AsyncIterator[tuple[Any, int]]:
        """Second reading: the newest records, partition by partition in order, each with its key's newest timestamp."""
        for partition in self.bounds:
            async for record in self._read(partition, self.passes[1]):
                if record.key is None:
                    continue
                time_ms = newest.time_if_newest(record.key, record.partition, record.offset)
                if time_ms is not None:
                    yield record, time_ms

    async def _read(self, partition: TopicPartition, what: str) -> AsyncIterator[Any]:
        start, end = self.bounds[partition]
        total = 2 * sum(end - start for start, end in self.bounds.values())
        async for record in self.reader.read(partition, start, end):
            done = self._passed + record.offset - start
            if done % _PROGRESS_EVERY == 0:
                self.on_progress(what, done, total)
            yield record
        self._passed += end - start
