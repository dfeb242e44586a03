"""Who follows `forgotten` erases each user once, and again where the store has lost the mark."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime

import pytest
from aiokafka import TopicPartition

from schemas.errors import StoreUnavailable
from schemas.forgotten import ForgottenUser
from streams.broker import topic_follower
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics
from streams.broker.topics import TopicsConfig
from streams.recording.forgotten_users import CHECK_SECONDS, DROP_SECONDS, ErasureFollower
from streams.stores.histories.store import InMemoryBehaviourStore
from tests.factories.fake_consumer import IN_TIME_MS, FakeConsumer, FakeRecord
from tests.factories.waiting import Clock

PARTITION = TopicPartition("mim.forgotten", 0)


def request(offset: int) -> FakeRecord:
    moment = datetime.fromtimestamp(IN_TIME_MS / 1000, UTC)
    user = ForgottenUser(user_id=f"u{offset}", forgotten_at=moment, cluster_id="c", topic_id="b", ends={0: 9})
    return FakeRecord(0, offset, user.user_id.encode(), user.model_dump_json().encode())


class Store(InMemoryBehaviourStore):
    """Notes who was erased; may be away, and may lose its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.erased: list[str] = []
        self.at: dict[str, int] = {}
        self.away = 0
        self.dropped: list[set[str]] = []

    async def drop_spent_marks(self, beginnings: Mapping[int, int], *, sources: Collection[str]) -> int:
        self.dropped.append(set(sources))
        if self.away:
            self.away -= 1
            raise StoreUnavailable("Redis", "away")
        return 0

    async def forget(self, users: Sequence[ForgottenUser], *, source: str, next_offset: int) -> int:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("Redis", "away")
        self.erased += [user.user_id for user in users]
        self.at[source] = next_offset
        return len(users)

    async def forgotten_positions(self) -> dict[str, int]:
        return dict(self.at)


class Scene:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.consumer = FakeConsumer({PARTITION: [request(0), request(1)]})
        found = ClusterTopics("c", {"forgotten": "f"}, {"forgotten": [0]})
        monkeypatch.setattr(topic_follower, "make_consumer", lambda *_: self.consumer)
        monkeypatch.setattr(topic_follower, "describe_topics", lambda *_: found)
        self.store, self.clock = Store(), Clock()
        self.follower = ErasureFollower(
            self.store, BrokerConfig(), TopicsConfig(), beginnings=self.beginnings, clock=self.clock
        )

    async def beginnings(self) -> dict[int, int]:
        return {}

    async def once(self, after: float = 0.0) -> list[str]:
        """Who was erased by one round, so many seconds later."""
        self.clock.now += after
        before = len(self.store.erased)
        await self.follower._run_once()
        return self.store.erased[before:]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


async def test_requests_so_far_are_applied_at_the_start_from_the_stored_position_and_later_ones_as_they_come(
    scene: Scene,
) -> None:
    scene.store.at = {"f:0": 1}
    await scene.follower.open()
    assert scene.store.erased == ["u1"] and scene.store.at == {"f:0": 2}
    scene.consumer.log = {PARTITION: [request(n) for n in range(4)]}
    assert await scene.once() == ["u2", "u3"] and await scene.once() == []


async def test_marks_that_the_store_lost_are_applied_again_with_the_next_check(scene: Scene) -> None:
    await scene.follower.open()
    scene.store.at = {}
    assert await scene.once(CHECK_SECONDS - 0.5) == []
    assert await scene.once(0.5) == ["u0", "u1"]
    scene.store.at = {}
    assert await scene.once(CHECK_SECONDS - 0.5) == []  # the last check was just now
    scene.store.at = {"f:0": 1}
    assert await scene.once(0.5) == ["u1"]
    assert await scene.once(CHECK_SECONDS) == []


async def test_marks_are_dropped_once_an_hour_and_soon_again_where_the_store_was_away(scene: Scene) -> None:
    await scene.follower.open()
    scene.store.away = 1
    with pytest.raises(StoreUnavailable):
        await scene.once()
    for after in (0, 1, DROP_SECONDS - 2, 1):
        await scene.once(after)
    assert scene.store.dropped == [{"f:0"}] * 3, "those of the topic that is followed keep their positions"


async def test_it_runs_until_it_is_stopped_and_waits_for_a_store_that_is_away(scene: Scene) -> None:
    await scene.follower.open()
    scene.consumer.log = {PARTITION: [request(n) for n in range(3)]}
    scene.store.away = 1
    stop = asyncio.Event()
    running = asyncio.create_task(scene.follower.run(stop))
    async with asyncio.timeout(10):
        while len(scene.store.erased) < 3:
            await asyncio.sleep(0)
    stop.set()
    await running
    await scene.follower.close()
    assert scene.consumer.stops == 1
    assert scene.store.erased == ["u0", "u1", "u2"] and scene.store.away == 0
