"""When a group member may still write."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from schemas.errors import BrokerUnavailable
from streams.broker.heartbeats import Heartbeats
from tests.factories.waiting import Clock


@dataclass
class Coordinator:
    """The part of the driver's coordinator that sends heartbeats."""

    answers: list[bool] = field(default_factory=list)
    sent: int = 0

    async def _do_heartbeat(self) -> bool:
        self.sent += 1
        return self.answers.pop(0)


async def test_a_heartbeat_counts_from_when_it_was_sent_and_its_answer_is_passed_on() -> None:
    clock = Clock()

    class Slow(Coordinator):
        async def _do_heartbeat(self) -> bool:
            clock.now += 5
            return await super()._do_heartbeat()

    coordinator = Slow([True, False])
    heartbeats = Heartbeats(clock)
    heartbeats.watch(coordinator)
    clock.now = 10
    assert [await coordinator._do_heartbeat(), await coordinator._do_heartbeat()] == [True, False]
    clock.now = 28
    await heartbeats.assert_within(18)
    clock.now = 28.1
    with pytest.raises(BrokerUnavailable):
        await heartbeats.assert_within(18)


async def test_a_write_begins_only_while_the_session_cannot_be_over() -> None:
    coordinator, clock = Coordinator([True, False]), Clock()
    heartbeats = Heartbeats(clock)
    await heartbeats.assert_within(18)  # not a member yet: nothing to lose
    heartbeats.watch(coordinator)
    heartbeats.watch(coordinator)
    clock.now = 18
    await heartbeats.assert_within(18)
    assert await coordinator._do_heartbeat()
    clock.now = 36
    await heartbeats.assert_within(18)
    assert not await coordinator._do_heartbeat()
    clock.now = 36.1
    with pytest.raises(BrokerUnavailable, match="heartbeat"):
        await heartbeats.assert_within(18)
    assert coordinator.sent == 2
    heartbeats.watch(coordinator)  # it joined again
    await heartbeats.assert_within(18)
