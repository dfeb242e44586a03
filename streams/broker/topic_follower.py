"""Follows all partitions of a topic, in no group: first what is there, then what comes, told with the offset after it.

Whoever is told keeps that offset with what he makes of the records, by *source*: a partition of this incarnation of
the topic. So nothing is told in vain, and a topic that was deleted and created again is read from its beginning.
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
from streams.broker.cluster import read_log_identity, read_partitions

TellRecords = Callable[[Sequence[Any], str, int], Awaitable[None]]
"""Gets records of one partition in their order, the source that they were read from, the offset after."""


class TopicFollower:
    """Reads one topic from given positions on. `tell` may raise what is `Unavailable`: the records come again."""

    def __init__(self, broker: BrokerConfig, topic: str, tell: TellRecords) -> None:
        self._broker = broker
        self._topic = topic
        self._tell_records = tell
        self._consumer: Any = None
        self._topic_id = ""
        self._sources: dict[TopicPartition, str] = {}
        self.told: dict[str, int] = {}
        """How far each source was told, since it was last stood at a position."""

    async def open(self, positions: Mapping[str, int] | None = None, *, since: datetime | None = None) -> None:
        """Connect and stand as `stand_at` says.

        Raises `Misconfigured` if the topic does not exist, `BrokerUnavailable`.
        """
        identity = await asyncio.to_thread(read_log_identity, self._broker, self._topic)
        numbers = await asyncio.to_thread(read_partitions, self._broker, self._topic)
        self._topic_id = identity.topic_id
        self._sources = {TopicPartition(self._topic, number): f"{identity.topic_id}:{number}" for number in numbers}
        self._consumer = make_consumer(self._broker)
        with broker_errors(self._broker):
            await self._consumer.start()
        self._consumer.assign(list(self._sources))
        await self.stand_at(positions or {}, since=since)

    async def close(self) -> None:
        """Disconnect."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await consumer.stop()

    async def is_same_topic(self) -> bool:
        """Whether the topic is still the one that was opened. Raises as `open` does."""
        return (await asyncio.to_thread(read_log_identity, self._broker, self._topic)).topic_id == self._topic_id

    async def stand_at(self, positions: Mapping[str, int], *, since: datetime | None = None) -> None:
        """Read on from these positions (by source); sources that have none from the beginning, or what was produced
        at `since` or later.
        """
        with broker_errors(self._broker):
            beginnings = await self._consumer.beginning_offsets(list(self._sources))
            firsts = dict(beginnings)
            if since is not None:
                ends = await self.ends()  # before the look: nothing falls between
                at = dict.fromkeys(self._sources, round(since.timestamp() * 1000))
                found = await self._consumer.offsets_for_times(at)
                firsts = {one: ends[one] if found.get(one) is None else found[one].offset for one in self._sources}
        for partition, source in self._sources.items():
            start = max(positions[source], beginnings[partition]) if source in positions else firsts[partition]
            self._consumer.seek(partition, start)
        self.told = {}

    async def ends(self) -> Mapping[TopicPartition, int]:
        """Where the topic ends now."""
        with broker_errors(self._broker):
            ends: Mapping[TopicPartition, int] = await self._consumer.end_offsets(list(self._sources))
            return ends

    async def has_told(self, ends: Mapping[TopicPartition, int]) -> bool:
        """Whether everything before these ends was told."""
        return all([await self._consumer.position(partition) >= end for partition, end in ends.items()])

    async def catch_up(self) -> None:
        """Tell of everything that the topic holds now."""
        ends = await self.ends()
        while not await self.has_told(ends):
            await self.poll(wait_seconds=0.2)

    async def poll(self, *, wait_seconds: float) -> None:
        """Tell of what came meanwhile. Raises `Misconfigured` if the topic lost what comes next."""
        try:
            with broker_errors(self._broker):
                found = await self._consumer.getmany(timeout_ms=int(wait_seconds * 1000))
        except kafka_errors.OffsetOutOfRangeError as error:
            raise Misconfigured(
                f"topic {self._topic!r} was cut off or replaced while it was read ({error}): start again"
            ) from None
        for partition, records in found.items():
            source, after = self._sources[partition], records[-1].offset + 1
            try:
                await self._tell_records(records, source, after)
            except Unavailable:
                for unread, left in found.items():  # what follows was not told either
                    self._consumer.seek(unread, max(left[0].offset, self.told.get(self._sources[unread], 0)))
                raise
            self.told[source] = after
