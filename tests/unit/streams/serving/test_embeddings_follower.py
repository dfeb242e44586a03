"""Confirming that nothing of `embeddings` is missed: it goes on after an outage, and never ends unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
import structlog
from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors

from schemas.errors import Misconfigured
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics
from streams.broker.topics import TopicsConfig
from streams.serving import embeddings_follower
from streams.serving.embeddings_follower import EmbeddingsFollower
from tests.factories.fake_consumer import FakeConsumer, FakeRecord
from tests.factories.waiting import until


class QuietTopic(FakeConsumer):
    """A topic that holds one old record and gets no new ones; connecting and asking where it ends can fail."""

    async def start(self) -> None:
        self.starts += 1
        if self.refusal is not None:
            raise self.refusal

    def __init__(self) -> None:
        self.starts = 0
        self.refusal: Exception | None = None
        super().__init__({TopicPartition(TopicsConfig().full_name("embeddings"), 0): [FakeRecord(0, 4)]}, beginning=5)
        self.failure: Exception | None = None
        self.failed = 0

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        if self.failure is not None:
            self.failed += 1
            raise self.failure
        return await super().end_offsets(partitions)


class Confirmations:
    """Counts them."""

    def __init__(self) -> None:
        self.count = 0
        self.invalidations = 0

    def invalidate(self) -> None:
        self.invalidations += 1

    def confirm(self, at: float) -> None:
        self.count += 1


@pytest.fixture
def topic(monkeypatch: pytest.MonkeyPatch) -> QuietTopic:
    made = QuietTopic()
    monkeypatch.setattr(embeddings_follower, "make_consumer", lambda *_: made)
    found = ClusterTopics("c", {}, {"embeddings": [0]})
    monkeypatch.setattr(embeddings_follower, "describe_topics", lambda *_: found)
    return made


def follower(confirmations: Any) -> EmbeddingsFollower:
    clock = asyncio.get_running_loop().time
    return EmbeddingsFollower(
        confirmations,
        BrokerConfig(),
        TopicsConfig(),
        warm_up=False,
        clock=clock,
        confirm_every_seconds=0.001,
        retry_seconds=0.001,
    )


async def test_after_an_outage_longer_than_the_clients_patience_confirmations_come_again(topic: QuietTopic) -> None:
    confirmations, stop = Confirmations(), asyncio.Event()
    running = asyncio.create_task(follower(confirmations).run(stop))
    await until(lambda: confirmations.count > 2)
    topic.failure = kafka_errors.KafkaTimeoutError("Failed to get offsets by times in 20000 ms")
    await until(lambda: topic.failed > 2 or running.done())
    before, topic.failure = confirmations.count, None
    await until(lambda: confirmations.count > before + 2 or running.done())
    assert not running.done()
    stop.set()
    await running


async def test_a_broker_that_goes_away_is_asked_again_after_a_pause(topic: QuietTopic) -> None:
    topic.fetch_failure = kafka_errors.KafkaConnectionError("away")
    following = follower(Confirmations())
    following._poll_seconds = 1_000.0
    reading = asyncio.create_task(following._read(topic, list(topic.log)))
    await until(lambda: topic.fetch_failure is None)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not reading.done()
    reading.cancel()


async def test_when_nobody_asks_for_ends_any_more_following_ends_too(topic: QuietTopic) -> None:
    confirmations = Confirmations()
    running = asyncio.create_task(follower(confirmations).run(asyncio.Event()))
    await until(lambda: confirmations.count > 0)
    topic.failure = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(running, 10)
    assert topic.starts == topic.stops == 1


async def test_when_nothing_is_read_any_more_nobody_asks_for_ends_either(topic: QuietTopic) -> None:
    confirmations = Confirmations()
    following = follower(confirmations)
    running = asyncio.create_task(following.run(asyncio.Event()))
    await until(lambda: confirmations.count > 0)
    following._poll_seconds = 1_000.0
    topic.fetch_failure = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(running, 10)
    assert topic.stops == 1


async def test_without_kafka_it_says_so_at_once_and_catches_up_when_kafka_is_there(topic: QuietTopic) -> None:
    topic.refusal = kafka_errors.KafkaConnectionError("nothing listens")
    confirmations, stop, tried = Confirmations(), asyncio.Event(), asyncio.Event()
    with structlog.testing.capture_logs() as logged:
        running = asyncio.create_task(follower(confirmations).run(stop, tried.set))
        await asyncio.wait_for(tried.wait(), 10)
        await until(lambda: topic.starts > 3 or running.done(), every=0.001)
        assert (confirmations.count, confirmations.invalidations) == (0, 0)
        topic.refusal = None
        await until(lambda: confirmations.count > 2 or running.done(), every=0.001)
    assert not running.done()
    assert confirmations.invalidations == 1, "what was cached before the position may have changed before it"
    assert {line["event"] for line in logged} == {"representations.not_followed", "representations.followed"}
    stop.set()
    await running


async def test_a_topic_that_is_missing_ends_the_start_but_not_a_server_that_answers_already(
    topic: QuietTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(broker: object, topics: object, names: list[str]) -> ClusterTopics:
        assert names == ["embeddings", "models"], "a missing topic of notices would be waited for in silence"
        raise Misconfigured("run 'mimstream topics create'")

    found = embeddings_follower.describe_topics
    monkeypatch.setattr(embeddings_follower, "describe_topics", missing)
    with pytest.raises(Misconfigured, match="topics create"):
        await follower(Confirmations()).run(asyncio.Event())
    topic.refusal = kafka_errors.KafkaConnectionError("nothing listens")
    confirmations, stop, tried = Confirmations(), asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(follower(confirmations).run(stop, tried.set))
    await asyncio.wait_for(tried.wait(), 10)
    before, topic.refusal = topic.starts, None
    await until(lambda: topic.starts > before + 3 or running.done(), every=0.001)
    monkeypatch.setattr(embeddings_follower, "describe_topics", found)
    await until(lambda: confirmations.count > 0 or running.done(), every=0.001)
    stop.set()
    await running


class Cache:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.applied: list[tuple[bytes | None, bytes | None]] = []
        self.confirmed: list[float] = []
        self.invalidations = 0

    def apply(self, key: bytes | None, value: bytes | None) -> None:
        self.applied.append((key, value))

    def invalidate(self) -> None:
        self.invalidations += 1

    def confirm(self, at: float) -> None:
        self.confirmed.append(at)


PARTS = [TopicPartition("mim.embeddings", number) for number in (0, 1)]


class Steps:
    """A follower whose parts are called one after another."""

    def __init__(self, *, warm_up: bool) -> None:
        records = [FakeRecord(0, n, b"k%d" % n) for n in (3, 4)]
        self.consumer, self.cache, self.now = FakeConsumer({PARTS[0]: records, PARTS[1]: []}, beginning=3), Cache(), 0.0
        self.answer_seconds, self._ends = 0.0, self.consumer.end_offsets
        self.consumer.end_offsets = self.end_offsets  # type: ignore[method-assign]
        cache: Any = self.cache
        self.follower = EmbeddingsFollower(
            cache, BrokerConfig(), TopicsConfig(), warm_up=warm_up, clock=lambda: self.now, confirm_every_seconds=0.0
        )

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        self.now += self.answer_seconds
        return await self._ends(partitions)

    async def begin(self) -> None:
        await self.follower._seek_to_start(self.consumer, PARTS)

    async def read(self) -> None:
        await self.follower._read(self.consumer, PARTS)
        await self.follower._confirm(self.consumer)

    async def ask(self) -> None:
        """Ask once where the topic ends."""
        stop = asyncio.Event()
        asking = asyncio.create_task(self.follower._poll_ends(self.consumer, PARTS, stop))
        await asyncio.sleep(0)
        stop.set()
        await asking


@pytest.mark.parametrize(("warm_up", "applied"), [(True, [b"k3", b"k4", b"k5"]), (False, [b"k5"])])
async def test_it_begins_at_the_end_unless_the_cache_is_to_be_warmed_up(warm_up: bool, applied: list[bytes]) -> None:
    steps = Steps(warm_up=warm_up)
    await steps.begin()
    steps.consumer.log = {
        **steps.consumer.log,
        PARTS[0]: [*steps.consumer.log[PARTS[0]], FakeRecord(0, 5, b"k5", None)],
    }
    await steps.read()
    assert [key for key, _ in steps.cache.applied] == applied and steps.cache.applied[-1] == (b"k5", None)


async def test_the_cache_is_confirmed_as_of_when_the_end_was_asked_for_once_everything_before_it_is_applied() -> None:
    steps = Steps(warm_up=True)
    await steps.begin()
    await steps.read()
    assert steps.cache.confirmed == []  # no end was asked for
    steps.consumer.log = {PARTS[0]: [FakeRecord(0, 5)], PARTS[1]: [FakeRecord(1, 8)]}
    steps.now, steps.answer_seconds = 1.0, 0.5
    await steps.ask()
    steps.consumer.pause(PARTS[1])
    steps.now = 2.0
    await steps.read()
    assert steps.cache.confirmed == []
    await steps.ask()  # while behind, the end that was asked for first is kept
    steps.consumer.resume(PARTS[1])
    steps.now = 3.0
    await steps.read()
    assert steps.cache.confirmed == [1.0]
    await steps.read()
    assert steps.cache.confirmed == [1.0]  # each answer counts once


async def test_after_a_gap_it_goes_on_at_the_end_with_nothing_trusted() -> None:
    steps = Steps(warm_up=True)
    await steps.begin()
    steps.consumer.fetch_failure = kafka_errors.OffsetOutOfRangeError({PARTS[0]: 3})
    await steps.read()
    assert steps.cache.invalidations == 1 and steps.consumer.positions == {PARTS[0]: 5, PARTS[1]: 3}
    steps.consumer.fetch_failure = kafka_errors.KafkaConnectionError("away")
    await steps.read()
    assert steps.cache.invalidations == 1 and steps.cache.applied == []
