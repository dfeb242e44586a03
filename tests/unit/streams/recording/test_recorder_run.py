"""The recorder's loop over an in-memory log: where it reads, what it commits, which records get a dead letter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from aiokafka.errors import CommitFailedError, KafkaConnectionError, NoOffsetForPartitionError, OffsetOutOfRangeError
from structlog.testing import capture_logs

from schemas.errors import Misconfigured, Reason, StoreUnavailable
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import TopicIncarnation
from streams.recording.config import RecordConfig
from streams.stores.histories.packed_history import RecordReport
from streams.stores.histories.store import InMemoryBehaviourStore
from tests.factories.click_log import LOG
from tests.factories.fake_consumer import FakeRecord
from tests.factories.recording import PARTITION, Scene, click
from tests.factories.waiting import Clock


async def test_it_reads_from_the_stores_position_and_commits_what_was_written() -> None:
    scene = Scene(*map(click, range(5)))
    await scene.run(until=5)
    assert await scene.store.positions() == {0: 5}
    scene.consumer.log = {PARTITION: [*map(click, range(8))]}
    scene.consumer.commits.clear()
    await scene.run(until=8)
    assert (await scene.store.counts())["takes"] == 8
    assert (await scene.store.counts())["duplicates"] == 0


async def test_a_broken_record_gets_one_letter_though_the_store_lost_its_data() -> None:
    scene = Scene(click(0), FakeRecord(0, 1, b"u1", b"{broken"), click(2))
    await scene.run(until=3)
    scene.store = InMemoryBehaviourStore()
    scene.consumer.log = {PARTITION: [*scene.consumer.log[PARTITION], click(3)]}
    await scene.run(until=4)
    assert [letter.offset for letter in scene.dead_letters.letters] == [1]
    assert (await scene.store.counts())["takes"] == 3


async def test_records_that_retention_deleted_are_passed_over() -> None:
    scene = Scene(click(7), click(8), beginning=7)
    await scene.run(until=9)
    assert await scene.store.positions() == {0: 9}
    assert (await scene.store.counts())["takes"] == 2


BROKEN = FakeRecord(0, 2, b"u1", b"{broken")


@pytest.mark.parametrize(("committed", "letters"), [(None, [2]), (2, [2]), (3, [])])
async def test_a_broken_record_has_a_letter_unless_its_own_offset_was_committed(
    committed: int | None, letters: list[int]
) -> None:
    scene = Scene(click(0), click(1), BROKEN, click(3))
    if committed is not None:
        scene.consumer.commits[PARTITION] = committed
    await scene.run(until=4)
    assert [letter.offset for letter in scene.dead_letters.letters] == letters
    assert (await scene.store.counts())["broken"] == 1


async def test_what_the_store_lost_while_it_runs_is_read_again_from_where_the_store_stands() -> None:
    scene = Scene(*map(click, range(3)))

    def lose() -> int:
        scene.store.users.clear()
        scene.store._positions.clear()
        scene.consumer.log = {PARTITION: [*map(click, range(6))]}
        return 6

    await scene.run(until=3, then=lose)
    assert await scene.store.taken_items("u1") and (await scene.store.counts())["takes"] == 3 + 6
    assert await scene.store.positions() == {0: 6}


async def test_each_batch_begins_where_the_last_one_ended() -> None:
    scene = Scene(*map(click, range(3)))
    firsts: list[int] = []
    record = scene.store.record

    async def noting(partition: int, events: Sequence[Any], *, first_offset: int, next_offset: int) -> RecordReport:
        firsts.append(first_offset)
        return await record(partition, events, first_offset=first_offset, next_offset=next_offset)

    scene.store.record = noting  # type: ignore[method-assign]

    def more() -> int:
        scene.consumer.log = {PARTITION: [*map(click, range(7))]}
        return 7

    await scene.run(until=3, then=more)
    assert firsts == [0, 3]


async def test_nothing_is_committed_before_letter_and_data_are_written_however_often_they_fail() -> None:
    scene = Scene(click(0), click(1), BROKEN)
    order: list[str] = []
    left = {"letter": 3, "data": 3}

    def unsteady(what: str, do: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*given: Any, **named: Any) -> Any:
            if left.get(what):
                left[what] -= 1
                raise StoreUnavailable("Redis", "away")
            order.append(what)
            return await do(*given, **named)

        return call

    scene.dead_letters.publish = unsteady("letter", scene.dead_letters.publish)  # type: ignore[method-assign]
    scene.store.record = unsteady("data", scene.store.record)  # type: ignore[method-assign]
    scene.consumer.commit = unsteady("commit", scene.consumer.commit)  # type: ignore[method-assign]
    await scene.run(until=3)
    assert order == ["letter", "data", "commit"]
    assert [report.takes for report in scene.reports] == [2]


async def test_a_store_that_was_filled_from_another_log_ends_it() -> None:
    scene = Scene(click(0))
    await scene.store.bind(TopicIncarnation("another cluster", LOG.topic, "id"))
    with pytest.raises((Misconfigured, AssertionError), match="record --rebuild"):
        await scene.run(until=1)


async def test_partitions_that_are_taken_away_are_not_written_from_their_old_position() -> None:
    scene = Scene(*map(click, range(3)))

    def away() -> None:
        scene.consumer.positions.clear()

    await scene.run(until=3)
    away()
    scene.consumer.log = {PARTITION: [*map(click, range(5))]}
    await scene.store.record(0, [], first_offset=3, next_offset=4)  # another recorder went on meanwhile
    await scene.run(until=5)
    assert (await scene.store.counts())["takes"] == 4, "offset 3 was the other recorder's"


async def test_what_retention_deleted_behind_the_stored_position_is_passed_over_for_good() -> None:
    scene = Scene(*map(click, range(3)))
    await scene.run(until=3)
    scene.consumer.beginning, scene.consumer.log = 7, {PARTITION: [click(7), click(8)]}
    await scene.run(until=9)
    assert await scene.store.positions() == {0: 9} and (await scene.store.counts())["takes"] == 5
    assert [report.resume_from for report in scene.reports] == [None] * len(scene.reports)


async def test_a_broken_record_at_the_very_beginning_has_a_letter() -> None:
    scene = Scene(FakeRecord(0, 0, b"u1", b"{broken"), click(1))
    await scene.run(until=2)
    assert [letter.offset for letter in scene.dead_letters.letters] == [0]


@pytest.mark.parametrize("committed", [None, 1, 2])
async def test_a_commit_that_was_lost_between_write_and_commit_is_made_up_for_at_once(committed: int | None) -> None:
    scene = Scene(*map(click, range(3)))
    await scene.store.bind(LOG)
    await scene.store.record(0, [], first_offset=0, next_offset=3)
    if committed is not None:
        scene.consumer.commits[PARTITION] = committed
    await scene.run(until=3)
    assert (scene.reports, scene.ready) == ([], 1)


async def test_a_commit_stays_where_the_store_is_behind_it_so_that_the_lag_is_not_shown_as_growing() -> None:
    scene = Scene(*map(click, range(3)))
    commits: list[int] = []
    commit = scene.consumer.commit

    async def noted(offsets: Any) -> None:
        commits.extend(offsets.values())
        await commit(offsets)

    scene.consumer.commit = noted  # type: ignore[method-assign]
    scene.consumer.commits[PARTITION] = 2
    await scene.run(until=3)
    assert commits == [3]


@pytest.mark.parametrize(
    ("committed", "replaced", "letters"),
    [
        (4, False, []),  # up to the end of this log
        (5, False, [2]),  # beyond it: of a former one
        (3, True, [2]),  # of a former one, though within this one
        (None, True, [2]),
    ],
)
async def test_a_commit_of_a_former_log_does_not_keep_a_letter_back(
    committed: int | None, replaced: bool, letters: list[int]
) -> None:
    scene = Scene(click(0), click(1), BROKEN, click(3))
    scene.log_replaced = replaced
    if committed is not None:
        scene.consumer.commits[PARTITION] = committed
    commit, commits = scene.consumer.commit, list[int]()

    async def noted(offsets: Any) -> None:
        commits.extend(offsets.values())
        await commit(offsets)

    scene.consumer.commit = noted  # type: ignore[method-assign]

    def assigned_again() -> int:
        if letters:
            scene.store._positions.clear()  # it is read again: the commits of the group are of this log by now
        scene.consumer.log = {PARTITION: [*scene.consumer.log[PARTITION], click(4)]}
        return 5

    async with asyncio.timeout(20):
        await scene.run(until=4, then=assigned_again)
    assert [letter.offset for letter in scene.dead_letters.letters] == letters
    assert (commits[0] == 0) is bool(letters)


async def test_a_log_that_is_replaced_while_it_runs_ends_it_at_the_next_look() -> None:
    scene = Scene(click(0))
    clock = scene.clock = Clock(1_000.0)

    def replaced() -> int:
        scene.log = TopicIncarnation(LOG.cluster_id, LOG.topic, "another")
        scene.consumer.log = {PARTITION: [click(0), click(1)]}
        return 2

    await scene.run(until=1, then=replaced)  # it looked less than half a minute ago
    assert await scene.store.positions() == {0: 2}
    for step in (30.1, -1.0):
        scene = Scene(click(0))
        clock = scene.clock = Clock(1_000.0)

        def late(scene: Scene = scene, clock: Clock = clock, step: float = step) -> int:
            clock.now += step  # a clock may be set back, too
            return replaced_in(scene)

        with pytest.raises((Misconfigured, AssertionError), match="record --rebuild"):
            await scene.run(until=1, then=late)


def replaced_in(scene: Scene) -> int:
    scene.log = TopicIncarnation(LOG.cluster_id, LOG.topic, "another")
    return 9


@pytest.mark.parametrize("error", [OffsetOutOfRangeError({PARTITION: 3}), NoOffsetForPartitionError()], ids=repr)
async def test_a_position_that_the_broker_does_not_have_is_asked_of_the_store_again(error: Exception) -> None:
    scene = Scene(*map(click, range(3)))

    def lost() -> int:
        scene.consumer.fetch_failure = error
        scene.consumer.positions[PARTITION] = 77
        scene.consumer.log = {PARTITION: [*map(click, range(5))]}
        return 5

    await scene.run(until=3, then=lost)
    counts = await scene.store.counts()
    assert (counts["takes"], counts["duplicates"], scene.ready) == (5, 0, 1)


async def test_a_commit_that_fails_leaves_a_stale_lag_and_nothing_else() -> None:
    scene = Scene(*map(click, range(3)))
    commit, failures = scene.consumer.commit, [CommitFailedError(), KafkaConnectionError("away")]

    async def unsteady(offsets: Any) -> None:
        if failures:
            raise failures.pop()
        await commit(offsets)

    scene.consumer.commit = unsteady  # type: ignore[method-assign]
    running = asyncio.create_task(scene.run(until=5))
    async with asyncio.timeout(10):
        for count in (4, 5):
            while len(failures) > 5 - count:
                await asyncio.sleep(0)
            scene.consumer.log = {PARTITION: [*map(click, range(count))]}
        await running
    assert (await scene.store.counts())["takes"] == 5


async def test_a_recorder_reads_records_as_it_is_set() -> None:
    large = {"event_id": "large", "kind": "click", "who": "u1", "item_id": "i", "occurred_at": 1_700_000_000}
    small = {"event_id": "small", "kind": "click", "who": "u1", "item_id": "i", "occurred_at": 1_700_000_000}
    values = [json.dumps(large | {"more": "x" * 5_000}).encode(), json.dumps(small).encode()]
    scene = Scene(*(FakeRecord(0, offset, b"u1", value) for offset, value in enumerate(values)))
    scene.config, scene.broker = RecordConfig(field_map={"user_id": "who"}), BrokerConfig(max_record_bytes=4_000)
    await scene.run(until=2)
    assert [(letter.offset, letter.reason) for letter in scene.dead_letters.letters] == [(0, Reason.TOO_LARGE)]
    assert (await scene.store.counts())["takes"] == 1


@pytest.mark.parametrize(("stored", "level"), [(0, "warning"), (3, "error")])
async def test_what_retention_took_before_it_was_recorded_is_told(stored: int, level: str) -> None:
    scene = Scene(click(7), beginning=5)
    await scene.store.bind(LOG)
    if stored:
        await scene.store.record(0, [], first_offset=0, next_offset=stored)
    with capture_logs() as lines:
        await scene.run(until=8)
    (line,) = [line for line in lines if line["event"] == "record.log_begins_later"]
    assert (line["log_level"], line["stored"], line["earliest"], line["missing"]) == (level, stored, 5, 5 - stored)
    assert await scene.store.positions() == {0: 8}
