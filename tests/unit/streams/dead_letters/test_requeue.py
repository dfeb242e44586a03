"""Requeueing over a log in memory: what is newer, in the letter's partition and in others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition

from schemas.errors import Reason
from schemas.letters import DeadLetter, RequeueHeaders
from streams.broker.clients import BrokerConfig
from streams.dead_letters.inbox import DeadLetterEntry
from streams.dead_letters.requeue import Requeue, RequeueResult
from tests.factories.fake_consumer import FakeRecord

NOW = datetime(2026, 5, 1, tzinfo=UTC)
LATER = 2_000_000_000_000


class World:
    """Partitions of `items`, two at first; what is sent lands at their ends, at `LATER`."""

    def __init__(self) -> None:
        self.log: list[list[FakeRecord]] = [[], []]
        self.marked: list[str] = []
        self.topic = "items"

    def say(self, partition: int, value: bytes | None, ms: int, key: bytes = b"a") -> FakeRecord:
        log = self.log[partition]
        log.append(FakeRecord(partition, len(log), key, value, ms))
        return log[-1]

    async def partitions(self, name: str) -> list[TopicPartition]:
        return [TopicPartition(name, number) for number in range(len(self.log))]

    async def end(self, partition: TopicPartition) -> int:
        return len(self.log[partition.partition])

    async def first_since(self, partitions: Sequence[TopicPartition], moment: datetime) -> dict[TopicPartition, Any]:
        ms = moment.timestamp() * 1000
        return {one: next((r.offset for r in self.log[one.partition] if r.timestamp >= ms), None) for one in partitions}

    async def read(self, partition: TopicPartition, start: int, end: int) -> AsyncIterator[FakeRecord]:
        for record in self.log[partition.partition][start:end]:
            yield record

    async def one(self, partition: TopicPartition, offset: int) -> FakeRecord | None:
        return next((one for one in self.log[partition.partition] if one.offset == offset), None)

    async def send_and_wait(self, topic: str, *, key: bytes, value: bytes, partition: int, headers: Any) -> Any:
        log = self.log[partition]
        log.append(FakeRecord(partition, len(log), key, value, LATER, tuple(headers)))
        return SimpleNamespace(offset=log[-1].offset)

    async def letter(self, entry: DeadLetterEntry) -> DeadLetter:
        record = self.log[entry.newest.partition][entry.newest.offset]
        return letter_of(record, self.topic)

    async def mark(self, entries: Sequence[DeadLetterEntry], action: str) -> None:
        self.marked += [f"{entry.id} {action}" for entry in entries]

    async def requeue(self, *failed: FakeRecord) -> list[RequeueResult]:
        world: Any = self
        entries = [
            DeadLetterEntry.of(letter_of(one, self.topic), first_failed_at=NOW, attempts=1, letters=1, at=(0, 0))
            for one in failed
        ]
        return await Requeue(world, world, BrokerConfig(), world).requeue(entries)


def letter_of(record: FakeRecord, topic: str = "items") -> DeadLetter:
    place = (topic, record.partition, record.offset, record.key, record.value)
    return DeadLetter(*place, "encode", Reason.ENCODER_FAILED, "x", NOW)


@pytest.fixture
def world() -> World:
    return World()


async def test_a_record_without_a_newer_one_is_sent_again_once(world: World) -> None:
    failed = world.say(0, b"one", 1_000)
    world.say(1, b"of another item", 5_000, key=b"b")
    (first,) = await world.requeue(failed)
    assert (first.status, world.log[0][-1].value, world.marked) == ("requeued", b"one", ["items/0/0 requeued"])
    (second,) = await world.requeue(failed)  # whoever sent it died before it was marked
    assert (second.status, len(world.log[0])) == ("already_requeued", 2)
    assert world.marked == ["items/0/0 requeued"] * 2


@pytest.mark.parametrize("topic", ["items", "behaviours"])
async def test_a_letter_without_the_bytes_of_its_record_replaces_nothing(world: World, topic: str) -> None:
    world.topic = topic
    failed = world.say(0, b"", 1_000)
    (result,) = await world.requeue(failed)
    assert (result.status, world.log[0], world.marked) == (
        "refused",
        [failed],
        [],
    ) and "publish it anew" in result.detail


@pytest.mark.parametrize("value", [b"newer", None])
async def test_a_newer_record_in_another_partition_is_not_replaced(world: World, value: bytes | None) -> None:
    failed = world.say(0, b"one", 1_000)
    world.say(1, b"older", 999)
    assert (await world.requeue(failed))[0].status == "requeued"
    failed = world.say(0, b"two", 1_000)
    world.say(1, value, 1_000)
    (result,) = await world.requeue(failed)
    assert (result.status, world.log[0][-1]) == ("superseded", failed)
    assert "1/1" in result.detail


async def test_a_newer_record_in_the_same_partition_is_not_replaced(world: World) -> None:
    failed = world.say(0, b"one", 1_000)
    world.say(0, b"two", 900)  # its producer's clock stepped back
    (result,) = await world.requeue(failed)
    assert (result.status, len(world.log[0]), world.marked) == ("superseded", 2, [])


async def test_at_equal_times_the_higher_partition_is_newer(world: World) -> None:
    failed = world.say(1, b"two", 1_000)
    world.say(0, b"one", 1_000)
    assert [one.status for one in await world.requeue(failed)] == ["requeued"]


async def test_the_newest_record_of_another_partition_counts_wherever_it_lies_there(world: World) -> None:
    failed = world.say(0, b"one", 1_000)
    world.say(1, b"newer", 2_000)
    world.say(1, b"older", 500)
    (result,) = await world.requeue(failed)
    assert result.status == "superseded" and "record 1/0 " in result.detail


async def test_a_partition_without_anything_newer_hides_none_of_another(world: World) -> None:
    world.log.append([])
    failed = world.say(0, b"one", 1_000)
    world.say(1, b"older", 500)
    world.say(2, b"newer", 2_000)
    (result,) = await world.requeue(failed)
    assert result.status == "superseded" and "record 2/0 " in result.detail and len(world.log[0]) == 1


async def test_letters_of_one_partition_are_judged_by_their_own_times_and_places(world: World) -> None:
    first = world.say(0, b"1", 1_000, key=b"a")
    second = world.say(0, b"1", 1_000, key=b"b")
    third = world.say(0, b"1", 1_000, key=b"c")
    world.say(0, b"2", 1_000, key=b"b")
    late = world.say(0, b"1", 9_000, key=b"d")
    world.say(1, b"2", 3_000, key=b"a")
    world.say(1, b"2", 3_000, key=b"d")
    found = await world.requeue(late, third, second, first)
    assert {one.id: one.status for one in found} == {
        "items/0/0": "superseded",  # by another partition
        "items/0/1": "superseded",  # by its own
        "items/0/2": "requeued",
        "items/0/4": "requeued",
    }


@pytest.mark.parametrize("value", [b"newer", None])
async def test_what_a_killed_repetition_left_behind_a_newer_record_is_put_right(
    world: World, value: bytes | None
) -> None:
    failed = world.say(0, b"one", 1_000)
    newer = world.say(0, value, 2_000)
    again = tuple(RequeueHeaders.of(letter_of(failed)).headers())
    world.log[0].append(FakeRecord(0, 2, b"a", b"one", LATER, again))
    (result,) = await world.requeue(failed)
    assert result.status == "superseded" and "record 0/1 " in result.detail and "put back" in result.detail
    last = world.log[0][-1]
    assert (last.offset, last.value, last.headers, world.marked) == (3, value, newer.headers, [])
