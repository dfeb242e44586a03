"""The follower of `item-states`: what the trainer counted, as features of a request read it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog
from aiokafka import TopicPartition

from schemas.errors import Misconfigured, Unavailable
from streams.broker.clients import BrokerConfig
from streams.broker.topic_follower import TopicFollower
from streams.broker.topics import TopicsConfig
from streams.serving.reports import StatesReport
from trainer.features.config import FeatureConfig
from trainer.features.state_records import StateCopies

log = structlog.get_logger()

_AT_ONCE = 500
"""Records that are applied before others get their turn."""


class StatesFollower:
    """Keeps copies of all states of one feature set, from the beginning of the topic on, in no group.

    While the broker is away the copies stay as they are: an old count is closer than none. A topic that was replaced is
    read from its beginning, and its copies are used once they are complete.
    """

    def __init__(
        self,
        config: FeatureConfig,
        broker: BrokerConfig,
        topics: TopicsConfig,
        *,
        clock: Callable[[], float],
        confirm_every_seconds: float = 1.0,
        retry_seconds: float = 2.0,
    ) -> None:
        self._config = config
        self._broker = broker
        self._topics = topics
        self._clock = clock
        self._confirm_every = confirm_every_seconds
        self._retry_seconds = retry_seconds
        self._reading = self.copies = StateCopies(config)
        """What scores rest on."""
        self._confirmed_at = float("-inf")
        self.is_reading = False
        """Whether the topic answers and its first pass is not done: what was taken is not known yet."""

    @property
    def behind_seconds(self) -> float:
        """Time since everything that the topic held was last known to be applied."""
        return self._clock() - self._confirmed_at

    def report(self) -> StatesReport:
        """What a score rests on now."""
        head = self.copies.head
        return StatesReport(0 if head is None else head.number, len(self.copies), self.behind_seconds)

    async def run(self, stop: asyncio.Event, on_tried: Callable[[], None] = lambda: None) -> None:
        """Follow until `stop` is set. `on_tried` is called once it is known whether the broker answers.

        Raises `Misconfigured` if the topic does not exist, or is refused, at the first try; later on that is logged.
        """
        is_first = True
        while not stop.is_set():
            follower = TopicFollower(self._broker, self._topics, "item-states", self._apply)
            try:
                await follower.open()
                self._begin()
                is_first = False
                on_tried()
                log.info("states.followed", features=self._config.version)
                await self._follow(follower, stop)
            except (Unavailable, Misconfigured) as error:
                if is_first and isinstance(error, Misconfigured):
                    raise
                log.warning("states.not_followed", error=str(error))
            finally:
                await follower.close()
            is_first = False
            on_tried()
            await self._wait(stop)

    def _begin(self) -> None:
        if len(self.copies):
            self._reading = StateCopies(self._config)
        else:
            self.copies.clear()  # records of a pass that ended before its first head
            self.is_reading = True

    async def _follow(self, follower: TopicFollower, stop: asyncio.Event) -> None:
        """Until `stop` is set, or the topic was replaced while the broker was away. A broker that comes back is read on
        from where it was left: a whole topic takes long.
        """
        asked_at = float("-inf")
        ends: Mapping[TopicPartition, int] | None = None
        was_away = False
        while not stop.is_set():
            try:
                if was_away and not await follower.is_same_topic():
                    return
                was_away = False
                if ends is None and self._clock() - asked_at >= self._confirm_every:
                    asked_at, ends = self._clock(), await follower.ends()
                await follower.poll(wait_seconds=0.2)
                if ends is not None and await follower.has_reached(ends):
                    self._confirm(asked_at)
                    ends = None
            except Unavailable as error:
                log.warning("states.not_followed", error=str(error))
                was_away, ends = True, None
                await self._wait(stop)

    async def _wait(self, stop: asyncio.Event) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), self._retry_seconds)

    def _confirm(self, at: float) -> None:
        if self._reading is not self.copies and self._reading.head is None:
            return  # a topic that was created again and holds nothing yet
        self.copies, self.is_reading = self._reading, False
        self._confirmed_at = at

    async def _apply(self, records: Sequence[Any], source: str, after: int) -> None:
        for start in range(0, len(records), _AT_ONCE):
            for record in records[start : start + _AT_ONCE]:
                try:
                    self._reading.apply(record.key, record.value)
                except ValueError as error:
                    log.warning("states.unreadable", key=repr(record.key)[:200], error=str(error)[:500])
            await asyncio.sleep(0)
