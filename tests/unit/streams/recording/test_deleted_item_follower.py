"""Who follows `items` for deletions: one leads, marks what is recent, and sweeps once it has read what there was."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import OffsetOutOfRangeError

from schemas.errors import Misconfigured, StoreUnavailable
from streams.broker import topic_follower
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics, TopicIncarnation
from streams.broker.topics import TopicsConfig
from streams.recording import deleted_items
from streams.recording.config import RecordConfig
from streams.recording.deleted_items import CHECK_SECONDS, DeletedItemFollower
from streams.stores.histories.deleted_items import InMemoryDeletedItems, SweepReport, Unfinished
from streams.stores.histories.store import InMemoryBehaviourStore
from tests.factories.fake_consumer import IN_TIME_MS, FakeConsumer, FakeRecord
from tests.factories.waiting import Clock

PARTS = [TopicPartition("mim.items", number) for number in (0, 1)]
NOW = IN_TIME_MS / 1000
DAY = 86_400


def said(partition: int, offset: int, item: str, *, gone: bool = True, days_ago: float = 0) -> FakeRecord:
    return FakeRecord(
        partition, offset, item.encode(), None if gone else b"{}", round(IN_TIME_MS - 1_000 * DAY * days_ago)
    )


class Items(InMemoryDeletedItems):
    """Deleted items in memory; notes what is swept, and may let another process lead."""

    def __init__(self) -> None:
        super().__init__(InMemoryBehaviourStore())
        self.pages, self.asked, self.left, self.noted = 1, list[int](), 0, list[Unfinished]()
        self.settled: list[int] = []

    async def settle(self, before_ms: int) -> None:
        self.settled.append(before_ms)
        await super().settle(before_ms)

    async def sweep(self, cursor: int) -> tuple[int, int]:
        self.asked.append(cursor)
        return (0 if cursor + 1 >= self.pages else cursor + 1), 2

    async def reached(self, sweep: Unfinished) -> None:
        self.noted.append(sweep)
        await super().reached(sweep)


class Scene:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.stop, self.items = Clock(NOW), asyncio.Event(), Items()
        self.consumer = FakeConsumer({PARTS[0]: [], PARTS[1]: []})
        self.topic_id, self.missing, self.opened = "i1", False, 0
        self.reports: list[SweepReport] = []
        monkeypatch.setattr(topic_follower, "make_consumer", self.open_consumer)
        monkeypatch.setattr(topic_follower, "describe_topics", self.describe)
        monkeypatch.setattr(topic_follower, "read_incarnation", self.read)
        self.follower = self.make("me")

    def make(self, member: str, *, tombstone_hours: int = 24) -> DeletedItemFollower:
        config = RecordConfig(deleted_gather_seconds=30, deleted_sweep_seconds=900, identity_check_seconds=60)
        return DeletedItemFollower(
            self.items,
            BrokerConfig(),
            TopicsConfig(behaviours_retention_days=14, tombstone_retention_hours=tombstone_hours),
            config,
            member=member,
            clock=self.clock,
            on_report=self.reports.append,
        )

    def open_consumer(self, _: Any) -> FakeConsumer:
        self.opened += 1
        return self.consumer

    def describe(self, *_: Any) -> ClusterTopics:
        if self.missing:
            raise Misconfigured("topic 'mim.items' does not exist")
        return ClusterTopics("c", {"items": self.topic_id}, {"items": [0, 1]})

    def read(self, *_: Any) -> TopicIncarnation:
        return self.describe().incarnation(TopicsConfig(), "items")

    async def after(self, seconds: float) -> list[int]:
        """One round, so many seconds later; the cursors that it swept from."""
        self.clock.now += seconds
        before = len(self.items.asked)
        await self.follower.run_once(self.stop)
        return self.items.asked[before:]

    async def marked(self) -> set[str]:
        return set(self.items._deleted)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


async def test_recent_deletions_are_marked_with_their_positions_and_those_of_before_retention_are_not(
    scene: Scene,
) -> None:
    scene.consumer.log = {
        PARTS[0]: [said(0, 0, "old", days_ago=14.1), said(0, 1, "young", days_ago=13.9), said(0, 2, "back"),
                   said(0, 3, "back", gone=False)],
        PARTS[1]: [said(1, 5, "other")],
    }  # fmt: skip
    scene.items._deleted["published"] = NOW
    scene.consumer.log = {
        **scene.consumer.log,
        PARTS[1]: [*scene.consumer.log[PARTS[1]], said(1, 6, "published", gone=False)],
    }
    await scene.after(0)
    assert await scene.marked() == {"young", "other"}
    assert await scene.items.positions() == {"i1:0": 4, "i1:1": 7}
    assert scene.items._deleted["young"] == pytest.approx(NOW - 13.9 * DAY)


async def test_what_was_deleted_before_any_behaviour_that_could_come_is_not_even_read(scene: Scene) -> None:
    scene.consumer.log = {PARTS[0]: [said(0, n, f"i{n}", days_ago=20 - n) for n in range(20)], PARTS[1]: []}
    await scene.after(0)
    assert await scene.marked() == {f"i{n}" for n in range(6, 20)}
    scene.items._deleted.clear()
    scene.items._positions = {"i1:0": 3}  # it has a position: it goes on there, whatever is young enough by now
    fresh = scene.make("me")
    scene.follower = fresh
    await scene.after(CHECK_SECONDS)
    assert scene.consumer.positions[PARTS[0]] == 20 and "i19" in await scene.marked()


async def test_an_item_that_was_published_again_is_not_marked_however_long_ago_that_was(scene: Scene) -> None:
    scene.consumer.log = {PARTS[0]: [said(0, 0, "back", gone=False, days_ago=20)], PARTS[1]: []}
    scene.items._deleted, scene.items._positions = {"back": NOW - 21 * DAY}, {"i1:0": 0}  # read late: nobody led
    scene.items._swept = ("0", NOW)
    assert await scene.after(0) == [] and await scene.marked() == set()


async def test_a_deletion_is_remembered_as_long_as_either_topic_keeps_what_it_concerns(scene: Scene) -> None:
    scene.consumer.log = {PARTS[0]: [said(0, n, f"i{n}", days_ago=20 - n) for n in range(20)], PARTS[1]: []}
    scene.follower = scene.make("me", tombstone_hours=17 * 24)
    await scene.after(0)
    assert await scene.marked() == {f"i{n}" for n in range(3, 20)}


async def test_a_sweep_waits_until_all_that_there_was_when_it_became_due_is_read(scene: Scene) -> None:
    scene.consumer.log = {PARTS[0]: [said(0, 0, "a")], PARTS[1]: []}
    assert await scene.after(0) == []  # marked now
    scene.consumer.log = {PARTS[0]: [said(0, 0, "a"), said(0, 1, "b")], PARTS[1]: [said(1, 0, "c")]}
    scene.consumer.pause(PARTS[1])
    assert await scene.after(CHECK_SECONDS) == []  # due, and not everything of then was read
    assert await scene.after(CHECK_SECONDS) == []
    scene.consumer.resume(PARTS[1])
    assert await scene.after(CHECK_SECONDS) == [0]
    assert [(one.removed, one.remembered) for one in scene.reports] == [(2, 3)]
    assert await scene.after(CHECK_SECONDS) == []
    assert await scene.after(899 - CHECK_SECONDS) == [] and await scene.after(CHECK_SECONDS) == [0]


async def test_new_marks_are_swept_once_they_were_gathered(scene: Scene) -> None:
    scene.consumer.log = {PARTS[0]: [said(0, 0, "a")], PARTS[1]: []}
    await scene.after(0)
    assert await scene.after(CHECK_SECONDS) == [0]
    scene.consumer.log = {PARTS[0]: [said(0, 1, "b")], PARTS[1]: []}
    assert await scene.after(1) == [] and await scene.after(27) == [] and await scene.after(CHECK_SECONDS) == [0]


async def test_a_sweep_that_is_stopped_or_loses_the_lead_is_noted_where_it_is_and_goes_on_there(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.consumer.log = {PARTS[0]: [said(0, 0, "a")], PARTS[1]: []}
    scene.items.pages = 5
    await scene.after(0)

    async def stopping(stop: asyncio.Event, seconds: float) -> None:
        if len(scene.items.asked) == 2:
            stop.set()

    monkeypatch.setattr(deleted_items, "_until", stopping)
    assert await scene.after(CHECK_SECONDS) == [0, 1]
    (noted,) = scene.items.noted
    assert (noted.cursor, noted.marks, noted.begun_at) == (2, "1", NOW + CHECK_SECONDS) and scene.reports == []
    scene.stop.clear()
    monkeypatch.setattr(deleted_items, "LEASE_SECONDS", 0.0)  # the lead is asked for after every page

    async def lost(stop: asyncio.Event, seconds: float) -> None:
        scene.items._leader = "another" if len(scene.items.asked) == 3 else "me"

    monkeypatch.setattr(deleted_items, "_until", lost)
    assert await scene.after(CHECK_SECONDS) == [2]
    assert scene.items.noted[-1].cursor == 3 and scene.reports == []
    scene.items._leader = "me"
    assert await scene.after(CHECK_SECONDS) == [3, 4]
    state = await scene.items.sweeps()
    assert (state.swept_marks, state.swept_at, state.unfinished) == ("1", NOW + CHECK_SECONDS, None)
    assert len(scene.reports) == 1


async def test_the_order_of_records_is_forgotten_now_and_then_up_to_an_hour_ago(scene: Scene) -> None:
    await scene.after(0)
    for _ in range(620):
        await scene.after(CHECK_SECONDS)
    assert scene.items.settled == [round(1_000 * (NOW - 3_600 + after)) for after in (0, 600, 1_200)]


async def test_a_sweep_that_waits_for_a_topic_waits_no_longer_once_that_was_replaced(scene: Scene) -> None:
    scene.consumer.log = {PARTS[0]: [said(0, 0, "a")], PARTS[1]: [said(1, 50, "b")]}
    await scene.after(0)
    scene.consumer.log = {PARTS[0]: [said(0, 1, "c")], PARTS[1]: [said(1, 51, "d")]}
    scene.consumer.pause(PARTS[1])
    assert await scene.after(CHECK_SECONDS) == []
    scene.topic_id, scene.consumer.log = "i2", {PARTS[0]: [said(0, 0, "e")], PARTS[1]: []}
    scene.consumer.resume(PARTS[1])
    swept = [await scene.after(after) for after in (60, CHECK_SECONDS, CHECK_SECONDS)]
    assert [0] in swept and "e" in await scene.marked()


async def test_one_process_leads_and_another_takes_over_when_it_closes(scene: Scene, monkeypatch: Any) -> None:
    async def at_once(stop: asyncio.Event, seconds: float) -> None:
        scene.clock.now += seconds

    monkeypatch.setattr(deleted_items, "_until", at_once)
    await scene.after(0)
    first, scene.follower = scene.follower, scene.make("standby")
    scene.consumer.log = {PARTS[0]: [said(0, 0, "a")], PARTS[1]: []}
    await scene.after(0)
    assert scene.opened == 1 and await scene.marked() == set()
    await scene.follower.close()  # a standby has nothing to give back
    assert scene.items._leader == "me"
    await first.close()
    scene.follower = scene.make("standby")
    await scene.after(0)
    assert scene.opened == 2 and await scene.marked() == {"a"} and scene.items._leader == "standby"


async def test_whether_the_topic_is_still_the_same_is_asked_once_an_interval(scene: Scene) -> None:
    asked, read = [], scene.read

    def noted(*_: Any) -> TopicIncarnation:
        asked.append(scene.clock.now - NOW)
        return read()

    scene.read = noted  # type: ignore[method-assign]
    topic_follower.read_incarnation = noted  # type: ignore[assignment]  # the fixture puts it back
    await scene.after(0)
    for _ in range(100):
        await scene.after(CHECK_SECONDS)
    assert asked == [60, 120, 180]


async def test_a_leader_that_lost_the_lead_reads_nothing_more(scene: Scene, monkeypatch: Any) -> None:
    async def at_once(stop: asyncio.Event, seconds: float) -> None: ...

    monkeypatch.setattr(deleted_items, "_until", at_once)
    await scene.after(0)
    scene.items._leader = "another"
    scene.consumer.log = {PARTS[0]: [said(0, 0, "a")], PARTS[1]: []}
    await scene.after(CHECK_SECONDS)
    assert await scene.marked() == set()
    scene.items._leader = None
    await scene.after(CHECK_SECONDS)
    assert await scene.marked() == {"a"} and scene.opened == 2


async def test_marks_that_the_store_lost_are_made_again(scene: Scene) -> None:
    scene.consumer.log = {PARTS[0]: [said(0, 0, "a"), said(0, 1, "old", days_ago=15)], PARTS[1]: []}
    await scene.after(0)
    scene.items._deleted.clear()
    scene.items._positions.clear()
    await scene.after(CHECK_SECONDS / 2)
    assert await scene.marked() == set()
    await scene.after(CHECK_SECONDS / 2)
    assert await scene.marked() == {"a"}


async def test_a_topic_that_was_created_again_is_read_from_its_beginning(scene: Scene, monkeypatch: Any) -> None:
    async def at_once(stop: asyncio.Event, seconds: float) -> None: ...

    monkeypatch.setattr(deleted_items, "_until", at_once)
    scene.consumer.log = {PARTS[0]: [said(0, 0, "a")], PARTS[1]: []}
    await scene.after(0)
    scene.missing = True
    assert await scene.after(60) == [] and scene.opened == 1  # it is being created
    await scene.after(CHECK_SECONDS)
    scene.missing, scene.topic_id = False, "i2"
    scene.consumer.log = {PARTS[0]: [said(0, 0, "b")], PARTS[1]: []}
    await scene.after(CHECK_SECONDS)
    assert scene.opened == 2 and await scene.marked() == {"a", "b"}
    assert await scene.items.positions() == {"i1:0": 1, "i2:0": 1}
    scene.topic_id = "i3"
    scene.consumer.log = {PARTS[0]: [said(0, 0, "c")], PARTS[1]: []}
    await scene.after(58)
    assert scene.opened == 2  # it was looked at less than a minute ago
    await scene.after(CHECK_SECONDS)
    assert scene.opened == 3 and "c" in await scene.marked()


async def test_a_topic_that_is_cut_off_while_it_is_read_is_opened_again(scene: Scene, monkeypatch: Any) -> None:
    await scene.after(0)
    scene.consumer.fetch_failure = OffsetOutOfRangeError({PARTS[0]: 3})
    await scene.after(1)
    scene.consumer.log = {PARTS[0]: [said(0, 0, "a")], PARTS[1]: []}
    await scene.after(CHECK_SECONDS)
    assert scene.opened == 2 and await scene.marked() == {"a"}


async def test_a_clock_that_was_set_back_holds_no_check_up(scene: Scene) -> None:
    await scene.after(0)
    scene.items._positions.clear()
    scene.consumer.log = {PARTS[0]: [said(0, 0, "a")], PARTS[1]: []}
    await scene.after(-3_600)
    assert scene.items._leader == "me" and await scene.marked() == {"a"}
    scene.items._deleted.clear()
    scene.items._positions.clear()
    await scene.after(-3_600)
    assert await scene.marked() == {"a"}


async def test_a_mark_is_forgotten_by_the_first_sweep_after_no_behaviour_of_its_item_can_come(scene: Scene) -> None:
    scene.consumer.log = {PARTS[0]: [said(0, 0, "old", days_ago=13.9), said(0, 1, "new")], PARTS[1]: []}
    await scene.after(0)
    assert await scene.after(CHECK_SECONDS) == [0] and await scene.marked() == {"old", "new"}
    assert await scene.after(0.2 * DAY) == [0] and await scene.marked() == {"new"}


async def test_a_sweep_rests_four_times_as_long_as_each_page_took_and_not_after_the_last(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, rests, sweep = Clock(), list[float](), scene.items.sweep

    async def slow(cursor: int) -> tuple[int, int]:
        taken.now += 0.5
        return await sweep(cursor)

    async def rest(stop: asyncio.Event, seconds: float) -> None:
        rests.append(seconds)

    monkeypatch.setattr(scene.items, "sweep", slow)
    monkeypatch.setattr(deleted_items, "_until", rest)
    monkeypatch.setattr(deleted_items, "time", SimpleNamespace(monotonic=taken))
    scene.consumer.log = {PARTS[0]: [said(0, 0, "a")], PARTS[1]: []}
    scene.items.pages = 3
    await scene.after(0)
    assert await scene.after(CHECK_SECONDS) == [0, 1, 2]
    assert rests == [2.0, 2.0] and [(one.removed, one.seconds) for one in scene.reports] == [(6, 1.5)]
    assert scene.items.noted == []  # the lead is asked for again after a third of its time, not before


async def test_it_follows_until_it_is_stopped_and_waits_for_a_store_that_is_away(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.consumer.log = {PARTS[0]: [said(0, 0, "a")], PARTS[1]: []}
    mark, away = scene.items.mark, [StoreUnavailable("Redis", "away")]

    async def unsteady(states: Any, **place: Any) -> int:
        if away:
            raise away.pop()
        return await mark(states, **place)

    monkeypatch.setattr(scene.items, "mark", unsteady)
    running = asyncio.create_task(scene.follower.run(scene.stop))
    async with asyncio.timeout(10):
        while not await scene.marked():
            await asyncio.sleep(0.01)
    scene.stop.set()
    await asyncio.wait_for(running, 5)
    assert await scene.items.positions() == {"i1:0": 1}


async def test_a_store_that_is_away_at_the_end_is_not_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(who: str) -> None:
        raise StoreUnavailable("Redis", "away")

    monkeypatch.setattr(scene.items, "resign", away)
    await scene.after(0)
    await scene.follower.close()
    assert scene.consumer.stops == 1 and scene.items._leader == "me"  # the lease ends by itself
