"""How far training has got, told to the consumer group, although no group hands out the data.

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


class GroupOffsets:
    """Tells the offsets of one topic in transactions of the leader; one is under way at a time."""

    def __init__(
        self, leadership: Leadership, *, topic: str, interval_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._leadership = leadership
        self._topic = topic
        self._interval = IntervalTimer(interval_seconds, clock)
        self._telling: asyncio.Task[None] | None = None

    def tell_soon(self) -> None:
        """Tell them at the next opportunity."""
        self._interval.cut_short()

    async def keep_up(self, settled: Callable[[], Mapping[int, int]]) -> None:
        """Tell where the partitions are settled, if it is time. Raises `Fenced` if another process leads now."""
        if self._telling is not None and self._telling.done():
            finished, self._telling = self._telling, None
            try:
                finished.result()
            except Unavailable as error:
                log.warning("train.commit_delayed", error=str(error))
        if self._telling is None and self._interval.passed:
            self._interval.begin()
            # not awaited: a broker that is away must not hold up what can be learned meanwhile
            self._telling = asyncio.create_task(self._tell(settled()))

    async def last(self, settled: Callable[[], Mapping[int, int]]) -> None:
        """Tell for the last time, and wait for it."""
        if self._telling is not None:
            await asyncio.gather(self._telling, return_exceptions=True)  # the next line says it again
        await self._tell(settled())

    def cancel(self) -> None:
        """Wait for nothing any more."""
        if self._telling is not None:
            self._telling.cancel()

    async def _tell(self, settled: Mapping[int, int]) -> None:
        offsets = {TopicPartition(self._topic, number): offset for number, offset in settled.items()}
        await self._leadership.transact(offsets=offsets)
