"""Follows `forgotten`: first everything that is there, then what comes, each user told to whoever has to forget him.

Whoever follows reads all partitions, in no group: each process has to know.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import structlog
from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors

from schemas.base import decode
from schemas.errors import BadMessage, Misconfigured, Reason, Unavailable
from schemas.forgotten import ForgottenUser
from streams.broker import BrokerConfig, broker_errors, make_consumer
from streams.consumers.forgotten import ForgottenUsers
from streams.delivery import Patience, hold
from streams.log_identity import read_log_identity, read_partitions
from streams.stores.behaviours import BehaviourStore
from streams.topics import TopicsConfig

log = structlog.get_logger()

LOOK_SECONDS = 5.0
"""How often a recorder looks whether the store lost marks, as a server that restarts without its data does."""

Tell = Callable[[Sequence[ForgottenUser], str, int], Awaitable[None]]
"""Gets users, the source that they were read from (a partition of this incarnation of the topic), the offset after."""


class ForgottenFollower:
    """Reads `forgotten` from given positions on. `tell` may raise what is `Unavailable`: the users come again."""

    def __init__(self, broker: BrokerConfig, topics: TopicsConfig, tell: Tell) -> None:
        self._broker = broker
        self._topic = topics.full_name("forgotten")
        self._tell = tell
        self._consumer: Any = None
        self._sources: dict[TopicPartition, str] = {}
        self.told: dict[str, int] = {}
        """How far each source was told, since it was last stood at a position."""

    async def open(self, positions: Mapping[str, int] | None = None) -> None:
        """Connect and stand at `positions` (by source), by default at the beginning.

        Raises `Misconfigured` if the topic does not exist, `BrokerUnavailable`.
        """
        identity = await asyncio.to_thread(read_log_identity, self._broker, self._topic)
        numbers = await asyncio.to_thread(read_partitions, self._broker, self._topic)
        self._sources = {TopicPartition(self._topic, number): f"{identity.topic_id}:{number}" for number in numbers}
        self._consumer = make_consumer(self._broker)
        with broker_errors(self._broker):
            await self._consumer.start()
        self._consumer.assign(list(self._sources))
        await self.stand_at(positions or {})

    async def close(self) -> None:
        """Disconnect."""
        if self._consumer is not None:
            await self._consumer.stop()

    async def stand_at(self, positions: Mapping[str, int]) -> None:
        """Read on from these positions, and from the beginning of sources that have none."""
        with broker_errors(self._broker):
            beginnings = await self._consumer.beginning_offsets(list(self._sources))
        for partition, source in self._sources.items():
            self._consumer.seek(partition, max(positions.get(source, 0), beginnings[partition]))
        self.told = {}

    async def catch_up(self) -> None:
        """Tell of everybody whom the topic holds now."""
        with broker_errors(self._broker):
            ends = await self._consumer.end_offsets(list(self._sources))
        for partition, end in ends.items():
            while await self._consumer.position(partition) < end:
                await self.poll(wait_seconds=0.2)

    async def poll(self, *, wait_seconds: float) -> int:
        """Tell of those who were added meanwhile; how many."""
        try:
            with broker_errors(self._broker):
                found = await self._consumer.getmany(timeout_ms=int(wait_seconds * 1000))
        except kafka_errors.OffsetOutOfRangeError as error:
            raise Misconfigured(
                f"topic {self._topic!r} was cut off or replaced while it was read ({error}): start again"
            ) from None
        count = 0
        for partition, records in found.items():
            users = read_forgotten(records, max_bytes=self._broker.max_record_bytes)
            source, after = self._sources[partition], records[-1].offset + 1
            try:
                await self._tell(users, source, after)
            except Unavailable:
                for unread, left in found.items():  # what follows was not told either
                    self._consumer.seek(unread, max(left[0].offset, self.told.get(self._sources[unread], 0)))
                raise
            self.told[source] = after
            count += len(users)
        return count


def read_forgotten(records: Sequence[Any], *, max_bytes: int) -> list[ForgottenUser]:
    """Decode records of `forgotten`; one that cannot be read is told loudly, since somebody waits for it."""
    users = []
    for record in records:
        try:
            if record.value is None:
                continue  # nobody writes these; a request is not taken back
            produced_at = datetime.fromtimestamp(record.timestamp / 1000, UTC)
            user = decode(ForgottenUser, record.value, now=produced_at, max_bytes=max_bytes)
            if record.key != user.user_id.encode():
                raise BadMessage(Reason.KEY_MISMATCH, "the key is not the user_id")
        except BadMessage as error:
            log.error("forgotten.unreadable", partition=record.partition, offset=record.offset, error=str(error))
        else:
            users.append(user)
    return users


async def read_forgotten_users(
    broker: BrokerConfig, topics: TopicsConfig, *, cluster_id: str | None, topic_id: str | None
) -> ForgottenUsers:
    """Everybody who was forgotten so far in the click log of this id. Raises as `ForgottenFollower.open` does."""
    gone = ForgottenUsers(cluster_id, topic_id)

    async def tell(users: Sequence[ForgottenUser], source: str, next_offset: int) -> None:
        for user in users:
            gone.add(user)

    follower = ForgottenFollower(broker, topics, tell)
    try:
        await follower.open()
        await follower.catch_up()
    finally:
        await follower.close()
    return gone


class StoreForgets:
    """A behaviour store that forgets whoever is added to `forgotten`.

    Several may run beside each other: the store takes each request once. What a store lost, as a server does that
    restarts without its data, is told again.
    """

    def __init__(
        self,
        store: BehaviourStore,
        broker: BrokerConfig,
        topics: TopicsConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._follower = ForgottenFollower(broker, topics, self._tell)
        self._clock = clock
        self._looked_at = clock()

    async def open(self) -> None:
        """Obey everything that was asked so far. Raises as `ForgottenFollower.open` does."""
        await self._follower.open(await self._store.forgotten_positions())
        await hold(self._follower.catch_up, what="forget", patience=Patience())

    async def close(self) -> None:
        """Disconnect."""
        await self._follower.close()

    async def run(self, stop: asyncio.Event) -> None:
        """Obey what comes until `stop` is set; what is away is waited for."""
        while not stop.is_set():
            await hold(self._look, what="forget", patience=Patience())

    async def _look(self) -> None:
        if self._clock() - self._looked_at >= LOOK_SECONDS:
            self._looked_at = self._clock()
            held = await self._store.forgotten_positions()
            if any(held.get(source, 0) < after for source, after in self._follower.told.items()):
                log.warning("forgotten.store_lost_marks")
                await self._follower.stand_at(held)
        await self._follower.poll(wait_seconds=0.5)

    async def _tell(self, users: Sequence[ForgottenUser], source: str, next_offset: int) -> None:
        if await self._store.forget(users, source=source, next_offset=next_offset):
            log.info("users.forgotten", count=len(users))
