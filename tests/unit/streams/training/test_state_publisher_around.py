"""Writes of states beside a topic that is looked at, a log of servers' rows, and a trainer that ends."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError
from structlog.testing import capture_logs

from schemas.errors import BrokerUnavailable, Misconfigured
from streams.broker import topic_follower
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics
from streams.broker.topics import TopicsConfig
from streams.training.state_publisher import read_states
from tests.factories.fake_consumer import FakeConsumer, FakeRecord
from tests.factories.state_pipe import TAKES, Pipe
from tests.factories.state_publishing import Scene


async def looked(scene: Scene) -> list[str]:
    """What is told by the time the topic was looked at once more."""
    with capture_logs() as logs:
        await scene.after(60)
        if (looking := scene.publisher._looking) is not None:
            await asyncio.wait([looking])
        await scene.after(1)
    return [line["event"] for line in logs if line["log_level"] == "warning"]


async def test_a_topic_is_looked_at_a_minute_after_it_was_opened_and_not_before() -> None:
    scene = Scene()
    await scene.publisher.open()
    for seconds, looks in ((59.9, 1), (0.1, 2), (59.9, 2)):
        await scene.after(seconds)
        if (looking := scene.publisher._looking) is not None:
            await asyncio.wait([looking])
        assert scene.looks == looks


async def test_where_states_are_due_more_than_once_a_second_they_are_written_as_often() -> None:
    scene = Scene(every_seconds=0.25)
    await scene.publisher.open()
    for writes in (1, 2, 3):
        scene.take(1)
        assert await scene.after(0.25) == writes


async def test_a_topic_that_was_replaced_is_told_and_written_once() -> None:
    scene = Scene()
    await scene.publisher.open()
    scene.take(30)
    await scene.after(0)
    scene.topic_id = "t2"
    assert await looked(scene) == ["train.states_topic_replaced"]
    await scene.after(10)
    written = len(scene.leads.topic)
    assert await looked(scene) == [] and len(scene.leads.topic) == written


@pytest.mark.parametrize("error", [BrokerUnavailable("Kafka", "away"), Misconfigured("no right to describe it")])
async def test_a_topic_that_cannot_be_looked_at_holds_up_no_write_and_is_looked_at_again(error: Exception) -> None:
    scene = Scene()
    await scene.publisher.open()
    scene.take(5)
    assert await scene.after(0) == 1
    read_id = scene.publisher._read_id

    def refused() -> str:
        raise error

    scene.publisher._read_id = refused
    scene.take(5)
    assert await looked(scene) == ["train.states_topic_unknown"]
    assert len(scene.leads.sizes) == 2 and scene.lag == 0
    scene.publisher._read_id = read_id
    assert await looked(scene) == [] and len(scene.leads.sizes) == 2


async def test_a_topic_that_is_ahead_is_told_once() -> None:
    former = Scene()
    former.take(60)
    await former.publisher.publish_rest(asyncio.Event())
    scene = Scene(former.leads.topic)
    await scene.publisher.open()
    scene.take(50)
    with capture_logs() as logs:
        for _ in range(3):
            await scene.after(100)
    assert [line["event"] for line in logs if line["event"] == "train.states_ahead"] == ["train.states_ahead"]


async def test_while_nothing_changes_it_is_asked_once_an_interval_whether_something_did() -> None:
    scene = Scene()
    await scene.publisher.open()
    scene.take(5)
    await scene.after(0)
    asked, honest = [], scene.publisher._next

    def counted(trainer: Any) -> Any:
        asked.append(scene.now)
        return honest(trainer)

    scene.publisher._next = counted  # type: ignore[method-assign]
    for _ in range(25):
        await scene.after(1)
    assert len(asked) == 2


class Logged:
    """The topic of servers' rows; a fetch can fail."""

    def __init__(self) -> None:
        self.since: datetime | None = None
        self.polls = self.closes = 0
        self.failure: Exception | None = None

    async def open(self, *, since: datetime) -> None:
        self.since = since

    async def poll(self, *, wait_seconds: float) -> None:
        assert wait_seconds == 0, "training waits for no row"
        self.polls += 1
        if self.failure is not None:
            raise self.failure

    async def close(self) -> None:
        self.closes += 1


