"""A Kafka consumer over records in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition

IN_TIME_MS = 1_767_225_600_000  # 2026-01-01


@dataclass(frozen=True)
class FakeRecord:
    """A record as a client delivers it."""

    partition: int
    offset: int
    key: bytes | None = b"k"
    value: bytes | None = b"v"
    timestamp: int = IN_TIME_MS
    headers: tuple[tuple[str, bytes | None], ...] = ()


class FakeConsumer:
    """Delivers the records of `log` behind its positions, one batch per partition at a time."""

    def __init__(self, log: Mapping[TopicPartition, Sequence[FakeRecord]], *, beginning: int = 0) -> None:
        self.log = log
        self.beginning = beginning
        self.positions: dict[TopicPartition, int] = {}
        self.paused: set[TopicPartition] = set()
        self.commits: dict[TopicPartition, int] = {}
        self.listener: Any = None
        self.stops = 0
        self.stable: dict[TopicPartition, int] = {}
        """Where readable records end, of partitions with an open transaction."""
        self.polled_ms: int | None = IN_TIME_MS
        """When the broker last answered."""
        self.fetch_failure: Exception | None = None
        """Raised by the next `getmany`."""

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self.stops += 1

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        self.positions = dict.fromkeys(partitions, self.beginning)
        self.paused = set()

    def subscribe(self, topics: Sequence[str], listener: Any) -> None:
        self.listener = listener

    async def give(self, *partitions: TopicPartition) -> None:
        """Assign partitions as the group does."""
        await self.listener.on_partitions_revoked(list(self.positions))
        self.assign(partitions)
        await self.listener.on_partitions_assigned(partitions)

    def assignment(self) -> set[TopicPartition]:
        return set(self.positions)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        assert partition in self.positions, f"{partition} is not assigned"
        self.positions[partition] = offset

    def pause(self, partition: TopicPartition) -> None:
        self.paused.add(partition)

    def resume(self, partition: TopicPartition) -> None:
        self.paused.discard(partition)

    async def position(self, partition: TopicPartition) -> int:
        return self.positions[partition]

    async def beginning_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, self.beginning)

    async def offsets_for_times(self, times: Mapping[TopicPartition, int]) -> dict[TopicPartition, FakeRecord | None]:
        """The first record of each partition that is not older; like the client's answer, it has an `offset`."""
        return {
            one: next((record for record in self.log[one] if record.timestamp >= at), None) for one, at in times.items()
        }

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        return {one: self.log[one][-1].offset + 1 if self.log[one] else self.beginning for one in partitions}

    def highwater(self, partition: TopicPartition) -> int | None:
        records = self.log[partition]
        return records[-1].offset + 1 if records else self.beginning

    def last_stable_offset(self, partition: TopicPartition) -> int | None:
        return self.stable.get(partition, self.highwater(partition))

    def last_poll_timestamp(self, partition: TopicPartition) -> int | None:
        return self.polled_ms

    async def committed(self, partition: TopicPartition) -> int | None:
        return self.commits.get(partition)

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        self.commits.update(offsets)

    async def getmany(
        self, *wanted: TopicPartition, timeout_ms: int = 0, max_records: int | None = None
    ) -> dict[TopicPartition, list[FakeRecord]]:
        await asyncio.sleep(0)
        failure, self.fetch_failure = self.fetch_failure, None
        if failure is not None:
            raise failure
        found: dict[TopicPartition, list[FakeRecord]] = {}
        for partition in sorted(set(wanted or self.positions) - self.paused):
            readable = self.stable.get(partition, 1 << 62)
            batch = [r for r in self.log[partition] if self.positions[partition] <= r.offset < readable]
            if batch:
                found[partition] = batch
                self.positions[partition] = batch[-1].offset + 1
        return found
