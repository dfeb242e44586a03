"""What a former owner can still do after a take-over, and what its successor does about it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import BrokerUnavailable, Fenced
from streams.broker.records import SourceRecord
from streams.indexing import take_over
from streams.indexing.config import IndexConfig
from streams.indexing.index_batch import index_batch
from streams.indexing.reannounce import reannounce
from streams.indexing.take_over import RecentWrite, RecentWrites, recheck
from streams.stores.vectors.item_index import InMemoryItemIndex, ItemRow
from tests.factories.item_path import DIM, VERSION, ItemPath, allowed, item
from tests.factories.running_agent import running
from tests.factories.waiting import Clock

QUICK = IndexConfig(batch_within_seconds=0.05)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recent(clock: Clock) -> RecentWrites:
    """Writes after a take-over at 0 s: they are due at 42 s, the newest of each of the first two items."""
    made = RecentWrites(window_seconds=42, max_records=2, max_taken_over=2, clock=clock)
    made.take_over()
    return made


def test_nothing_is_due_before_other_workers_writes_must_have_arrived_and_then_once(
    path: ItemPath, clock: Clock, recent: RecentWrites
) -> None:
    record = path.publish("a", title="x")
    recent.add([record])
    clock.now = 41.9
    assert recent.pop_due() == []
    clock.now = 42.0
    assert recent.pop_due() == [RecentWrite(record, is_after_take_over=True)]
    assert recent.pop_due() == []
    recent.add([record])
    clock.now = 83.9
    assert recent.pop_due() == []
    clock.now = 84.0
    assert recent.pop_due() == [RecentWrite(record)]


def test_of_each_of_the_first_items_the_newest_record_is_remembered_and_no_more(
    path: ItemPath, clock: Clock, recent: RecentWrites
) -> None:
    records = [path.publish(name, title=str(n)) for n, name in enumerate(["a", "b", "c", "a"])]
    recent.add(records[:3])
    clock.now = 10
    recent.add(records[3:])
    clock.now = 50
    assert [write.record.offset for write in recent.pop_due()] == [1]
    clock.now = 52
    assert [write.record.offset for write in recent.pop_due()] == [3]


def test_values_beyond_the_limit_are_not_remembered_and_make_room_when_they_are_due(
    path: ItemPath, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(take_over, "MAX_REMEMBERED_BYTES", 250)
    recent = RecentWrites(window_seconds=42, max_records=9, max_taken_over=0, clock=clock)
    recent.take_over()
    recent.add([path.record(name, b"v" * 100) for name in "abc"])
    clock.now = 42
    assert [write.record.key for write in recent.pop_due()] == [b"a", b"b"]
    recent.add([path.record("c", b"v" * 100)])
    clock.now = 84
    assert [write.record.key for write in recent.pop_due()] == [b"c"]


def test_an_item_that_is_written_again_and_again_takes_the_room_of_one_record(
    path: ItemPath, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(take_over, "MAX_REMEMBERED_BYTES", 250)
    recent = RecentWrites(window_seconds=42, max_records=9, max_taken_over=0, clock=clock)
    recent.take_over()
    for name in "aaaab":
        recent.add([path.record(name, b"v" * 100)])
    clock.now = 42
    assert [write.record.key for write in recent.pop_due()] == [b"a", b"b"]


def test_another_take_over_forgets_no_write_of_before_and_counts_its_own(path: ItemPath, clock: Clock) -> None:
    recent = RecentWrites(window_seconds=42, max_records=9, max_taken_over=9, clock=clock)
    recent.take_over()
    clock.now = 50
    recent.add([older := path.publish("a", title="x")])
    clock.now = 60
    recent.take_over()
    recent.add([newer := path.publish("b", title="y")])
    clock.now = 92
    assert recent.pop_due() == [RecentWrite(older)]
    clock.now = 102
    assert recent.pop_due() == [RecentWrite(newer, is_after_take_over=True)]


def test_writes_that_were_not_checked_are_due_again_but_for_a_newer_one_of_their_item(
    path: ItemPath, clock: Clock
) -> None:
    recent = RecentWrites(window_seconds=42, max_records=9, max_taken_over=9, clock=clock)
    recent.take_over()
    recent.add([path.publish("a", title="x"), first := path.publish("b", title="x")])
    clock.now = 42
    recent.add([later := path.publish("c", title="x")])
    popped = recent.pop_due()
    recent.add([newer := path.publish("a", title="y")])
    recent.put_back(popped)
    assert recent.pop_due() == [RecentWrite(first, is_after_take_over=True)]
    clock.now = 84
    assert recent.pop_due() == [RecentWrite(later), RecentWrite(newer)]


def test_writes_that_are_due_again_take_their_room_again(
    path: ItemPath, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(take_over, "MAX_REMEMBERED_BYTES", 250)
    recent = RecentWrites(window_seconds=42, max_records=9, max_taken_over=0, clock=clock)
    recent.take_over()
    recent.add([path.record(name, b"v" * 100) for name in "ab"])
    clock.now = 42
    recent.put_back(recent.pop_due())
    recent.add([path.record("c", b"v" * 100)])
    clock.now = 84
    assert [write.record.key for write in recent.pop_due()] == [b"a", b"b"]


def test_before_any_assignment_nothing_is_remembered(path: ItemPath, clock: Clock) -> None:
    recent = RecentWrites(window_seconds=1, max_records=9, max_taken_over=9, clock=clock)
    recent.add([path.publish("a", title="x")])
    assert not recent.is_due
    clock.now = 5
    assert recent.pop_due() == []


def test_of_the_first_window_after_a_take_over_no_more_than_were_held_then_count_as_taken_over(
    path: ItemPath, clock: Clock
) -> None:
    recent = RecentWrites(window_seconds=42, max_records=9, max_taken_over=2, clock=clock)
    clock.now = 100
    recent.take_over()
    recent.add([path.publish(name, title="x") for name in "abc"])
    clock.now = 141.9
    assert recent.pop_due() == []
    clock.now = 142
    assert [len(recent.pop_due(2)), recent.is_due, len(recent.pop_due(2)), recent.is_due] == [2, True, 1, False]
    recent.add([path.publish("a", title="y")])
    clock.now = 200
    assert [write.is_after_take_over for write in recent.pop_due()] == [False]
    recent.take_over()
    recent.add([path.publish(name, title="x") for name in "abc"])
    clock.now = 242
    assert [write.is_after_take_over for write in recent.pop_due()] == [True, True, False]


def taken_over(*records: SourceRecord) -> list[RecentWrite]:
    return [RecentWrite(record, is_after_take_over=True) for record in records]


async def test_what_a_former_owner_overwrote_deleted_or_brought_back_is_put_right(path: ItemPath) -> None:
    before = [path.publish(name, title="before") for name in ("overwritten", "brought-back", "kept")]
    await path.index_all(*before)
    old = dict(path.rows)
    after = [
        path.publish("overwritten", title="after"),
        path.delete("brought-back"),
        path.publish("deleted", title="published again"),
        path.publish("kept", title="after"),
        path.delete("gone"),
    ]
    await path.index_all(*after)
    path.rows.update({name: old[name] for name in ("overwritten", "brought-back")})
    del path.rows["deleted"]
    encoded = path.encoder.encoded
    assert await recheck(path.context, taken_over(*after), allowed) == 3
    assert {name: row.title for name, row in path.on_sale.items()} == {
        "overwritten": "after",
        "deleted": "published again",
        "kept": "after",
    }
    assert path.encoder.encoded == encoded + 2


async def test_what_a_former_owner_announced_last_is_announced_anew_as_it_is(path: ItemPath) -> None:
    await path.index_all(path.publish("changed", title="before"), path.publish("deleted", title="before"))
    zombies = list(path.outbox.announced)
    after = [path.publish("changed", title="after"), path.delete("deleted")]
    await path.index_all(*after)
    path.outbox.announced += zombies
    assert await recheck(path.context, taken_over(*after, path.publish("", title="of nobody")), allowed) == 0
    held, gone = path.outbox.announced[-2:]
    assert isinstance(held, ItemRow)
    assert (held.title, held.item_id, gone) == ("after", "changed", "deleted")


@pytest.mark.parametrize("place", [{"source_offset": 5}, {"source_partition": 1}])
async def test_a_row_that_changes_while_it_is_announced_is_announced_again(
    path: ItemPath, place: dict[str, Any]
) -> None:
    await path.index_all(path.publish("a", title="first"), path.publish("b", title="stays"))
    row = path.rows["a"]

    async def changed_by_another_worker() -> None:
        if len(path.outbox.announced) == 2:
            path.rows["a"] = replace(row, title="second", **place)

    await reannounce(path.context, ["a", "b"], changed_by_another_worker)
    told = [(one.item_id, one.title) for one in path.outbox.announced[2:] if isinstance(one, ItemRow)]
    assert told == [("a", "first"), ("b", "stays"), ("a", "second")]


async def test_a_row_that_moved_on_since_is_left_alone(path: ItemPath) -> None:
    record = path.publish("a", title="x")
    await path.index_all(record)
    await path.index_all(path.publish("a", title="newer"))
    assert await recheck(path.context, taken_over(record), allowed) == 0
    assert path.rows["a"].title == "newer"


async def test_what_is_being_deleted_when_it_is_time_to_look_again_stays_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, recent: RecentWrites
) -> None:
    path = ItemPath(config=QUICK)
    announce, announcing, go_on = path.outbox.announce, asyncio.Event(), asyncio.Event()

    async def announce_slowly(held: Sequence[ItemRow], gone: Sequence[str]) -> None:
        if gone:
            announcing.set()
            await go_on.wait()
        await announce(held, gone)

    monkeypatch.setattr(path.outbox, "announce", announce_slowly)
    async with running("items", path, tmp_path, recent=recent) as run:
        await run.put("a", item("a", title="on sale"))
        await run.until(lambda: len(run.acked) == 1)
        await run.put("a", None)
        await announcing.wait()
        clock.now, before = 100, clock.asked
        await run.until(lambda: clock.asked > before)
        go_on.set()
        await run.until(lambda: len(run.acked) == 2)
        clock.now = 200
        await run.until(lambda: len(path.outbox.announced) == 3)
        assert path.outbox.announced[1:] == ["a", "a"]
        assert path.on_sale == {}


async def test_a_worker_whose_writing_is_cancelled_from_below_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ItemPath(config=QUICK)

    async def cancelled(*given: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(path.outbox, "announce", cancelled)
    async with running("items", path, tmp_path) as run:
        await run.put("a", item("a", title="on sale"))
        await run.until(run.flow.failed.done)
        with pytest.raises(RuntimeError, match="stopped writing by itself"):
            await run.flow.failed


async def test_the_agent_looks_again_when_it_is_time(tmp_path: Path, clock: Clock, recent: RecentWrites) -> None:
    path = ItemPath(config=QUICK)
    async with running("items", path, tmp_path, recent=recent) as run:
        await run.put("a", item("a", title="newest"))
        await run.until(lambda: len(run.acked) == 1)
        path.rows["a"] = replace(path.rows["a"], title="of a zombie", content_hash="0" * 32, source_offset=-1)
        clock.now = 100
        await run.until(lambda: path.rows["a"].title == "newest")


async def test_partitions_that_move_while_the_agent_looks_again_put_it_off(
    tmp_path: Path, clock: Clock, recent: RecentWrites
) -> None:
    path = ItemPath(config=QUICK)
    async with running("items", path, tmp_path, recent=recent) as run:
        await run.put("a", item("a", title="newest"))
        await run.until(lambda: len(run.acked) == 1)
        path.rows["a"] = replace(path.rows["a"], title="of a zombie", content_hash="0" * 32, source_offset=-1)
        original, moved = path.index.fetch, []

        async def fetch(*arguments: Any, **more: Any) -> Any:
            if not moved:
                moved.append(True)
                run.flow.partitions_moved()
                recent.take_over()
            return await original(*arguments, **more)

        path.index.fetch = fetch  # type: ignore[method-assign]
        clock.now = 100
        await run.until(lambda: path.rows["a"].title == "newest")
        assert moved
        assert not run.flow.failed.done()


class SlowIndex(InMemoryItemIndex):
    """A store that takes a write of one kind and does not answer the first time."""

    def __init__(self, slow: str) -> None:
        super().__init__(encoder_version=VERSION, dim=DIM)
        self.slow, self.writes = slow, 0

    async def pause(self, what: str) -> None:
        self.writes += what == self.slow
        if what == self.slow and self.writes == 1:
            await asyncio.Event().wait()

    async def upsert(self, rows: Sequence[ItemRow]) -> None:
        await self.pause("upsert")
        await super().upsert(rows)

    async def delete(self, item_ids: Sequence[str]) -> None:
        await self.pause("delete")
        await super().delete(item_ids)


@pytest.mark.parametrize("slow", ["upsert", "delete"])
async def test_a_write_that_takes_longer_than_the_deadline_is_given_up_and_done_again(slow: str) -> None:
    config = IndexConfig.model_construct(**IndexConfig().__dict__ | {"session_timeout_seconds": 0.05})
    index = SlowIndex(slow)
    path = ItemPath(index=index, config=config)
    async with asyncio.timeout(10):
        report = await path.index_all(path.publish("a", title="x") if slow == "upsert" else path.delete("a"))
    assert (index.writes, path.rows["a"].is_deleted) == (2, slow == "delete")
    assert (report.held_seconds > 0) == (slow == "upsert")


@pytest.mark.parametrize("gone_at", range(1, 5))
async def test_each_step_of_a_deletion_is_guarded(path: ItemPath, gone_at: int) -> None:
    await path.index_all(path.publish("a", title="x"))
    asked, told = 0, len(path.outbox.announced)

    async def guard() -> None:
        nonlocal asked
        asked += 1
        if asked == gone_at:
            raise Fenced("replaced")

    with pytest.raises(Fenced):
        await index_batch(path.context, [path.delete("a")], guard)
    held = path.rows.get("a")
    assert (held is not None, held is not None and held.is_deleted) == [
        (True, False), (False, False), (True, True), (True, True),
    ][gone_at - 1]  # fmt: skip
    assert len(path.outbox.announced) - told == (gone_at == 4)


async def test_a_worker_without_heartbeats_holds_its_write_and_goes_on_when_they_are_back(path: ItemPath) -> None:
    silent = [BrokerUnavailable("Kafka", "no heartbeat")] * 3

    async def guard() -> None:
        if silent:
            raise silent.pop()

    record = path.publish("a", title="x")
    await index_batch(path.context, [record], guard)
    assert (silent, set(path.on_sale)) == ([], {"a"})


async def test_a_worker_that_was_replaced_while_it_held_writes_nothing(path: ItemPath) -> None:
    answers: list[Any] = [BrokerUnavailable("Kafka", "no heartbeat"), Fenced("replaced")]

    async def guard() -> None:
        raise answers.pop(0)

    with pytest.raises(Fenced):
        await index_batch(path.context, [path.publish("a", title="x")], guard)
    assert path.on_sale == {}
    assert path.outbox.announced == []


def test_a_write_and_the_silence_before_it_are_shorter_together_than_a_session() -> None:
    for seconds in (6.0, 30.0, 300.0):
        config = IndexConfig(session_timeout_seconds=seconds)
        assert config.write_deadline_seconds == pytest.approx(0.4 * seconds)
        assert config.recheck_seconds == pytest.approx(1.4 * seconds)
        assert config.silence_seconds + config.write_deadline_seconds <= seconds
        assert config.silence_seconds > 2 * seconds / 10  # heartbeats are sent every tenth of it
