"""Reading a piece of a topic once, from here to there, without a group and without leaving a trace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from schemas.errors import BrokerUnavailable
from streams.broker.clients import BrokerConfig, broker_errors, make_consumer
from streams.broker.cluster import describe_topics
from streams.broker.topics import TopicName, TopicsConfig

_MAX_RECORDS = 1_000
_POLL_MS = 500
_TRIES = 10
_TRY_EVERY_SECONDS = 0.5


class LogReader:
    """Spans of partitions, one at a time. Use it as an asynchronous context manager.

    `isolation` says whether records of open transactions count, and so where a partition ends.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        topics: TopicsConfig,
        *,
        isolation: Literal["read_committed", "read_uncommitted"] = "read_committed",
    ) -> None:
        self._broker = broker
        self._topics = topics
        self._consumer: AIOKafkaConsumer = make_consumer(broker, isolation_level=isolation)
        self._admin = AIOKafkaAdminClient(**broker.client_options())
        self._partitions: dict[TopicName, list[TopicPartition]] = {}

    async def __aenter__(self) -> Self:
        with broker_errors(self._broker):
            try:
                await self._admin.start()
                await self._consumer.start()
                await asyncio.sleep(0)  # a consumer that is stopped before its tasks have begun raises in stopping
            except BaseException:
                await self._close()
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        await self._consumer.stop()
        await self._admin.close()

    async def partitions(self, name: TopicName) -> list[TopicPartition]:
        """The partitions of a topic; the cluster is asked once. Raises as `describe_topics` does."""
        if name not in self._partitions:
            found = await asyncio.to_thread(describe_topics, self._broker, self._topics, [name])
            self._partitions[name] = found.topic_partitions(self._topics, name)
        return self._partitions[name]

    async def bounds(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, tuple[int, int]]:
        """First offset, and the one after the last, of each partition as of now."""
        with broker_errors(self._broker):
            beginnings = await self._consumer.beginning_offsets(partitions)
            ends = await self._consumer.end_offsets(partitions)
        return {one: (beginnings[one], ends[one]) for one in partitions}

    async def end(self, partition: TopicPartition) -> int:
        """The offset after the last record, as of now."""
        return (await self.bounds([partition]))[partition][1]

    async def first_since(
        self, partitions: Sequence[TopicPartition], moment: datetime
    ) -> dict[TopicPartition, int | None]:
        """The first offset of each partition whose record was produced at `moment` or later; None if there is none."""
        asked = dict.fromkeys(partitions, round(moment.timestamp() * 1000))
        with broker_errors(self._broker):
            found = await self._consumer.offsets_for_times(asked)
        return {one: found[one].offset if found.get(one) is not None else None for one in partitions}

    async def committed(self, group_role: str) -> Mapping[TopicPartition, int]:
        """What the group of a role (`index`, `record`, `train`) has committed.

        Asks again a few times: right after the start not every node is known and ready yet.
        """
        group = self._topics.group(group_role)
        for tries_left in reversed(range(_TRIES)):
            try:
                with broker_errors(self._broker):
                    found = await self._admin.list_consumer_group_offsets(group)
                break
            except BrokerUnavailable:
                if not tries_left:
                    raise
                await asyncio.sleep(_TRY_EVERY_SECONDS)
        return {partition: held.offset for partition, held in found.items() if held.offset >= 0}

    async def read(self, partition: TopicPartition, start: int, end: int) -> AsyncIterator[Any]:
        """Records from `start` to before `end`, in order."""
        if start >= end:
            return
        with broker_errors(self._broker):
            self._consumer.assign([partition])
            self._consumer.seek(partition, start)
            # the position also moves over transaction markers and compacted records, which no batch shows
            while await self._consumer.position(partition) < end:
                batches = await self._consumer.getmany(partition, timeout_ms=_POLL_MS, max_records=_MAX_RECORDS)
                for record in batches.get(partition, ()):
                    if record.offset >= end:
                        return
                    yield record

    async def read_topic(self, name: TopicName) -> AsyncIterator[Any]:
        """Every record of a topic as it stands now, partition by partition in order."""
        for partition, (start, end) in (await self.bounds(await self.partitions(name))).items():
            async for record in self.read(partition, start, end):
                yield record

    async def one(self, partition: TopicPartition, offset: int) -> Any | None:
        """The record at an offset; None if it is no longer there."""
        async for record in self.read(partition, offset, offset + 1):
            return record
        return None


async def read_beginnings(broker: BrokerConfig, topics: TopicsConfig, name: TopicName) -> dict[int, int]:
    """Offset of the oldest record that each partition may still hold. Raises as `describe_topics` does."""
    async with LogReader(broker, topics) as reader:
        bounds = await reader.bounds(await reader.partitions(name))
    return {partition.partition: beginning for partition, (beginning, _) in bounds.items()}


async def read_ends(broker: BrokerConfig, topics: TopicsConfig, name: TopicName) -> dict[int, int]:
    """Offset after the last record of each partition, open transactions included. Raises as `describe_topics` does."""
    async with LogReader(broker, topics, isolation="read_uncommitted") as reader:
        bounds = await reader.bounds(await reader.partitions(name))
    return {partition.partition: end for partition, (_, end) in bounds.items()}
