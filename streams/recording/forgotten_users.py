"""Follows `forgotten`: first everything that is there, then what comes, each user told to whoever has to forget him.

Whoever follows reads all partitions, in no group: each process has to know.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import structlog

from schemas.base import decode
from schemas.errors import BadMessage, Reason
from schemas.forgotten import ForgottenUser
from streams.broker.clients import BrokerConfig
from streams.broker.topic_follower import TopicFollower
from streams.broker.topics import TopicsConfig
from streams.runtime.delivery import Patience, hold
from streams.stores.histories.redis_store import BehaviourStore
from trainer.samples.forgotten import ForgottenUsers

log = structlog.get_logger()

LOOK_SECONDS = 5.0
"""How often a recorder looks whether the store lost marks, as a server that restarts without its data does."""

_ANY_TIME = datetime.max.replace(tzinfo=UTC)
"""Offsets decide what is erased: nobody stays remembered because a clock was wrong, of the request or of its record."""

Tell = Callable[[Sequence[ForgottenUser], str, int], Awaitable[None]]
"""Gets users, the source that they were read from (a partition of this incarnation of the topic), the offset after."""


class ForgottenFollower(TopicFollower):
    """Reads `forgotten` from given positions on. `tell` may raise what is `Unavailable`: the users come again."""

    def __init__(self, broker: BrokerConfig, topics: TopicsConfig, tell: Tell) -> None:
        async def tell_records(records: Sequence[Any], source: str, next_offset: int) -> None:
            await tell(read_forgotten(records, max_bytes=broker.max_record_bytes), source, next_offset)

        super().__init__(broker, topics.full_name("forgotten"), tell_records)


def read_forgotten(records: Sequence[Any], *, max_bytes: int) -> list[ForgottenUser]:
    """Decode records of `forgotten`; one that cannot be read is told loudly, since somebody waits for it."""
    users = []
    for record in records:
        try:
            if record.value is None:
                continue  # nobody writes these; a request is not taken back
            user = decode(ForgottenUser, record.value, now=_ANY_TIME, max_bytes=max_bytes)
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
