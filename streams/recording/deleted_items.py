"""Follows `items`, and removes from the behaviour store what users took of items that were deleted.

`items` and not `embeddings`: there a picture that is still awaited looks like a delete. Only key and emptiness of a
record count here, so nothing is decoded: whoever sends a value wants the item to be there.

An item that is published again is another one from then on. What was taken of the one before goes if the deletion was
swept before the item came back, and stays if not; what is taken after it came back stays.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import structlog
from aiokafka import TopicPartition

from schemas.base import produced_at
from schemas.errors import BadMessage, Misconfigured, Unavailable
from streams.broker.clients import BrokerConfig
from streams.broker.records import read_item_id
from streams.broker.topic_follower import TopicFollower
from streams.broker.topics import TopicsConfig
from streams.recording.config import RecordConfig
from streams.runtime.delivery import Patience, retry_until_available
from streams.stores.histories.deleted_items import DeletedItems, SweepReport, Sweeps

log = structlog.get_logger()

LOOK_SECONDS = 2.0
"""How often to look whether a sweep is due, whether we lead, and whether the store lost marks."""
LEASE_SECONDS = 5.0
"""How long the marks of a recorder that was killed wait for another one."""
REST = 4.0
"""After looking at some users a sweep rests so many times as long: it takes a fifth of the server at most."""


def last_words(records: Sequence[Any], *, now: float) -> dict[str, float | None]:
    """Per item of some records of a partition: when it was deleted (seconds since 1970), None if it is published.

    A deletion whose own timestamp is no time counts as one of `now`.
    """
    words: dict[str, float | None] = {}
    for record in records:
        try:
            item_id = read_item_id(record.key)
        except BadMessage:
            continue  # the item path buries it
        words[item_id] = _deleted_at(record, now) if record.value is None else None
    return words


def _deleted_at(record: Any, now: float) -> float:
    try:
        return produced_at(record.timestamp).timestamp()
    except BadMessage:
        return now


def sweep_due(state: Sweeps, now: float, *, gather_seconds: float, late_seconds: float) -> bool:
    """Whether to sweep: there are new marks, or old ones that something may have been recorded against since."""
    if not state.remembered:
        return False
    if state.swept_at is None or now < state.swept_at:  # a clock may be set back
        return True
    wait = late_seconds if state.marks == state.swept_marks else gather_seconds
    return now - state.swept_at >= wait


class DeletedItemFollower:
    """Follows and sweeps, as the one that leads; the others wait for their turn.

    A mark is kept with the place after its record in one transaction, and a sweep counts when it is over: killed at any
    moment, the next one goes on.
    """

    def __init__(
        self,
        items: DeletedItems,
        broker: BrokerConfig,
        topics: TopicsConfig,
        config: RecordConfig,
        *,
        who: str,
        clock: Callable[[], float] = time.time,
        on_report: Callable[[SweepReport], None] = lambda report: None,
    ) -> None:
        self._items = items
        self._config = config
        self._who = who
        self._clock = clock
        self._on_report = on_report
        self._remember_seconds = max(topics.behaviours_retention_days * 86_400, topics.tombstone_retention_hours * 3600)
        self._follower = TopicFollower(broker, topics.full_name("items"), self._mark)
        self._leads = self._follows = False
        self._sweep_after: Mapping[TopicPartition, int] | None = None
        self._looked_at = self._identified_at = float("-inf")

    async def run(self, stop: asyncio.Event) -> None:
        """Follow and sweep until `stop` is set; what is away is waited for."""
        while not stop.is_set():
            await retry_until_available(lambda: self.turn(stop), what="items.follow", patience=Patience())

    async def close(self) -> None:
        """Disconnect; another one may go on at once."""
        await self._follower.close()
        if self._leads:
            self._leads = False
            with suppress(Unavailable):  # its lease ends by itself
                await self._items.resign(self._who)

    async def turn(self, stop: asyncio.Event) -> None:
        """Read a little, and sweep if that is due. Raises `Unavailable`.

        A sweep waits until everything was read that `items` held when it became due: an item may have come back.
        """
        if self._passed(LOOK_SECONDS, self._looked_at):
            self._looked_at = self._clock()
            await self._look()
        if not self._follows:
            await _until(stop, LOOK_SECONDS)
            return
        try:
            await self._follower.poll(wait_seconds=0.5)
        except Misconfigured as error:
            self._lose_place(error)
            return
        if self._sweep_after is not None and await self._follower.has_told(self._sweep_after):
            self._sweep_after = None
            await self._sweep(stop)

    async def _look(self) -> None:
        if not await self._lead():
            self._follows = False
            return
        if self._follows:
            held = await self._items.positions()
            if any(held.get(source, 0) < after for source, after in self._follower.told.items()):
                log.warning("items.store_lost_marks")
                await self._follower.stand_at(held, since=self._horizon())
            if self._passed(self._config.identity_check_seconds, self._identified_at):
                await self._check_topic()
        if not self._follows:
            await self._take_place()
        if self._follows and self._sweep_after is None and await self._sweep_due():
            self._sweep_after = await self._follower.ends()

    async def _sweep_due(self) -> bool:
        return sweep_due(
            await self._items.sweeps(),
            self._clock(),
            gather_seconds=self._config.deleted_gather_seconds,
            late_seconds=self._config.deleted_sweep_seconds,
        )

    async def _lead(self) -> bool:
        self._leads = await self._items.lead(self._who, seconds=LEASE_SECONDS)
        return self._leads

    async def _take_place(self) -> None:
        self._sweep_after = None
        await self._follower.close()
        try:
            await self._follower.open(await self._items.positions(), since=self._horizon())
        except Misconfigured as error:  # the topic is being created again
            self._lose_place(error)
            return
        self._follows, self._identified_at = True, self._clock()

    async def _check_topic(self) -> None:
        try:
            self._follows = await self._follower.is_same_topic()
        except Misconfigured as error:
            self._lose_place(error)
        self._identified_at = self._clock()

    def _lose_place(self, error: Misconfigured) -> None:
        log.warning("items.not_followed", error=str(error))
        self._follows = False

    def _horizon(self) -> datetime:
        """What was deleted before then concerns no behaviour that could still come."""
        return datetime.fromtimestamp(max(0.0, self._clock() - self._remember_seconds), UTC)

    def _passed(self, seconds: float, since: float) -> bool:
        return not 0 <= self._clock() - since < seconds  # a clock may be set back

    async def _mark(self, records: Sequence[Any], source: str, next_offset: int) -> None:
        horizon = self._horizon().timestamp()
        words = {item: at for item, at in last_words(records, now=self._clock()).items() if at is None or at >= horizon}
        if marked := await self._items.mark(words, source=source, next_offset=next_offset):
            log.info("items.marked_deleted", count=marked)

    async def _sweep(self, stop: asyncio.Event) -> None:
        state, begun_at, cursor, removed = await self._items.sweeps(), self._clock(), 0, 0
        started = renewed = time.monotonic()
        while True:
            before = time.monotonic()
            cursor, went = await self._items.sweep(cursor)
            removed += went
            if cursor == 0:
                break
            await _until(stop, REST * (time.monotonic() - before))
            if stop.is_set():
                return
            if time.monotonic() - renewed > LEASE_SECONDS / 3:
                renewed = time.monotonic()
                if not await self._lead():
                    return
        await self._items.swept(state, begun_at=begun_at, forget_before=self._horizon().timestamp())
        report = SweepReport(removed, state.remembered, time.monotonic() - started)
        log.info("takes.swept", removed=removed, deleted_items=report.remembered, seconds=round(report.seconds, 3))
        self._on_report(report)


async def _until(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
