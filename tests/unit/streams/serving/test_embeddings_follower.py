"""Confirming that nothing of `embeddings` is missed: it goes on after an outage, and never ends unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors

from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics
from streams.broker.topics import TopicsConfig
from streams.serving import embeddings_follower
from streams.serving.embeddings_follower import EmbeddingsFollower


class EmptyTopic:
    """A consumer of a topic that holds five old records and gets no new ones; asking where it ends can fail."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.failed = 0

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def assign(self, partitions: Sequence[TopicPartition]) -> None:
        pass

    def seek(self, partition: TopicPartition, offset: int) -> None:
        pass

    async def getmany(self, **_: Any) -> Mapping[TopicPartition, Sequence[Any]]:
        await asyncio.sleep(0.001)
        return {}

    async def position(self, partition: TopicPartition) -> int:
        return 5

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        if self.failure is not None:
            self.failed += 1
            raise self.failure
        return dict.fromkeys(partitions, 5)


class Confirmations:
    """Counts them."""

    def __init__(self) -> None:
        self.count = 0

    def confirm(self, at: float) -> None:
        self.count += 1


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not done():
            await asyncio.sleep(0.001)


@pytest.fixture
def topic(monkeypatch: pytest.MonkeyPatch) -> EmptyTopic:
    made = EmptyTopic()
    monkeypatch.setattr(embeddings_follower, "make_consumer", lambda *_: made)
    found = ClusterTopics("c", {}, {"embeddings": [0]})
    monkeypatch.setattr(embeddings_follower, "describe_topics", lambda *_: found)
    return made


def follower(confirmations: Any) -> EmbeddingsFollower:
    clock = asyncio.get_running_loop().time
    return EmbeddingsFollower(
        confirmations, BrokerConfig(), TopicsConfig(), warm_up=False, clock=clock, confirm_every_seconds=0.001
    )


async def test_after_an_outage_longer_than_the_clients_patience_confirmations_come_again(topic: EmptyTopic) -> None:
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


async def test_when_nobody_asks_for_ends_any_more_following_ends_too(topic: EmptyTopic) -> None:
    confirmations = Confirmations()
    running = asyncio.create_task(follower(confirmations).run(asyncio.Event()))
    await until(lambda: confirmations.count > 0)
    topic.failure = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(running, 10)
