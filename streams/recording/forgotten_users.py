"""Follows `forgotten`: first everything that is there, then what comes, each user told to whoever has to forget him.

Whoever follows reads all partitions, in no group: each process has to know.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog

from schemas.forgotten import ForgottenUser
from streams.broker.clients import BrokerConfig
from streams.broker.forgotten import ForgottenFollower
from streams.broker.topics import TopicsConfig
from streams.runtime.delivery import Patience, retry_until_available
from streams.stores.histories.store import BehaviourStore

log = structlog.get_logger()

LOOK_SECONDS = 5.0
"""How often a recorder looks whether the store lost marks, as a server that restarts without its data does."""


class ErasureFollower:
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
        await retry_until_available(self._follower.catch_up, what="forget", patience=Patience())

    async def close(self) -> None:
        """Disconnect."""
        await self._follower.close()

    async def run(self, stop: asyncio.Event) -> None:
        """Obey what comes until `stop` is set; what is away is waited for."""
        while not stop.is_set():
            await retry_until_available(self._look, what="forget", patience=Patience())

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
