"""Reading partitions twice: for the newest record of each key, then for those records themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from aiokafka import TopicPartition

from streams.broker.log_reader import LogReader
from streams.center.compare import KeyedOffsets

_PROGRESS_EVERY = 200

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, and how many of how many offsets have been passed."""


class NewestRecords:
    """The newest record of each key of some partitions, within the `bounds` of each. Records without key are left out.

    `passes` names the two readings for `on_progress`.
    """

    def __init__(
        self,
        reader: LogReader,
        bounds: Mapping[TopicPartition, tuple[int, int]],
        on_progress: OnProgress,
        *,
        passes: tuple[str, str],
    ) -> None:
        self._reader = reader
        self._bounds = bounds
        self._on_progress = on_progress
        self._passes = passes
        self._passed = 0
        self._total = 2 * sum(end - start for start, end in bounds.values())
        self.records = 0
        """Records of the first readings so far, those without key included."""

    async def find(self, partition: TopicPartition) -> KeyedOffsets:
        """First reading: the offset of the newest record of each key."""
        newest = KeyedOffsets()
        async for record in self._read(partition, self._passes[0]):
            self.records += 1
            if record.key is not None:
                newest.add(record.key, record.offset, deleted=record.value is None)
        newest.settle()
        return newest

    async def read(self, partition: TopicPartition, newest: KeyedOffsets) -> AsyncIterator[Any]:
        """Second reading: the newest records, in order."""
        async for record in self._read(partition, self._passes[1]):
            if record.key is not None and newest.is_newest(record.key, record.offset):
                yield record

    async def _read(self, partition: TopicPartition, what: str) -> AsyncIterator[Any]:
        start, end = self._bounds[partition]
        async for record in self._reader.read(partition, start, end):
            done = self._passed + record.offset - start
            if done % _PROGRESS_EVERY == 0:
                self._on_progress(what, done, self._total)
            yield record
        self._passed += end - start
