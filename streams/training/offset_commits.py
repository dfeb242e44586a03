"""How far training has got, committed for the consumer group, although no group hands out the data.

Lag tools and the back-pressure of a replay look there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import structlog
from aiokafka import TopicPartition

from schemas.errors import Unavailable
from streams.broker.leadership import Leadership
from streams.runtime.interval import IntervalTimer

log = structlog.get_logger()


class OffsetCommits:
    """Commits the offsets of one topic in transactions of the leader; one is under way at a time.

    `offsets` says how far each partition is done.
    """

    def __init__(
        self,
        leadership: Leadership,
        offsets: Callable[[], Mapping[int, int]],
        *,
        topic: str,
        interval_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._leadership = leadership
        self._offsets = offsets
        self._topic = topic
        self._interval = IntervalTimer(interval_seconds, clock)
        self._committing: asyncio.Task[None] | None = None

    def confirm(self) -> None:
        """Raise `Fenced` if another process leads now."""
        self._leadership.confirm()

    def commit_soon(self) -> None:
        """Commit with the next `commit_if_due`."""
        self._interval.cut_short()

    async def commit_if_due(self) -> None:
        """Begin a commit if it is time. Raises `Fenced` if another process leads now."""
        if self._committing is not None and self._committing.done():
            finished, self._committing = self._committing, None
            try:
                finished.result()
            except Unavailable as error:
                log.warning("train.commit_delayed", error=str(error))
        if self._committing is None and self._interval.passed:
            self._interval.begin()
            # not awaited: a broker that is away must not hold up what can be learned meanwhile
            self._committing = asyncio.create_task(self._commit(self._offsets()))

    async def commit_final(self) -> None:
        """Commit for the last time, and wait for it."""
        if self._committing is not None:
            await asyncio.gather(self._committing, return_exceptions=True)  # the next line commits as much
        await self._commit(self._offsets())

    def cancel(self) -> None:
        """Wait for no commit any more."""
        if self._committing is not None:
            self._committing.cancel()

    async def _commit(self, offsets: Mapping[int, int]) -> None:
        await self._leadership.transact(
            offsets={TopicPartition(self._topic, number): offset for number, offset in offsets.items()}
        )
