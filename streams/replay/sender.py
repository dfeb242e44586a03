"""Sends a timeline through Kafka, as fast as its readers keep up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from schemas.errors import Reason, Unavailable
from streams.broker.clients import BrokerConfig, broker_errors
from streams.broker.topics import TopicName, TopicsConfig
from streams.replay.config import ReplayConfig
from streams.replay.timeline import Outgoing

log = structlog.get_logger()

_RECORDS_PER_TURN = 32
_RECORD_OVERHEAD_BYTES = 1_024
_LARGE_ONES_NAMED = 20
"""Further ones are only counted."""


class Sender(Protocol):
    """The part of aiokafka's producer that a replay needs."""

    async def send(self, topic: str, value: bytes | None = None, key: bytes | None = None) -> asyncio.Future[Any]:
        """Send a record; the future gives its metadata once the broker has it."""
        ...

    async def flush(self) -> None:
        """Wait until the broker has every record sent."""
        ...


class Positions(Protocol):
    """How much each role has read; `streams.broker.lag.GroupPositions` in production."""

    async def consumed(self) -> Mapping[TopicName, Mapping[str, int]]:
        """Topic -> role -> records committed since the replay began."""
        ...


@dataclass
class Sent:
    """The records sent so far; the display reads it while the replay runs."""

    items: int = 0
    behaviours: int = 0
    acknowledged: int = 0
    second: int | None = None
    """Event time of the newest record."""
    broken: dict[tuple[str, int, int], Reason] = field(default_factory=dict)
    """(topic without prefix, partition, offset) of each event that is broken on purpose -> why it must be refused."""
    without_picture: set[str] = field(default_factory=set)
    """Items that were sent without their picture, because their record would have been too large."""
    without_query_image: int = 0
    """Behaviours that were sent without the photo that was searched with, for the same reason."""
    records_left_out: int = 0
    """Records that are too large without a picture."""
    waiting_for: str | None = None
    """Role that the replay waits for at the moment."""


Acknowledged = Callable[[Outgoing, float], None]
"""Called with a record and the monotonic time at which the broker had it."""


