"""What the agents of one process share: who may still write, what a stop waits for, and which failure counts."""

from __future__ import annotations

import asyncio

import pytest

from schemas.errors import BrokerUnavailable, Fenced
from streams.indexing.config import IndexConfig
from streams.indexing.flow import Flow, OrderedAcks
from tests.factories.item_path import allowed


@pytest.fixture
async def flow() -> Flow:
    return Flow(check_role=allowed)


async def raises(error: Exception) -> None:
    raise error


async def test_a_write_needs_the_slot_and_the_session(flow: Flow) -> None:
    await flow.guard()()
    flow.watch_session(lambda: raises(BrokerUnavailable("Kafka", "no heartbeat")))
    with pytest.raises(BrokerUnavailable):
        await flow.guard()()
    flow.watch_session(allowed)
    await flow.guard()()
    lost = Flow(check_role=lambda: raises(Fenced("slot taken")))
    lost.watch_session(allowed)
    with pytest.raises(Fenced, match="slot taken"):
        await lost.guard()()


async def test_what_was_read_before_partitions_moved_is_not_written(flow: Flow) -> None:
    before, of_now = flow.guard(), flow.guard(flow.epoch)
    flow.partitions_moved()
    for guard in (before, of_now, flow.guard(0)):
        with pytest.raises(Fenced, match="handed out anew"):
            await guard()
    await flow.guard()()
    await flow.guard(1)()


@pytest.mark.parametrize(
    ("error", "moved", "fails"),
    [
        (Fenced("slot taken"), False, True),
        (Fenced("handed out anew"), True, False),
        (ZeroDivisionError("a bug"), False, True),
        (ZeroDivisionError("a bug"), True, True),
    ],
)
async def test_being_fenced_is_no_failure_where_partitions_moved_meanwhile(
    flow: Flow, error: Exception, moved: bool, fails: bool
) -> None:
    async with flow.hand():
        if moved:
            flow.partitions_moved()
        raise error
    assert flow.failed.done() is fails
    if fails:
        assert flow.failed.exception() is error
        flow.fail(KeyError("a later one"))
        assert flow.failed.exception() is error


async def test_being_fenced_counts_from_when_the_work_was_read(flow: Flow) -> None:
    epoch = flow.epoch
    flow.partitions_moved()
    async with flow.hand(epoch):
        raise Fenced("handed out anew")
    assert not flow.failed.done()


@pytest.mark.parametrize("ends", ["well", "with an error"])
async def test_a_stop_waits_for_everything_in_hand_and_lets_nothing_new_begin(flow: Flow, ends: str) -> None:
    go_on = [asyncio.Event(), asyncio.Event()]
    begun: list[int] = []

    async def work(number: int) -> None:
        async with flow.hand():
            begun.append(number)
            await go_on[number].wait()
            if ends != "well":
                raise KeyError(number)

    tasks = [asyncio.create_task(work(number)) for number in (0, 1)]
    await asyncio.sleep(0)
    assert not await flow.drain(0.01)
    late = asyncio.create_task(work(0))
    go_on[0].set()
    await tasks[0]
    assert not await flow.drain(0.01)
    go_on[1].set()
    assert await flow.drain(1)
    assert begun == [0, 1] and not late.done()
    late.cancel()
    assert flow.failed.done() is (ends != "well")
    flow.failed.cancelled() or (flow.failed.done() and flow.failed.exception())


async def test_after_a_failure_nothing_new_begins(flow: Flow) -> None:
    flow.fail(KeyError("the reason"))

    async def work() -> None:
        async with flow.hand():
            raise AssertionError("begun")

    task = asyncio.create_task(work())
    await asyncio.sleep(0.01)
    assert not task.done()
    task.cancel()
    assert str(flow.failed.exception()) == "'the reason'"


def test_waits_for_a_picture_grow_up_to_the_longest_whatever_the_number() -> None:
    config = IndexConfig(retry_initial_seconds=2, retry_factor=3, retry_max_seconds=50)
    assert [config.retry_wait_seconds(failed) for failed in (1, 2, 3, 4, 5, 10_000)] == [2, 6, 18, 50, 50, 50]


def test_a_worker_holds_its_batches_ahead_two_more_and_those_in_the_buffers_of_faust() -> None:
    assert IndexConfig(batches_ahead=4, batch_max_items=10).held_records == 90


async def test_nothing_is_acknowledged_before_what_came_before_it_in_its_partition() -> None:
    acknowledged: list[str] = []

    async def ack(event: str) -> None:
        acknowledged.append(event)

    acks = OrderedAcks(ack)
    done = {event: acks.arrived(event[0], event) for event in ("a1", "a2", "a3", "a4", "b1")}
    for event, expected in (
        ("a3", []), ("b1", ["b1"]), ("a2", []), ("a1", ["a1", "a2", "a3"]), ("a4", ["a4"])
    ):  # fmt: skip
        await done[event]()
        assert acknowledged == expected
        acknowledged.clear()
