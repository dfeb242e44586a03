"""A `LogReader` over records in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from aiokafka import TopicPartition

from streams.broker.topics import TopicName
from tests.factories.fake_consumer import FakeRecord


class MemoryLog:
    """Records per topic and partition; as a factory (`monkeypatch.setattr(module, "LogReader", log)`) it gives itself.

    `first` is the first offset that is left of a partition; `passed` are the places that were read.
    """

    def __init__(self, **topics: Sequence[Sequence[FakeRecord]]) -> None:
        self.topics: dict[str, list[list[FakeRecord]]] = {
            name.replace("_", "-"): [list(records) for records in partitions] for name, partitions in topics.items()
        }
        self.first: dict[TopicPartition, int] = {}
        self.passed: list[tuple[str, int, int]] = []
        self.groups: dict[str, dict[TopicPartition, int]] = {}

    def __call__(self, *_: Any, **more: Any) -> MemoryLog:
        return self

    async def __aenter__(self) -> MemoryLog:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def records(self, partition: TopicPartition) -> list[FakeRecord]:
        return self.topics[partition.topic.removeprefix("mim.")][partition.partition]

    async def partitions(self, name: TopicName) -> list[TopicPartition]:
        return [TopicPartition(f"mim.{name}", number) for number in range(len(self.topics[name]))]

    async def bounds(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, tuple[int, int]]:
        return {one: (self.first.get(one, 0), await self.end(one)) for one in partitions}

    async def end(self, partition: TopicPartition) -> int:
        records = self.records(partition)
        return records[-1].offset + 1 if records else self.first.get(partition, 0)

    async def committed(self, group_role: str) -> Mapping[TopicPartition, int]:
        return self.groups.get(group_role, {})

    async def first_since(self, partitions: Sequence[TopicPartition], moment: Any) -> dict[TopicPartition, int | None]:
        ms = moment.timestamp() * 1000
        return {one: next((r.offset for r in self.records(one) if r.timestamp >= ms), None) for one in partitions}

    async def read(self, partition: TopicPartition, start: int, end: int) -> AsyncIterator[FakeRecord]:
        assert start >= self.first.get(partition, 0), f"{start} is gone"
        assert end <= max(start, await self.end(partition)), f"{end} is not there yet"
        for record in list(self.records(partition)):
            if start <= record.offset < end:
                self.passed.append((partition.topic.removeprefix("mim."), partition.partition, record.offset))
                yield record

    async def one(self, partition: TopicPartition, offset: int) -> FakeRecord | None:
        return next((record for record in self.records(partition) if record.offset == offset), None)
