"""Follows `items`, and removes takes of deleted items from the behaviour store.

`items` and not `embeddings`: there a picture that is still awaited looks like a delete. Only the key of a record
counts, its timestamp, and whether it has a value, so no value is decoded.

An item that is published again counts as another item. Takes of the former one are removed if the deletion was swept
before the item came back, else they stay. Takes after it came back stay.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
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
from streams.stores.histories.deleted_items import DeletedItems, SweepReport, Sweeps, Unfinished
from streams.stores.histories.item_order import ItemState

log = structlog.get_logger()

CHECK_SECONDS = 2.0
"""How often to check whether a sweep is due, whether this process leads, and whether the store lost marks."""
LEASE_SECONDS = 5.0
"""How long after a recorder was killed another one takes the lead."""
SETTLE_SECONDS = 600.0
"""How often to forget the order of records that all partitions were read past."""
CLOCK_SECONDS = 3600.0
"""How far the clocks of producers may lie apart: a record that comes later than this after another has a later time."""
REST_FACTOR = 4.0
"""A sweep rests this many times as long as each step took: it uses a fifth of the server at most."""


def read_states(records: Sequence[Any], *, now: float) -> dict[str, ItemState]:
    """What the last of these records of one partition says of each item.

    A timestamp that is not a valid time counts as `now` (seconds since 1970).
    """
    states: dict[str, ItemState] = {}
    for record in records:
        try:
            item_id = read_item_id(record.key)
        except BadMessage:
            continue  # the item path writes its dead letter
        before = states.get(item_id)
        time_ms = max(_time_ms(record, now), before.time_ms if before else 0)
        states[item_id] = ItemState(time_ms, record.value is None)
    return states


def _time_ms(record: Any, now: float) -> int:
    try:
        produced_at(record.timestamp)
    except BadMessage:
        return int(now * 1000)
    return int(record.timestamp)


def sweep_due(state: Sweeps, now: float, *, gather_seconds: float, late_seconds: float) -> bool:
    """Whether there are new marks, or old ones for whose items takes may have been recorded since."""
    if not state.remembered:
        return False
    if state.swept_at is None or now < state.swept_at:  # a clock may be set back
        return True
    wait = late_seconds if state.marks == state.swept_marks else gather_seconds
    return now - state.swept_at >= wait


class DeletedItemFollower:
    """Marks deleted items and sweeps their takes. Of several processes one leads, the others stand by.

    A mark is stored together with the position after its record, and a sweep counts once it is complete. So another
    process can go on wherever this one was killed.
    """

    def __init__(
        self,
        items: DeletedItems,
        broker: BrokerConfig,
        topics: TopicsConfig,
        config: RecordConfig,
        *,
        member: str,
        clock: Callable[[], float] = time.time,
        on_report: Callable[[SweepReport], None] = lambda report: None,
    ) -> None:
        self._items = items
        self._config = config
        self._member = member
        self._clock = clock
        self._on_report = on_report
        self._remember_seconds = max(topics.behaviours_retention_days * 86_400, topics.tombstone_retention_hours * 3600)
        self._follower = TopicFollower(broker, topics, "items", self._mark)
        self._leads = self._follows = False
        self._read_after: Mapping[TopicPartition, int] | None = None
        self._asked_at = 0.0
        self._sweeps_then = False
        self._checked_at = self._identified_at = self._settled_at = float("-inf")

    async def run(self, stop: asyncio.Event) -> None:
        """Follow and sweep until `stop` is set. Waits for a store or broker that is away."""
        while not stop.is_set():
            await retry_until_available(lambda: self.run_once(stop), what="items.follow", patience=Patience())

    async def close(self) -> None:
        """Disconnect, and give the lead back at once."""
        await self._follower.close()
        if self._leads:
            self._leads = False
            with suppress(Unavailable):  # the lease ends by itself
                await self._items.resign(self._member)

    async def run_once(self, stop: asyncio.Event) -> None:
        """Read a little, and sweep if that is due. Raises `Unavailable`.

        A sweep waits until everything was read that `items` held when it became due: an item may have come back.
        """
        if self._passed(CHECK_SECONDS, self._checked_at):
            self._checked_at = self._clock()
            await self._check()
        if not self._follows:
            await _until(stop, CHECK_SECONDS)
            return
        try:
            await self._follower.poll(wait_seconds=0.5)
        except Misconfigured as error:
            self._stop_following(error)
            return
        if self._read_after is not None and await self._follower.has_reached(self._read_after):
            self._read_after = None
            await self._items.settle(int(1000 * (self._asked_at - CLOCK_SECONDS)))
            self._settled_at = self._asked_at
            if self._sweeps_then:
                await self._sweep(stop)

    async def _check(self) -> None:
        if not await self._lead():
            self._follows = False
            return
        if self._follows:
            stored = await self._items.positions()
            if self._follower.is_ahead_of(stored):
                log.warning("items.store_lost_marks")
                await self._follower.seek(stored, since=self._horizon())
            if self._passed(self._config.identity_check_seconds, self._identified_at):
                await self._check_topic()
        if not self._follows:
            await self._start_following()
        if self._follows and self._read_after is None:
            self._sweeps_then = await self._sweep_due()
            if self._sweeps_then or self._passed(SETTLE_SECONDS, self._settled_at):
                self._asked_at = self._clock()
                self._read_after = await self._follower.ends()

    async def _sweep_due(self) -> bool:
        return sweep_due(
            await self._items.sweeps(),
            self._clock(),
            gather_seconds=self._config.deleted_gather_seconds,
            late_seconds=self._config.deleted_sweep_seconds,
        )

    async def _lead(self) -> bool:
        self._leads = await self._items.lead(self._member, seconds=LEASE_SECONDS)
        return self._leads

    async def _start_following(self) -> None:
        self._read_after = None
        await self._follower.close()
        try:
            await self._follower.open(await self._items.positions(), since=self._horizon())
        except Misconfigured as error:  # the topic is being created again
            self._stop_following(error)
            return
        self._follows, self._identified_at = True, self._clock()

    async def _check_topic(self) -> None:
        try:
            self._follows = await self._follower.is_same_topic()
        except Misconfigured as error:
            self._stop_following(error)
        self._identified_at = self._clock()

    def _stop_following(self, error: Misconfigured) -> None:
        log.warning("items.not_followed", error=str(error))
        self._follows = False

    def _horizon(self) -> datetime:
        """Deletions before this moment concern no behaviour that could still come."""
        return datetime.fromtimestamp(max(0.0, self._clock() - self._remember_seconds), UTC)

    def _passed(self, seconds: float, since: float) -> bool:
        return not 0 <= self._clock() - since < seconds  # a clock may be set back

    async def _mark(self, records: Sequence[Any], source: str, next_offset: int) -> None:
        horizon_ms = int(self._horizon().timestamp() * 1000)
        found = read_states(records, now=self._clock())
        recent = {item_id: one for item_id, one in found.items() if not one.is_deleted or one.time_ms >= horizon_ms}
        if marked := await self._items.mark(recent, source=source, next_offset=next_offset):
            log.info("items.marked_deleted", count=marked)

    async def _sweep(self, stop: asyncio.Event) -> None:
        """Go through all users, from where a process before this one ended."""
        state, removed = await self._items.sweeps(), 0
        sweep = state.unfinished or Unfinished(0, state.marks, self._clock())
        started = renewed = time.monotonic()
        while True:
            before = time.monotonic()
            cursor, removed_now = await self._items.sweep(sweep.cursor)
            removed += removed_now
            if cursor == 0:
                break
            sweep = replace(sweep, cursor=cursor)
            await _until(stop, REST_FACTOR * (time.monotonic() - before))
            if stop.is_set():
                await self._items.reached(sweep)
                return
            if time.monotonic() - renewed > LEASE_SECONDS / 3:
                renewed = time.monotonic()
                await self._items.reached(sweep)
                if not await self._lead():
                    return
        await self._items.swept(sweep, forget_before=self._horizon().timestamp())
        report = SweepReport(removed, state.remembered, time.monotonic() - started)
        log.info("takes.swept", removed=removed, deleted_items=report.remembered, seconds=round(report.seconds, 3))
        self._on_report(report)


async def _until(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
