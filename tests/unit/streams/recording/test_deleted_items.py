"""When takes of deleted items are swept, and what a record of `items` says of its item."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from aiokafka import TopicPartition

from streams.broker import topic_follower
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics
from streams.broker.topics import TopicsConfig
from streams.recording.config import RecordConfig
from streams.recording.deleted_items import (
    CHECK_SECONDS,
    CLOCK_SECONDS,
    SETTLE_SECONDS,
    DeletedItemFollower,
    read_states,
    sweep_due,
)
from streams.stores.histories.config import BehaviourStoreConfig
from streams.stores.histories.deleted_items import InMemoryDeletedItems, SweepReport, Sweeps
from streams.stores.histories.item_order import ItemState
from streams.stores.histories.store import InMemoryBehaviourStore
from tests.factories.click_log import LOG, event
from tests.factories.fake_consumer import IN_TIME_MS, FakeConsumer, FakeRecord

Raw = partial(FakeRecord, 0, 0)
GONE = ItemState(1_000, is_deleted=True)


def test_the_last_record_of_an_item_says_whether_it_is_deleted_and_nothing_is_decoded() -> None:
    records = [
        Raw(b"gone", b"{}", 4_000),
        Raw(b"gone", None, 7_250),
        Raw(b"back", None, 5_500),
        Raw(b"back", b"not even JSON", 5_000),  # of a clock that steps back
        Raw(None, None),
        Raw(b"\xff", None),
        Raw(b"", None),
    ]
    assert read_states(records, now=9.0) == {"gone": ItemState(7_250, True), "back": ItemState(5_500, False)}


def test_a_deletion_whose_record_has_no_usable_timestamp_is_one_of_now() -> None:
    for timestamp in (-1, -62_135_600_400_000, 1_767_225_600_000_000):
        assert read_states([Raw(b"gone", None, timestamp)], now=9.0) == {"gone": ItemState(9_000, True)}


@pytest.mark.parametrize(
    ("state", "now", "due"),
    [
        (Sweeps(0, "0:3", None, None), 0.0, False),
        (Sweeps(1, "0:3", None, None), 0.0, True),
        (Sweeps(1, "0:3", "0:2", 100.0), 129.0, False),
        (Sweeps(1, "0:3", "0:2", 100.0), 130.0, True),
        (Sweeps(1, "1:3", "0:3", 100.0), 130.0, True),
        (Sweeps(1, "0:3", "0:3", 100.0), 999.0, False),
        (Sweeps(1, "0:3", "0:3", 100.0), 1_000.0, True),
        (Sweeps(1, "0:3", "0:3", 100.0), 99.0, True),
    ],
    ids=["no marks", "first", "gathers", "new marks", "rebuilt", "nothing new", "late takes", "clock set back"],
)
def test_new_marks_are_swept_soon_and_old_ones_again_later(state: Sweeps, now: float, due: bool) -> None:
    assert sweep_due(state, now, gather_seconds=30.0, late_seconds=900.0) is due


class SlowSweeps(InMemoryDeletedItems):
    """Ten pages of users, and a stop after some of them."""

    def __init__(self, stop: asyncio.Event, pages: int) -> None:
        super().__init__(InMemoryBehaviourStore(BehaviourStoreConfig()))
        self.stop, self.pages, self.asked = stop, pages, list[int]()

    async def sweep(self, cursor: int) -> tuple[int, int]:
        self.asked.append(cursor)
        if len(self.asked) == self.pages:
            self.stop.set()
        return (cursor + 1) % 10, 1


async def test_a_restarted_process_goes_on_with_the_sweep_where_it_stopped() -> None:
    stop = asyncio.Event()
    items = SlowSweeps(stop, pages=4)
    await items.mark({"a": GONE}, source="t:0", next_offset=1)
    reports: list[SweepReport] = []

    def follower() -> DeletedItemFollower:
        return DeletedItemFollower(
            items,
            BrokerConfig(),
            TopicsConfig(),
            RecordConfig(),
            member="m",
            clock=lambda: 5.0,
            on_report=reports.append,
        )

    await follower()._sweep(stop)
    assert (items.asked, reports) == ([0, 1, 2, 3], [])
    await items.mark({"b": GONE}, source="t:0", next_offset=2)
    await follower()._sweep(asyncio.Event())
    assert items.asked == list(range(10))
    state = await items.sweeps()
    assert (len(reports), state.unfinished, state.swept_marks, state.marks) == (1, None, "1", "2")


FIRST, SECOND = (TopicPartition("mim.items", number) for number in (0, 1))
NOW = IN_TIME_MS / 1000


class Place:
    """A follower over two partitions of `items`, and a user who took `a`."""

    def __init__(self, log: dict[TopicPartition, list[FakeRecord]]) -> None:
        self.store = InMemoryBehaviourStore()
        self.items = InMemoryDeletedItems(self.store)
        self.consumer, self.now = FakeConsumer(log), NOW
        self.stop = asyncio.Event()
        self.follower = DeletedItemFollower(
            self.items, BrokerConfig(), TopicsConfig(), RecordConfig(), member="m", clock=lambda: self.now
        )

    async def pass_by(self, seconds: float) -> None:
        """Let so much time go by, and what is due be done."""
        self.now += seconds
        for _ in range(3):
            await self.follower.run_once(self.stop)
            self.now += CHECK_SECONDS

    async def taken(self) -> list[str]:
        return await self.store.taken_items("u1")


@pytest.fixture
async def place(monkeypatch: pytest.MonkeyPatch) -> Any:
    place = Place({FIRST: [], SECOND: []})
    await place.store.bind(LOG)
    await place.store.record(0, [event(0, item="a")], first_offset=0, next_offset=1)
    monkeypatch.setattr(topic_follower, "make_consumer", lambda *_: place.consumer)
    found = ClusterTopics("c", {"items": "t"}, {"items": [0, 1]})
    monkeypatch.setattr(topic_follower, "describe_topics", lambda *_: found)
    monkeypatch.setattr(topic_follower, "read_incarnation", lambda *_: found.incarnation(TopicsConfig(), "items"))
    return place


async def test_an_item_that_another_partition_deleted_earlier_keeps_its_takes(place: Place) -> None:
    place.consumer.log = {
        FIRST: [FakeRecord(0, 0, b"a", b"{}", IN_TIME_MS + 2)],
        SECOND: [FakeRecord(1, 0, b"a", None, IN_TIME_MS + 1)],
    }
    await place.pass_by(60)
    assert await place.taken() == ["a"]
    place.consumer.log[SECOND].append(FakeRecord(1, 1, b"a", None, IN_TIME_MS + 3))
    await place.pass_by(60)
    assert await place.taken() == []


async def test_the_order_of_records_is_kept_for_an_hour_and_no_longer_deletions_or_not(place: Place) -> None:
    place.consumer.log = {FIRST: [FakeRecord(0, n, b"%d" % n, b"{}", IN_TIME_MS) for n in range(5)], SECOND: []}
    await place.pass_by(60)
    assert len(place.items.places) == 5
    await place.pass_by(CLOCK_SECONDS - SETTLE_SECONDS - 120)
    assert len(place.items.places) == 5
    await place.pass_by(2 * SETTLE_SECONDS)
    assert not place.items.places
