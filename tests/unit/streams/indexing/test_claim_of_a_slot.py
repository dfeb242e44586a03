"""Claiming a slot: at once where it is free, after a dead worker's lease, and never from a living one."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.errors import Fenced, Misconfigured
from streams.indexing.slots import LeaseConfig, Slot
from streams.stores.histories.client import RedisConfig
from tests.factories.waiting import Clock


class Leases:
    """Keys with a time to live, by a clock; `renews` says when a living holder renews."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.held, self.until, self.renews = clock, b"", 0.0, list[float]()
        self.keys: list[str] = []

    def look(self) -> None:
        while self.renews and self.renews[0] <= self.clock.now:
            self.until = self.renews.pop(0) + 6
        if self.clock.now >= self.until:
            self.held = b""

    async def set(self, key: str, token: str, *, nx: bool, px: int) -> bool:
        assert nx
        self.keys.append(key)
        self.look()
        if self.held:
            return False
        self.held, self.until = token.encode(), self.clock.now + px / 1000
        return True

    async def get(self, key: str) -> bytes | None:
        self.look()
        return self.held or None

    async def pttl(self, key: str) -> int:
        self.look()
        return round((self.until - self.clock.now) * 1000) if self.held else -2

    async def eval(self, script: str, keys: int, key: str, token: str, *more: str) -> int:
        self.look()
        if "DEL" in script:
            gone = self.held == token.encode()
            self.held = b"" if gone else self.held
            return int(gone)
        if not self.held or self.held == token.encode():
            self.held, self.until = token.encode(), self.clock.now + int(more[0]) / 1000
            return 1
        return 0


class Scene:
    def __init__(self) -> None:
        self.clock = Clock()
        self.leases = Leases(self.clock)
        self.slept: list[float] = []

    def slot(self, token: str) -> Slot:
        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)
            self.clock.now += seconds

        client: Any = self.leases
        return Slot(
            client, RedisConfig(key_prefix="p:"), LeaseConfig(ttl_seconds=6, renewals_per_ttl=3), role="index",
            name="3", token=token, clock=self.clock, sleep=sleep,
        )  # fmt: skip


@pytest.fixture
def scene() -> Scene:
    return Scene()


async def test_a_free_slot_is_claimed_at_once_under_its_own_name(scene: Scene) -> None:
    slot = scene.slot("mine")
    await slot.claim()
    assert scene.leases.keys == ["p:slot:index:3"] and scene.slept == [] and slot.instance_id == "index-3"
    assert (scene.leases.held, scene.leases.until) == (b"mine", 6.0)


async def test_the_lease_of_a_dead_worker_is_waited_for(scene: Scene) -> None:
    await scene.slot("dead").claim()
    scene.clock.now = 2.0
    await scene.slot("mine").claim()
    assert scene.leases.held == b"mine" and 6.0 <= scene.clock.now <= 6.3
    assert max(scene.slept) == 0.2


async def test_a_living_worker_is_noticed_by_its_renewal_and_keeps_the_slot(scene: Scene) -> None:
    await scene.slot("alive").claim()
    scene.leases.renews = [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    scene.clock.now = 1.0
    with pytest.raises(Misconfigured, match=r"'index-3' is held by a living worker \(alive\).*--slot"):
        await scene.slot("mine").claim()
    assert 2.0 <= scene.clock.now <= 2.5 and scene.leases.held == b"alive"


async def test_a_lease_that_never_ends_is_not_waited_for_much_longer_than_one_lasts(scene: Scene) -> None:
    await scene.slot("odd").claim()
    scene.leases.until = float("inf")

    async def no_end(key: str) -> int:
        return -1

    scene.leases.pttl = no_end  # type: ignore[method-assign]
    with pytest.raises(Misconfigured, match="odd"):
        await scene.slot("mine").claim()
    assert 7.0 <= scene.clock.now <= 8.5


async def test_a_slot_that_another_claims_first_is_not_waited_for(scene: Scene) -> None:
    await scene.slot("dead").claim()
    scene.leases.until = 1.0
    waiting = scene.slot("mine")
    original = scene.leases.set

    async def another_is_faster(key: str, token: str, **more: Any) -> bool:
        if scene.clock.now >= 1.0 and token == "mine":
            await original(key, "faster", **more)
        return await original(key, token, **more)

    scene.leases.set = another_is_faster  # type: ignore[method-assign]
    with pytest.raises(Misconfigured, match="faster"):
        await waiting.claim()
    assert scene.clock.now < 2.0


async def test_the_lease_is_renewed_while_it_is_kept_and_lost_to_another(scene: Scene) -> None:
    slot = scene.slot("mine")
    await slot.claim()
    kept: list[float] = []
    original = scene.leases.eval

    async def noting(*arguments: Any) -> int:
        kept.append(scene.clock.now)
        if len(kept) == 4:
            scene.leases.held = b"another"
        return await original(*arguments)

    scene.leases.eval = noting  # type: ignore[method-assign]
    with pytest.raises(Fenced, match="'index-3' belongs to another worker"):
        await slot.keep()
    assert kept == [2.0, 4.0, 6.0, 8.0]


async def test_a_slot_is_given_back_only_by_its_holder(scene: Scene) -> None:
    mine = scene.slot("mine")
    await mine.claim()
    await scene.slot("another").release()
    assert scene.leases.held == b"mine"
    await mine.release()
    assert scene.leases.held == b""
    await mine.assert_held()  # asked again: it may have been claimed since
    assert scene.leases.held == b"mine"
