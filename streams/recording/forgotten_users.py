"""Follows `forgotten`, and erases these users from the behaviour store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from schemas.errors import Misconfigured
from schemas.forgotten import ForgottenUser
from streams.broker.clients import BrokerConfig
from streams.broker.forgotten import ForgottenFollower
from streams.broker.topics import TopicsConfig
from streams.runtime.delivery import Patience, retry_until_available
from streams.stores.histories.store import BehaviourStore

log = structlog.get_logger()

CHECK_SECONDS = 5.0
"""How often to check whether the store lost marks."""
DROP_SECONDS = 3600.0
"""How often to drop marks of erasures that the click log is past."""


class ErasureFollower:
    """Erases every user of `forgotten` from a behaviour store.

    Several processes may do so at the same time: the store applies each request once. Requests whose marks the store
    lost, as a server does that restarts without its data, are applied again.

    `beginnings` reads the oldest offset that each partition of the click log still holds.
    """

    def __init__(
        self,
        store: BehaviourStore,
        broker: BrokerConfig,
        topics: TopicsConfig,
        *,
        beginnings: Callable[[], Awaitable[Mapping[int, int]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._follower = ForgottenFollower(broker, topics, self._forget)
        self._beginnings = beginnings
        self._clock = clock
        self._checked_at, self._dropped_at = clock(), float("-inf")

    async def open(self) -> None:
        """Apply all requests so far. Raises as `ForgottenFollower.open` does."""
        await self._follower.open(await self._store.forgotten_positions())
        await retry_until_available(self._follower.catch_up, what="forget", patience=Patience())

    async def close(self) -> None:
        """Disconnect."""
        await self._follower.close()

    async def run(self, stop: asyncio.Event) -> None:
        """Apply requests as they come, until `stop` is set. Waits for a store or broker that is away."""
        while not stop.is_set():
            await retry_until_available(self._run_once, what="forget", patience=Patience())

    async def _run_once(self) -> None:
        if self._clock() - self._checked_at >= CHECK_SECONDS:
            self._checked_at = self._clock()
            stored = await self._store.forgotten_positions()
            if self._follower.is_ahead_of(stored):
                log.warning("forgotten.store_lost_marks")
                await self._follower.seek(stored)
        if self._clock() - self._dropped_at >= DROP_SECONDS:
            await self._drop_spent()
            self._dropped_at = self._clock()
        await self._follower.poll(wait_seconds=0.5)

    async def _drop_spent(self) -> None:
        try:
            dropped = await self._store.drop_spent_marks(await self._beginnings(), sources=self._follower.sources)
        except Misconfigured as error:  # a login of an earlier build lacks HSCAN; the marks stay, nothing is wrong
            log.warning("forgotten.marks_not_dropped", error=str(error))
            return
        if dropped:
            log.info("forgotten.marks_dropped", count=dropped)

    async def _forget(self, users: Sequence[ForgottenUser], source: str, next_offset: int) -> None:
        if await self._store.forget(users, source=source, next_offset=next_offset):
            log.info("users.forgotten", count=len(users))
