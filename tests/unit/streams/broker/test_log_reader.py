"""What a reader of a piece of a log returns, and how far groups are behind what was sent."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition

from schemas.errors import BrokerUnavailable
from schemas.forgotten import ForgottenUser
from streams.broker import lag, log_reader, topic_follower
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics
from streams.broker.forgotten import read_forgotten_users
from streams.broker.lag import GroupPositions
from streams.broker.log_reader import LogReader, read_beginnings, read_ends
from streams.broker.topics import TopicsConfig
from tests.factories.fake_consumer import IN_TIME_MS, FakeConsumer, FakeRecord

ITEMS = [TopicPartition("mim.items", number) for number in (0, 1)]
CLICKS = TopicPartition("mim.behaviours", 0)
FOUND = ClusterTopics("c", {"items": "i", "behaviours": "b"}, {"items": [0, 1], "behaviours": [0]})


def at(partition: int, *offsets: int) -> list[FakeRecord]:
    return [FakeRecord(partition, offset, timestamp=IN_TIME_MS + 1_000 * offset) for offset in offsets]


class Kafka:
    """A broker in memory; `away` questions about groups are not answered."""

    def __init__(self) -> None:
        self.consumer = FakeConsumer({ITEMS[0]: at(0, 2, 3, 7), ITEMS[1]: [], CLICKS: at(0, 4, 5)}, beginning=2)
        self.groups: dict[str, dict[TopicPartition, int]] = {}
        self.away = 0
        self.asked: list[str] = []
        self.isolation: Any = None
        self.started = self.closed = 0

    def make_consumer(self, _: Any, **options: Any) -> FakeConsumer:
        self.isolation = options.get("isolation_level")
        return self.consumer

    def make_admin(self, **_: Any) -> Any:
        return self

    async def start(self) -> None:
        self.started += 1

    async def close(self) -> None:
        self.closed += 1

    async def list_consumer_group_offsets(self, group: str) -> Any:
        self.asked.append(group)
        if self.away:
            self.away -= 1
            raise BrokerUnavailable("Kafka", "not ready")
        return {one: SimpleNamespace(offset=offset) for one, offset in self.groups.get(group, {}).items()}

    def describe(self, broker: Any, topics: Any, names: Any) -> ClusterTopics:
        chosen = list(names)
        return ClusterTopics("c", {n: FOUND.topic_ids[n] for n in chosen}, {n: FOUND.partitions[n] for n in chosen})


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> Kafka:
    made = Kafka()
    monkeypatch.setattr(log_reader, "make_consumer", made.make_consumer)
    monkeypatch.setattr(log_reader, "AIOKafkaAdminClient", made.make_admin)
    for module in (log_reader, lag):
        monkeypatch.setattr(module, "describe_topics", made.describe)
    monkeypatch.setattr(log_reader, "_TRY_EVERY_SECONDS", 0.0)
    return made


def reader() -> LogReader:
    return LogReader(BrokerConfig(), TopicsConfig())


async def offsets(found: Any) -> list[tuple[int, int]]:
    return [(record.partition, record.offset) async for record in found]


@pytest.mark.parametrize(
    ("start", "end", "read"),
    [
        (2, 8, [2, 3, 7]),
        (2, 7, [2, 3]),
        (3, 4, [3]),
        (4, 7, []),  # compacted away
        (4, 8, [7]),
        (3, 3, []),
        (7, 3, []),
    ],
)
async def test_a_span_is_read_from_its_start_to_before_its_end(
    kafka: Kafka, start: int, end: int, read: list[int]
) -> None:
    async with reader() as log:
        assert await offsets(log.read(ITEMS[0], start, end)) == [(0, offset) for offset in read]
    assert (kafka.isolation, kafka.started, kafka.closed) == ("read_committed", 1, 1)


async def test_a_topic_is_read_whole_and_one_record_by_its_offset(kafka: Kafka) -> None:
    async with reader() as log:
        kafka.consumer.log = {**kafka.consumer.log, ITEMS[1]: at(1, 2)}
        assert await offsets(log.read_topic("items")) == [(0, 2), (0, 3), (0, 7), (1, 2)]
        found = await log.one(ITEMS[0], 3)
        assert found is not None and found.offset == 3
        assert await log.one(ITEMS[0], 5) is None and await log.one(ITEMS[0], 6) is None
        assert await log.bounds(ITEMS) == {ITEMS[0]: (2, 8), ITEMS[1]: (2, 3)} and await log.end(ITEMS[0]) == 8


async def test_the_first_record_since_a_moment_is_found_where_there_is_one(kafka: Kafka) -> None:
    moment = datetime.fromtimestamp(IN_TIME_MS / 1000 + 2.5, UTC)
    async with reader() as log:
        assert await log.first_since(ITEMS, moment) == {ITEMS[0]: 3, ITEMS[1]: None}


async def test_ends_count_open_transactions(kafka: Kafka) -> None:
    assert await read_ends(BrokerConfig(), TopicsConfig(), "items") == {0: 8, 1: 2}
    assert kafka.isolation == "read_uncommitted" and kafka.closed == 1
    kafka.consumer.beginning = 1
    assert await read_beginnings(BrokerConfig(), TopicsConfig(), "items") == {0: 1, 1: 1}
    assert kafka.isolation == "read_committed" and kafka.closed == 2


async def test_committed_positions_are_asked_for_again_a_few_times_and_those_never_committed_left_out(
    kafka: Kafka,
) -> None:
    kafka.groups = {"mim.train": {CLICKS: 4, ITEMS[0]: -1, ITEMS[1]: 0}}
    async with reader() as log:
        kafka.away = 9
        assert await log.committed("train") == {CLICKS: 4, ITEMS[1]: 0}
        assert kafka.asked == ["mim.train"] * 10
        kafka.away = 10
        with pytest.raises(BrokerUnavailable):
            await log.committed("train")
        assert kafka.away == 0


async def test_a_reader_that_cannot_start_is_closed(kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> None:
        raise BrokerUnavailable("Kafka", "away")

    monkeypatch.setattr(kafka.consumer, "start", fail)
    with pytest.raises(BrokerUnavailable):
        await reader().__aenter__()
    assert kafka.closed == 1


async def test_groups_are_counted_from_where_the_topics_ended_at_first(kafka: Kafka) -> None:
    followed: Any = {"items": ["index", "record"], "behaviours": ["record"]}
    async with GroupPositions(BrokerConfig(), TopicsConfig(), followed) as positions:
        kafka.groups = {
            "mim.index": {ITEMS[0]: 10, ITEMS[1]: 1, CLICKS: 99},  # 2 of the first; behind in the second; not followed
            "mim.record": {ITEMS[1]: 5, CLICKS: 9},
        }
        consumed = await positions.consumed()
    assert consumed == {"items": {"index": 2, "record": 3}, "behaviours": {"record": 3}}


async def test_groups_whose_topics_are_missing_leave_no_reader_open(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> ClusterTopics:
        raise BrokerUnavailable("Kafka", "away")

    monkeypatch.setattr(lag, "describe_topics", fail)
    with pytest.raises(BrokerUnavailable):
        await GroupPositions(BrokerConfig(), TopicsConfig(), {"items": ["index"]}).__aenter__()
    assert kafka.closed == 1


async def test_users_forgotten_so_far_are_those_of_this_click_log_up_to_their_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    partition = TopicPartition("mim.forgotten", 0)

    def gone(offset: int, user: str, topic_id: str, end: int) -> FakeRecord:
        moment = datetime.fromtimestamp(IN_TIME_MS / 1000, UTC)
        ends = {0: end}
        made = ForgottenUser(user_id=user, forgotten_at=moment, cluster_id="c", topic_id=topic_id, ends=ends)
        return FakeRecord(0, offset, user.encode(), made.model_dump_json().encode())

    consumer = FakeConsumer({partition: [gone(0, "u1", "b", 5), gone(1, "u2", "other", 9), gone(2, "u3", "b", 1)]})
    found = ClusterTopics("c", {"forgotten": "f"}, {"forgotten": [0]})
    monkeypatch.setattr(topic_follower, "make_consumer", lambda *_: consumer)
    monkeypatch.setattr(topic_follower, "describe_topics", lambda *_: found)
    users = await read_forgotten_users(BrokerConfig(), TopicsConfig(), cluster_id="c", topic_id="b")
    asked = [("u1", 4), ("u1", 5), ("u2", 0), ("u3", 0), ("u3", 1), ("u4", 0)]
    assert [one for one in asked if users.erases(one[0], 0, one[1])] == [("u1", 4), ("u3", 0)]
    assert consumer.stops == 1