class Replay:
    """One run over a timeline. Records are sent strictly in event-time order."""

    def __init__(
        self,
        sender: Sender,
        broker: BrokerConfig,
        topics: TopicsConfig,
        config: ReplayConfig,
        *,
        positions: Positions | None = None,
        speed: float | None = None,
        on_acknowledged: Acknowledged | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`positions` limits how far the replay runs ahead; `speed` is event time per wall time (None: no limit)."""
        self.sent = Sent()
        self._sender = sender
        self._broker = broker
        self._topics = topics
        self._limits: dict[TopicName, int] = {
            "items": config.max_items_in_flight,
            "behaviours": config.max_behaviours_in_flight,
        }
        self._poll_seconds = config.poll_seconds
        self._positions = positions
        self._consumed: Mapping[TopicName, Mapping[str, int]] = {}
        self._speed = speed
        self._on_acknowledged = on_acknowledged
        self._monotonic = monotonic
        self._sleep = sleep
        self._open: set[asyncio.Future[Any]] = set()
        self._failure: BaseException | None = None

    async def run(self, timeline: Iterable[Outgoing]) -> Sent:
        """Send everything; returns once the broker has it all.

        Raises `BrokerUnavailable` if the broker stays away for longer than its request timeout.
        """
        started: float | None = None
        first_second = 0
        with broker_errors(self._broker):
            for outgoing in timeline:
                if started is None:
                    started, first_second = self._monotonic(), outgoing.second
                if self._speed is not None:
                    due = started + (outgoing.second - first_second) / self._speed
                    if (early := due - self._monotonic()) > 0:
                        await self._sleep(early)
                if (role := self._behind()) is not None:
                    await self._wait_for(role)
                if self._failure is not None:
                    raise self._failure
                fitting = self._fitting(outgoing)
                if fitting is not None:
                    await self._send(fitting)
                if (self.sent.items + self.sent.behaviours) % _RECORDS_PER_TURN == 0:
                    await asyncio.sleep(0)  # sending rarely waits, and other tasks share this loop
            await self._sender.flush()
            if self._open:  # the futures of a flushed batch are set one turn of the loop later
                await asyncio.wait(self._open)
            if self._failure is not None:
                raise self._failure
        return self.sent

    def _fitting(self, outgoing: Outgoing) -> Outgoing | None:
        """The record, without its picture if it would be too large; None if it is too large all the same."""
        most = self._broker.max_record_bytes - _RECORD_OVERHEAD_BYTES
        if outgoing.size <= most:
            return outgoing
        smaller = outgoing.without_picture()
        if smaller is not None and smaller.size <= most:
            if outgoing.topic == "items":
                self.sent.without_picture.add(outgoing.key.decode())
            else:
                self.sent.without_query_image += 1
            what = "replay.picture_left_out"
        else:
            self.sent.records_left_out += 1
            smaller, what = None, "replay.record_left_out"
        large = len(self.sent.without_picture) + self.sent.without_query_image + self.sent.records_left_out
        if large <= _LARGE_ONES_NAMED:
            key = outgoing.key.decode(errors="replace")
            limit = f"MIM_KAFKA__MAX_RECORD_BYTES={self._broker.max_record_bytes}"
            log.warning(what, topic=outgoing.topic, key=key, record_bytes=outgoing.size, limit=limit)
        return smaller

    async def _send(self, outgoing: Outgoing) -> None:
        future = await self._sender.send(self._topics.full_name(outgoing.topic), value=outgoing.value, key=outgoing.key)
        self._open.add(future)
        future.add_done_callback(lambda done: self._acknowledge(outgoing, done))
        self.sent.second = outgoing.second
        if outgoing.topic == "items":
            self.sent.items += 1
        else:
            self.sent.behaviours += 1

    def _acknowledge(self, outgoing: Outgoing, done: asyncio.Future[Any]) -> None:
        self._open.discard(done)
        if done.cancelled():
            return
        if (error := done.exception()) is not None:
            self._failure = self._failure or error
            return
        self.sent.acknowledged += 1
        if outgoing.reason is not None:
            metadata = done.result()
            self.sent.broken[(outgoing.topic, metadata.partition, metadata.offset)] = outgoing.reason
        if self._on_acknowledged is not None:
            self._on_acknowledged(outgoing, self._monotonic())

    def _behind(self) -> str | None:
        """The role that has too much unread, if any, as far as is known."""
        if self._positions is None:
            return None
        sent: dict[TopicName, int] = {"items": self.sent.items, "behaviours": self.sent.behaviours}
        for topic, limit in self._limits.items():
            # before the first answer nothing is known to be consumed
            for role, consumed in self._consumed.get(topic, {"": 0}).items():
                if sent[topic] - consumed >= limit:
                    return role or "the first look"
        return None

    async def _wait_for(self, role: str) -> None:
        assert self._positions is not None
        await self._sender.flush()
        quiet_since = self._monotonic()
        behind: str | None = role
        while behind is not None:
            self.sent.waiting_for = behind
            before = self._consumed
            try:
                consumed = await self._positions.consumed()
                self._consumed = {topic: consumed.get(topic, {}) for topic in self._limits}
            except Unavailable as error:  # a broker that restarts: ask again
                log.warning("replay.positions_unknown", detail=str(error))
            now = self._monotonic()
            if self._consumed != before:
                quiet_since = now
            elif now - quiet_since > 30:
                log.warning("replay.waiting", role=behind, sent_items=self.sent.items, sent=self.sent.behaviours)
                quiet_since = now
            behind = self._behind()
            if behind is not None:
                await self._sleep(self._poll_seconds)
        self.sent.waiting_for = None
