"""A recorder whose partition is taken away and given back while it reads, and what it makes of the group's commits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiokafka import TopicPartition

from schemas.errors import StoreUnavailable
from streams.stores.histories.packed_history import RecordReport
from tests.factories.click_log import LOG
from tests.factories.fake_consumer import FakeRecord
from tests.factories.recording import PARTITION, Scene, click


async def test_records_that_were_fetched_before_a_rebalance_are_read_again_and_recorded_once() -> None:
    scene = Scene(*map(click, range(4)))
    fetch, rebalanced = scene.consumer.getmany, list[Any]()

    async def getmany(**given: Any) -> Any:
        found = await fetch(**given)
        if found and not rebalanced:
            rebalanced.append(found)
            await scene.consumer.give(PARTITION)
        return found

    scene.consumer.getmany = getmany  # type: ignore[method-assign]
    await scene.run(until=4)
    counts = await scene.store.counts()
    assert len(rebalanced) == 1 and (counts["takes"], counts["duplicates"]) == (4, 0)
    assert [(report.takes, report.replayed) for report in scene.reports] == [(4, 0)]


async def test_nothing_is_committed_of_a_partition_that_was_taken_away_while_it_was_written() -> None:
    scene = Scene(*map(click, range(4)))
    record, commit, taken = scene.store.record, scene.consumer.commit, list[RecordReport]()

    async def recorded(*given: Any, **named: Any) -> RecordReport:
        report = await record(*given, **named)
        if not taken:
            taken.append(report)
            await scene.consumer.listener.on_partitions_revoked([PARTITION])
            scene.consumer.assign([])
        return report

    async def committed(offsets: Mapping[TopicPartition, int]) -> None:
        assert offsets.keys() <= scene.consumer.assignment()
        await commit(offsets)

    fetch = scene.consumer.getmany

    async def getmany(**given: Any) -> Any:
        if taken and not scene.consumer.assignment():
            await scene.consumer.give(PARTITION)
        return await fetch(**given)

    scene.store.record, scene.consumer.commit = recorded, committed  # type: ignore[method-assign]
    scene.consumer.getmany = getmany  # type: ignore[method-assign]
    await scene.run(until=4)
    assert (await scene.store.counts())["takes"] == 4 and taken[0].takes == 4


async def test_a_commit_at_the_end_of_the_log_is_one_of_this_log() -> None:
    scene = Scene(click(0), FakeRecord(0, 1, b"u1", b"{broken"), click(2))

    async def committed(partition: TopicPartition) -> int:
        return 3  # all of it, and the store has lost everything

    scene.consumer.committed = committed  # type: ignore[method-assign]
    await scene.run(until=3)
    assert (await scene.store.counts())["takes"] == 2 and scene.dead_letters.letters == []


OTHER = TopicPartition(LOG.topic, 1)


async def reassigned(scene: Scene, *partitions: TopicPartition) -> None:
    """As after a session that was lost: nothing is said of the partitions before."""
    scene.consumer.assign(partitions)
    await scene.consumer.listener.on_partitions_assigned(partitions)


async def test_what_was_fetched_of_a_partition_is_dropped_where_others_are_assigned_in_its_place() -> None:
    scene = Scene(*map(click, range(4)))
    scene.consumer.log = {**scene.consumer.log, OTHER: []}
    fetch, moved = scene.consumer.getmany, list[Any]()

    async def getmany(**given: Any) -> Any:
        found = await fetch(**given)
        if found and not moved:
            moved.append(found)
            await reassigned(scene, OTHER)
        elif moved and len(moved) < 3:
            moved.append(await scene.store.counts())
            if len(moved) == 3:
                await scene.consumer.give(PARTITION)
        return found

    scene.consumer.getmany = getmany  # type: ignore[method-assign]
    await scene.run(until=4)
    assert [one["takes"] for one in moved[1:]] == [0, 0] and (await scene.store.counts())["takes"] == 4


async def test_a_partition_that_waits_for_its_place_is_forgotten_where_others_are_assigned_in_its_place() -> None:
    scene = Scene(*map(click, range(4)))
    scene.consumer.log = {OTHER: [], **scene.consumer.log}
    positions, looks = scene.store.positions, list[int]()

    async def looked() -> Any:
        looks.append(1)
        if len(looks) < 3:
            raise StoreUnavailable("Redis", "away")
        if len(looks) == 3:
            await reassigned(scene, PARTITION)
        return await positions()

    give = scene.consumer.give

    async def given(*_: TopicPartition) -> None:
        await give(OTHER)

    scene.store.positions, scene.consumer.give = looked, given  # type: ignore[method-assign]
    await scene.run(until=4)
    assert (await scene.store.counts())["takes"] == 4 and looks[3:] == [1] and scene.ready == 1
