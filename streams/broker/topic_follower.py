"""Follows all partitions of a topic, in no group: first what is there, then what comes.

Records are handed over with the offset after them and their *source*: a partition of this incarnation of the topic. The
receiver stores that offset, by source, with what it makes of the records. So each record is handled once, and a topic
that was deleted and created again is read from its beginning.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors

from schemas.errors import Misconfigured, Unavailable
from streams.broker.clients import BrokerConfig, broker_errors, make_consumer
from streams.broker.cluster import describe_topics, read_incarnation
from streams.broker.topics import TopicName, TopicsConfig

HandleRecords = Callable[[Sequence[Any], str, int], Awaitable[None]]
"""Called with records of one partition in their order, the source that they were read from, the offset after them."""


class TopicFollower:
    """Reads one topic from given positions on. `handle` may raise `Unavailable`: the records come again."""

    def __init__(self, broker: BrokerConfig, topics: TopicsConfig, name: TopicName, handle: HandleRecords) -> None:
        self._broker = broker
        self._topics = topics
        self._name = name
        self._handle = handle
        self._consumer: Any = None
        self._topic_id = ""
        self._sources: dict[TopicPartition, str] = {}
        self.handled: dict[str, int] = {}
        """The offset after the last record handled of each source, since the last `seek`."""

    async def open(self, positions: Mapping[str, int] | None = None, *, since: datetime | None = None) -> None:
        """Connect, and `seek`.

        Raises `Misconfigured` if the topic does not exist, `BrokerUnavailable`.
        """
        found = await asyncio.to_thread(describe_topics, self._broker, self._topics, [self._name])
        self._topic_id = found.incarnation(self._topics, self._name).topic_id
        partitions = found.topic_partitions(self._topics, self._name)
        self._sources = {partition: f"{self._topic_id}:{partition.partition}" for partition in partitions}
        self._consumer = make_consumer(self._broker)
        with broker_errors(self._broker):
            await self._consumer.start()
        self._consumer.assign(partitions)
        await self.seek(positions or {}, since=since)

    async def close(self) -> None:
        """Disconnect."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await consumer.stop()

    async def is_same_topic(self) -> bool:
        """Whether the topic is still the one that was opened. Raises as `open` does."""
        now = await asyncio.to_thread(read_incarnation, self._broker, self._topics, self._name)
        return now.topic_id == self._topic_id

    async def seek(self, positions: Mapping[str, int], *, since: datetime | None = None) -> None:
        """Read on from these positions, by source. A source that has none is read from the beginning, or from the first
        record that was produced at `since` or later.
        """
        with broker_errors(self._broker):
            beginnings = await self._consumer.beginning_offsets(list(self._sources))
            firsts = dict(beginnings)
            if since is not None:
                ends = await self.ends()  # asked for first, so that no record falls between
                at = dict.fromkeys(self._sources, round(since.timestamp() * 1000))
                found = await self._consumer.offsets_for_times(at)
                firsts = {one: ends[one] if found.get(one) is None else found[one].offset for one in self._sources}
        for partition, source in self._sources.items():
            start = max(positions[source], beginnings[partition]) if source in positions else firsts[partition]
            self._consumer.seek(partition, start)
        self.handled = {}

    @property
    def sources(self) -> list[str]:
        """The partitions of this incarnation of the topic, as they are handed over."""
        return list(self._sources.values())

    async def ends(self) -> Mapping[TopicPartition, int]:
        """Where the topic ends now."""
        with broker_errors(self._broker):
            ends: Mapping[TopicPartition, int] = await self._consumer.end_offsets(list(self._sources))
            return ends

    async def has_reached(self, ends: Mapping[TopicPartition, int]) -> bool:
        """Whether everything before these ends was handled."""
        return all([await self._consumer.position(partition) >= end for partition, end in ends.items()])

    def is_ahead_of(self, stored: Mapping[str, int]) -> bool:
        """Whether a store misses positions that were handled, as a server does that restarts without its data."""
        return any(stored.get(source, 0) < after for source, after in self.handled.items())

    async def catch_up(self) -> None:
        """Handle everything that the topic holds now."""
        ends = await self.ends()
        while not await self.has_reached(ends):
            await self.poll(wait_seconds=0.2)

    async def poll(self, *, wait_seconds: float) -> None:
        """Handle what came meanwhile. Raises `Misconfigured` if the topic lost what comes next."""
        try:
            with broker_errors(self._broker):
                found = await self._consumer.getmany(timeout_ms=int(wait_seconds * 1000))
        except kafka_errors.OffsetOutOfRangeError as error:
            raise Misconfigured(
                f"topic {self._topics.full_name(self._name)!r} was cut off or replaced while it was read ({error}): "
                "start again"
            ) from None
        for partition, records in found.items():
            source, after = self._sources[partition], records[-1].offset + 1
            try:
                await self._handle(records, source, after)
            except Unavailable:
                for unread, left in found.items():  # the partitions that follow were not handled either
                    self._consumer.seek(unread, max(left[0].offset, self.handled.get(self._sources[unread], 0)))
                raise
            self.handled[source] = after
