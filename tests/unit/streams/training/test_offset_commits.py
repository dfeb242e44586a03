"""Offsets of the consumer group: when they are committed, one commit at a time, and the last one in any case."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from aiokafka import TopicPartition

from schemas.errors import BrokerUnavailable, Fenced
from streams.training.offset_commits import OffsetCommits


class Leads:
    """A leadership whose transactions wait for `gate` and may fail."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.committed: list[dict[TopicPartition, int]] = []
        self.confirmed = 0
        self.under_way = 0

    def confirm(self) -> None:
        self.confirmed += 1

    async def transact(self, records: Any = (), offsets: Mapping[TopicPartition, int] | None = None) -> None:
        self.under_way += 1
        assert self.under_way == 1, "one at a time"
        await self.gate.wait()
        self.under_way -= 1
        if self.failure is not None:
            raise self.failure
        self.committed.append(dict(offsets or {}))


class Scene:
    def __init__(self) -> None:
        self.leads, self.now, self.done = Leads(), 0.0, 0
        self.commits = OffsetCommits(
            self.leads,  # type: ignore[arg-type]
            lambda: {0: self.done, 3: 7},
            topic="mim.behaviours",
            interval_seconds=10,
            clock=lambda: self.now,
        )

    async def after(self, seconds: float) -> list[int]:
        """The offsets of partition 0 that were committed so far."""
        self.now += seconds
        self.done += 1
        await self.commits.commit_if_due()
        for _ in range(3):
            await asyncio.sleep(0)
        return [one[TopicPartition("mim.behaviours", 0)] for one in self.leads.committed]


@pytest.fixture
async def scene() -> Scene:
    return Scene()


async def test_a_commit_is_due_once_an_interval_or_when_it_was_asked_for(scene: Scene) -> None:
    assert await scene.after(0) == [1]
    assert await scene.after(9) == [1]
    assert await scene.after(1) == [1, 3]
    scene.commits.commit_soon()
    assert await scene.after(1) == [1, 3, 4]
    assert await scene.after(1) == [1, 3, 4]
    assert scene.leads.committed[-1] == {TopicPartition("mim.behaviours", 0): 4, TopicPartition("mim.behaviours", 3): 7}


async def test_one_commit_is_under_way_at_a_time_and_a_slow_one_holds_nothing_up(scene: Scene) -> None:
    scene.leads.gate.clear()
    assert await scene.after(0) == [] and await scene.after(20) == []
    scene.leads.gate.set()
    await asyncio.sleep(0)
    assert await scene.after(0) == [1, 3]


async def test_a_broker_that_is_away_delays_a_commit_and_a_lost_leadership_ends_it(scene: Scene) -> None:
    scene.leads.failure = BrokerUnavailable("Kafka", "away")
    assert await scene.after(0) == []
    scene.leads.failure = None
    assert await scene.after(10) == [2]
    scene.leads.failure = Fenced("another process leads")
    await scene.after(10)
    with pytest.raises(Fenced):
        await scene.after(0)


async def test_the_final_commit_comes_after_the_one_under_way_and_holds_everything(scene: Scene) -> None:
    scene.leads.gate.clear()
    await scene.after(0)
    scene.done = 9
    final = asyncio.create_task(scene.commits.commit_final())
    await asyncio.sleep(0)
    scene.leads.gate.set()
    await final
    assert [one[TopicPartition("mim.behaviours", 0)] for one in scene.leads.committed] == [1, 9]
    scene.leads.failure = BrokerUnavailable("Kafka", "away")
    with pytest.raises(BrokerUnavailable):
        await scene.commits.commit_final()


async def test_the_final_commit_is_made_though_the_one_under_way_fails(scene: Scene) -> None:
    scene.leads.gate.clear()
    await scene.after(0)
    scene.leads.failure = BrokerUnavailable("Kafka", "away")
    final = asyncio.create_task(scene.commits.commit_final())
    await asyncio.sleep(0)
    scene.leads.gate.set()
    await asyncio.sleep(0)
    scene.leads.failure = None
    await final
    assert len(scene.leads.committed) == 1


async def test_a_commit_that_is_cancelled_writes_nothing_and_leadership_is_asked_for(scene: Scene) -> None:
    scene.commits.cancel()
    scene.leads.gate.clear()
    await scene.after(0)
    scene.commits.cancel()
    scene.leads.gate.set()
    assert await scene.after(0) == []
    scene.commits.confirm()
    assert scene.leads.confirmed == 1
