"""Where a follower of a topic goes on: after a batch, after a failure, and from stored positions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import OffsetOutOfRangeError

from schemas.errors import Misconfigured, StoreUnavailable
from streams.broker import topic_follower
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics, TopicIncarnation
from streams.broker.topic_follower import TopicFollower
from streams.broker.topics import TopicsConfig
from tests.factories.fake_consumer import IN_TIME_MS, FakeConsumer, FakeRecord

FIRST, SECOND = (TopicPartition("mim.items", number) for number in (0, 1))


class Handler:
    """Stores the offsets of each source, and fails for the sources in `away`."""

    def __init__(self) -> None:
        self.offsets: list[tuple[str, int]] = []
        self.away: set[str] = set()

    async def handle(self, records: Sequence[Any], source: str, next_offset: int) -> None:
        if source in self.away:
            raise StoreUnavailable("store", "away")
        assert next_offset == records[-1].offset + 1
        self.offsets += [(source, record.offset) for record in records]


@pytest.fixture
def consumer(monkeypatch: pytest.MonkeyPatch) -> FakeConsumer:
    made = FakeConsumer(
        {one: [FakeRecord(one.partition, offset) for offset in (3, 4, 7)] for one in (FIRST, SECOND)}, beginning=3
    )
    found = ClusterTopics("c", {"items": "t1"}, {"items": [0, 1]})
    monkeypatch.setattr(topic_follower, "make_consumer", lambda *_: made)
    monkeypatch.setattr(topic_follower, "describe_topics", lambda *_: found)
    return made


def make_follower(handler: Handler) -> TopicFollower:
    return TopicFollower(BrokerConfig(), TopicsConfig(), "items", handler.handle)


async def test_a_source_with_a_position_goes_on_there_and_one_without_begins_at_the_beginning(
    consumer: FakeConsumer,
) -> None:
    handler = Handler()
    follower = make_follower(handler)
    await follower.open({"t1:1": 7, "an older incarnation:0": 7})
    await asyncio.wait_for(follower.catch_up(), 5)
    assert handler.offsets == [("t1:0", 3), ("t1:0", 4), ("t1:0", 7), ("t1:1", 7)]
    assert follower.handled == {"t1:0": 8, "t1:1": 8}


async def test_after_a_failure_only_what_was_not_handled_comes_again(consumer: FakeConsumer) -> None:
    handler = Handler()
    follower = make_follower(handler)
    await follower.open()
    handler.away = {"t1:1"}
    with pytest.raises(StoreUnavailable):
        await follower.poll(wait_seconds=0)
    assert consumer.positions == {FIRST: 8, SECOND: 3}
    handler.away = set()
    await asyncio.wait_for(follower.catch_up(), 5)
    assert handler.offsets == [(source, offset) for source in ("t1:0", "t1:1") for offset in (3, 4, 7)]


async def test_a_failure_of_the_first_partition_loses_nothing_of_the_next(consumer: FakeConsumer) -> None:
    handler = Handler()
    follower = make_follower(handler)
    await follower.open()
    handler.away = {"t1:0"}
    with pytest.raises(StoreUnavailable):
        await follower.poll(wait_seconds=0)
    assert consumer.positions == {FIRST: 3, SECOND: 3}
    assert follower.handled == {}


async def test_a_store_that_lost_a_position_is_noticed(consumer: FakeConsumer) -> None:
    follower = make_follower(Handler())
    await follower.open()
    await asyncio.wait_for(follower.catch_up(), 5)
    assert not follower.is_ahead_of({"t1:0": 8, "t1:1": 8})
    assert follower.is_ahead_of({"t1:0": 8})
    await follower.seek({"t1:0": 8})
    assert consumer.positions == {FIRST: 8, SECOND: 3} and not follower.is_ahead_of({})


@pytest.mark.parametrize(
    ("second", "first", "starts"),
    [(0, {}, {FIRST: 3, SECOND: 3}), (3.5, {}, {FIRST: 4, SECOND: 4}), (8, {}, {FIRST: 8, SECOND: 8}),
     (3.5, {"t1:0": 7}, {FIRST: 7, SECOND: 4}), (8, {"t1:1": 1}, {FIRST: 8, SECOND: 3})],
    ids=["the beginning", "in between", "after the end", "one has a position", "a position before the beginning"],
)  # fmt: skip
async def test_a_source_without_a_position_begins_at_the_first_record_since_a_moment(
    consumer: FakeConsumer, second: float, first: dict[str, int], starts: dict[TopicPartition, int]
) -> None:
    consumer.log = {
        one: [replace(record, timestamp=IN_TIME_MS + 1_000 * record.offset) for record in records]
        for one, records in consumer.log.items()
    }
    since = datetime.fromtimestamp(IN_TIME_MS / 1_000 + second, UTC)
    await make_follower(Handler()).open(first, since=since)
    assert consumer.positions == starts


async def test_it_has_reached_an_end_once_every_partition_has(consumer: FakeConsumer) -> None:
    follower = make_follower(Handler())
    await follower.open({"t1:0": 8})
    ends = await follower.ends()
    assert ends == {FIRST: 8, SECOND: 8} and not await follower.has_reached(ends)
    assert await follower.has_reached({FIRST: 8}) and await follower.has_reached({SECOND: 3})
    await follower.poll(wait_seconds=0)
    assert await follower.has_reached(ends)


async def test_a_topic_that_was_created_again_or_cut_off_is_noticed(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = make_follower(Handler())
    await follower.open()
    for topic_id, same in (("t1", True), ("t2", False)):
        now = TopicIncarnation("c", "mim.items", topic_id)
        monkeypatch.setattr(topic_follower, "read_incarnation", lambda *_, now=now: now)
        assert await follower.is_same_topic() is same
    consumer.fetch_failure = OffsetOutOfRangeError({FIRST: 3})
    with pytest.raises(Misconfigured, match=r"'mim\.items' was cut off or replaced"):
        await follower.poll(wait_seconds=0)
    await follower.close()
    await follower.close()
    assert consumer.stops == 1
