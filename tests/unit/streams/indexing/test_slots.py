"""When a worker may believe that its slot is still its own; no server, and a clock to set."""

from __future__ import annotations

from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisGone

from schemas.errors import Fenced
from streams.indexing.slots import LeaseConfig, Slot
from streams.stores.histories.client import RedisConfig
from tests.factories.waiting import Clock


class FakeRedis:
    """A lease; each answer takes `slow` seconds of the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.slow = 0.0
        self.held: str | None = None
        self.asked = 0
        self.is_away = False

    async def set(self, key: str, token: str, **options: Any) -> bool:
        self.clock.now += self.slow
        self.held = self.held or token
        return self.held == token

    async def eval(self, script: str, keys: int, key: str, token: str, *more: str) -> int:
        self.asked += 1
        if self.is_away:
            raise RedisGone("away")
        self.clock.now += self.slow
        self.held = self.held or token
        return int(self.held == token)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def redis(clock: Clock) -> FakeRedis:
    return FakeRedis(clock)


@pytest.fixture
async def slot(redis: FakeRedis, clock: Clock) -> Slot:
    client: Any = redis
    made = Slot(client, RedisConfig(), LeaseConfig(ttl_seconds=6), role="index", name="0", token="mine", clock=clock)
    await made.claim()
    return made


async def test_a_lease_counts_from_when_it_was_asked_for_not_from_the_answer(
    slot: Slot, redis: FakeRedis, clock: Clock
) -> None:
    clock.now, redis.slow = 6.0, 4.0
    await slot.assert_held()  # renewed: asked for at 6, answered at 10
    assert redis.asked == 1
    clock.now = 11.9
    await slot.assert_held()
    assert redis.asked == 1
    clock.now = 12.0
    await slot.assert_held()
    assert redis.asked == 2


async def test_a_claim_counts_from_when_it_was_asked_for(redis: FakeRedis, clock: Clock) -> None:
    client: Any = redis
    redis.slow = 5.0
    made = Slot(client, RedisConfig(), LeaseConfig(ttl_seconds=6), role="index", name="0", token="mine", clock=clock)
    await made.claim()
    clock.now = 6.0
    await made.assert_held()
    assert redis.asked == 1


async def test_a_slot_that_was_lost_once_stays_lost_though_the_lease_were_free_again(
    slot: Slot, redis: FakeRedis, clock: Clock
) -> None:
    clock.now, redis.held = 6.0, "another"
    with pytest.raises(Fenced):
        await slot.assert_held()
    redis.held = None
    clock.now = 6.1
    with pytest.raises(Fenced):
        await slot.assert_held()
    assert redis.asked == 1


async def test_a_server_that_is_away_lets_no_other_claim_the_slot_so_writing_goes_on(
    slot: Slot, redis: FakeRedis, clock: Clock
) -> None:
    clock.now, redis.is_away = 60.0, True
    await slot.assert_held()