async def test_rows_of_servers_are_read_from_the_start_on_once_a_second_and_a_failed_fetch_holds_up_no_write() -> None:
    scene, logged = Scene(), Logged()
    scene.skew._follower = logged  # type: ignore[assignment]
    await scene.publisher.open()
    assert logged.since == datetime.fromtimestamp(scene.now, UTC)
    for _ in range(4):
        await scene.after(0.5)
    assert logged.polls == 2
    logged.failure = BrokerUnavailable("Kafka", "away")
    scene.take(5)
    with capture_logs() as logs:
        await scene.after(10)
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == ["train.broker_away"]
    assert logged.polls == 3 and scene.lag == 0
    await scene.publisher.close()
    assert logged.closes == 1


async def test_outcomes_that_a_broker_did_not_take_are_all_written_when_it_is_back() -> None:
    scene = Scene()
    await scene.publisher.open()
    scene.take(5)
    await scene.after(0)
    scene.leads.failure = BrokerUnavailable("Kafka", "away")
    for item in ("i1", "i2"):
        scene.skew.hear(scene.served(item))
        await scene.after(30)
    assert scene.leads.outcomes == [] and [report.rows for report in scene.reports] == [1, 1]
    scene.leads.failure = None
    await scene.after(30)
    assert len(scene.leads.outcomes) == 2
    await scene.after(30)
    assert len(scene.leads.outcomes) == 2, "once"


async def test_the_end_of_a_run_waits_for_the_write_under_way_and_writes_what_came_meanwhile() -> None:
    scene = Scene()
    await scene.publisher.open()
    scene.leads.gate.clear()
    scene.take(5)
    await scene.after(0)
    scene.take(3)
    ending = asyncio.create_task(scene.publisher.publish_rest(asyncio.Event()))
    await asyncio.sleep(0)
    assert not ending.done()
    scene.leads.gate.set()
    await asyncio.wait_for(ending, 5)
    assert len(scene.leads.sizes) == 2 and scene.lag == 0


async def test_a_process_that_ends_leaves_no_write_and_no_look_under_way() -> None:
    scene, answer = Scene(), threading.Event()
    await scene.publisher.open()
    scene.publisher._read_id = lambda: "t" if answer.wait(60) else ""
    await scene.after(60)
    looking = scene.publisher._looking
    assert looking is not None and not looking.done()
    scene.leads.gate.clear()
    scene.take(5)
    await scene.after(10)
    writing = scene.publisher._writing
    assert writing is not None and not writing.done()
    await scene.publisher.close()
    try:
        await asyncio.wait([writing, looking], timeout=5)
        assert writing.cancelled() and looking.cancelled() and len(scene.leads.sizes) == 1
    finally:
        answer.set()


@pytest.mark.parametrize("away", [False, True])
async def test_all_that_the_topic_holds_is_heard_and_its_connection_closed(
    monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    pipe, heard = Pipe(), list[Any]()
    pipe.count(TAKES[:50])
    pipe.write()
    partition = TopicPartition("mim.item-states", 0)
    consumer = FakeConsumer({partition: [FakeRecord(0, n, *record) for n, record in enumerate(pipe.topic)]})
    consumer.fetch_failure = KafkaConnectionError("away") if away else None
    monkeypatch.setattr(topic_follower, "make_consumer", lambda *_: consumer)
    found = ClusterTopics("c", {"item-states": "t"}, {"item-states": [0]})
    monkeypatch.setattr(topic_follower, "describe_topics", lambda *_: found)
    writer: Any = SimpleNamespace(heard=lambda *record: heard.append(record))
    reading = asyncio.wait_for(read_states(BrokerConfig(), TopicsConfig(), writer), 5)
    if away:
        with pytest.raises(BrokerUnavailable):
            await reading
    else:
        await reading
    assert heard == ([] if away else pipe.topic) and consumer.stops == 1
