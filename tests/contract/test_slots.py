"""Slots against a real Valkey."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from redis.asyncio import Redis

from schemas.errors import Fenced, Misconfigured, StoreUnavailable
from streams.indexing.slots import LeaseConfig, Slot
from streams.stack.valkey_part import ValkeyPart
from streams.stores.histories.client import RedisConfig, make_redis
from tests.factories.part_server import PartServer, part_server

LEASE = LeaseConfig(ttl_seconds=1.2, renewals_per_ttl=8)


@pytest.fixture(scope="module")
def valkey(
    tmp_path_factory: pytest.TempPathFactory, unused_tcp_port_factory: Callable[[], int]
) -> Iterator[PartServer]:
    with part_server(ValkeyPart(tmp_path_factory.mktemp("valkey"), unused_tcp_port_factory())) as server:
        yield server


Make = Callable[..., Slot]


@pytest.fixture
async def make(valkey: PartServer) -> AsyncIterator[Make]:
    url = f"redis://127.0.0.1:{valkey.part.port}/0"
    config = RedisConfig(url=url, key_prefix=f"t{os.urandom(4).hex()}:", timeout_seconds=1)
    clients: list[Redis] = []

    def one(name: str = "0", *, token: str = "", **means: Any) -> Slot:
        clients.append(make_redis(config))
        return Slot(clients[-1], config, LEASE, role="index", name=name, token=token or os.urandom(4).hex(), **means)

    yield one
    for client in clients:
        await client.aclose()


pytestmark = pytest.mark.live


async def kept(slot: Slot) -> asyncio.Task[None]:
    await slot.claim()
    return asyncio.create_task(slot.keep())


async def test_a_second_claimant_of_a_living_slot_is_turned_away_soon(make: Make) -> None:
    keeping = await kept(make(token="host/17/aa"))
    with pytest.raises(Misconfigured, match=r"index-0.*host/17/aa.*--slot"):
        await make().claim()
    assert not keeping.done()
    keeping.cancel()


async def test_other_slots_are_free(make: Make) -> None:
    await make("0").claim()
    await make("1").claim()


async def test_the_slot_of_a_killed_worker_is_free_after_its_lease(make: Make) -> None:
    await make().claim()  # never renewed again
    started = time.monotonic()
    await make().claim()
    assert time.monotonic() - started > LEASE.ttl_seconds / 2


async def test_of_several_who_wait_for_a_dead_slot_one_gets_it(make: Make) -> None:
    await make().claim()
    outcomes = await asyncio.gather(*(kept(make()) for _ in range(4)), return_exceptions=True)
    holders = [outcome for outcome in outcomes if isinstance(outcome, asyncio.Task)]
    assert len(holders) == 1
    assert sum(isinstance(outcome, Misconfigured) for outcome in outcomes) == 3
    holders[0].cancel()


async def test_a_released_slot_is_free_at_once(make: Make) -> None:
    first = make()
    await first.claim()
    await first.release()

    async def not_needed(seconds: float) -> None:
        raise AssertionError(f"waited {seconds} s")

    await make(sleep=not_needed).claim()


async def test_a_lease_that_others_hold_is_not_released(make: Make) -> None:
    first, second = make(), make()
    await first.claim()
    await asyncio.sleep(LEASE.ttl_seconds + 0.1)
    await second.claim()
    await first.release()
    keeping = asyncio.create_task(second.keep())
    with pytest.raises(Misconfigured):
        await make().claim()
    keeping.cancel()


async def test_a_worker_that_was_away_too_long_is_fenced_before_it_writes(make: Make) -> None:
    now = [100.0]
    sleeper = make(clock=lambda: now[0])
    await sleeper.claim()
    await sleeper.assert_held()
    await asyncio.sleep(LEASE.ttl_seconds + 0.1)
    await make().claim()
    await sleeper.assert_held()  # by its own clock no time has passed: it cannot know yet
    now[0] += LEASE.ttl_seconds + 0.1
    for _ in range(2):
        with pytest.raises(Fenced, match="index-0"):
            await sleeper.assert_held()


async def test_a_worker_that_was_away_long_goes_on_if_nobody_came(make: Make) -> None:
    now = [100.0]
    sleeper = make(clock=lambda: now[0])
    await sleeper.claim()
    await asyncio.sleep(LEASE.ttl_seconds + 0.1)
    now[0] += 10
    await sleeper.assert_held()
    keeping = asyncio.create_task(sleeper.keep())
    with pytest.raises(Misconfigured):  # it holds the slot again
        await make().claim()
    keeping.cancel()


async def test_losing_the_lease_ends_keeping_it(make: Make) -> None:
    stalled = make()
    await stalled.claim()
    await asyncio.sleep(LEASE.ttl_seconds + 0.1)
    other = await kept(make())
    with pytest.raises(Fenced):
        await asyncio.wait_for(stalled.keep(), 2)
    other.cancel()


async def test_a_worker_outlives_a_killed_redis_and_still_holds_its_slot(make: Make, valkey: PartServer) -> None:
    slot = make()
    keeping = await kept(slot)
    valkey.kill()
    try:
        await asyncio.sleep(2 * LEASE.ttl_seconds)
        assert not keeping.done()
        await slot.assert_held()
        with pytest.raises(StoreUnavailable, match="MIM_REDIS__URL"):
            await make("1").claim()
    finally:
        valkey.start()
    await asyncio.sleep(LEASE.ttl_seconds)
    with pytest.raises(Misconfigured):
        await make().claim()
    keeping.cancel()
