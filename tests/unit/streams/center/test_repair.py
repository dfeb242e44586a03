"""Repair beside a live worker: whatever it writes at the worst moment is what holds in the end.

The guard is called between reading a row and writing it, so that is where these tests let the worker write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest

from schemas.errors import Fenced, StoreUnavailable
from streams.broker.records import SourceRecord
from streams.center.compare import CenterReport, Expected
from streams.center.repair import LogTail, RecordDecoding, Repairer
from streams.indexing.config import IndexConfig
from streams.indexing.index_batch import index_batch
from streams.stores.vectors.row_scan import RowSource, source_of
from tests.factories.fake_consumer import FakeRecord
from tests.factories.item_path import ItemPath, allowed
from tests.factories.memory_log import MemoryLog


class FakeTail(LogTail):
    """A log of which records become visible when somebody looks."""

    def __init__(self) -> None:
        reader: Any = None
        super().__init__(reader, {})
        self.log: dict[tuple[int, int], SourceRecord] = {}
        self.start = 0
        """What lies before it is no part of the tail."""

    async def catch_up(self) -> None:
        self._newest = {}
        for record in sorted(self.log.values(), key=lambda one: (one.partition, one.offset)):
            if record.offset >= self.start:
                self.note(record.key, record.partition, record.offset, record.timestamp_ms)

    async def record(self, partition: int, offset: int) -> SourceRecord | None:
        return self.log.get((partition, offset))


@dataclass
class Beside:
    """A repairer, its log, and a worker that strikes before its first writes."""

    path: ItemPath = field(default_factory=ItemPath)
    tail: FakeTail = field(default_factory=FakeTail)
    strikes: list[Callable[[], Awaitable[None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.decoding = RecordDecoding(100_000, {}, timedelta(hours=1))
        self.repairer = Repairer(self.path.context, self.guard, self.decoding, lambda version: True)

    def say(self, record: SourceRecord) -> SourceRecord:
        self.tail.log[record.partition, record.offset] = record
        return record

    async def guard(self) -> None:
        if self.strikes:
            await self.strikes.pop(0)()

    def worker_writes(self, record: SourceRecord) -> Callable[[], Awaitable[None]]:
        async def strike() -> None:
            self.say(record)
            one = ItemPath(index=self.path.index, outbox=self.path.outbox)  # another process, without our lock
            await index_batch(one.context, [record], allowed)

        return strike

    def to_repair(self, record: SourceRecord) -> SourceRecord:
        """A record that is in the log, and whose row is to be repaired."""
        assert record.key is not None
        self.repairer.add(record.key, self.decoding.expect(self.say(record), record.timestamp_ms))
        return record

    async def repair(self) -> tuple[int, int]:
        """How many rows were mended, and how many are left."""
        report = CenterReport()
        await self.repairer.repair(self.tail, report)
        return report.mended, report.left

    @property
    def titles(self) -> dict[str, tuple[str, int]]:
        return {item_id: (row.title, row.source_offset) for item_id, row in self.path.on_sale.items()}


@pytest.fixture
def path() -> ItemPath:
    return ItemPath()


@pytest.fixture
def beside() -> Beside:
    return Beside()


async def test_a_missing_row_is_made_by_the_index_path(beside: Beside) -> None:
    beside.to_repair(beside.path.publish("a", title="a shoe"))
    assert await beside.repair() == (1, 0)
    assert (beside.path.rows["a"].vector == beside.path.encoder.of(title="a shoe")).all()
    assert len(beside.path.outbox.announced) == 1


async def test_an_attribute_that_the_settings_leave_out_since_is_removed_and_announced(beside: Beside) -> None:
    record = beside.path.publish("a", title="a shoe", attributes={"colour": "red", "rating": 4.5})
    await index_batch(beside.path.context, [record], allowed)
    assert set(beside.path.rows["a"].attributes) == {"colour", "rating"}
    beside.decoding = replace(beside.decoding, outcomes=("rating",))
    after = ItemPath(IndexConfig(outcomes=("rating",)), index=beside.path.index, outbox=beside.path.outbox)
    beside.repairer = Repairer(after.context, allowed, beside.decoding, lambda version: True)
    beside.to_repair(record)
    assert await beside.repair() == (1, 0)
    assert beside.path.rows["a"].attributes == {"colour": "red"} and len(beside.path.outbox.announced) == 2


async def test_what_a_worker_writes_between_look_and_write_holds_in_the_end(beside: Beside) -> None:
    old = beside.to_repair(beside.path.publish("a", title="old"))
    beside.tail.start = old.offset + 1
    beside.strikes = [
        beside.worker_writes(beside.path.publish("a", title="newer", offset=old.offset + 1)),
        allowed,
        allowed,
        beside.worker_writes(beside.path.publish("a", title="newest", offset=old.offset + 2)),
    ]
    assert await beside.repair() == (1, 0)
    assert beside.titles == {"a": ("newest", old.offset + 2)}
    assert beside.strikes == []
    assert getattr(beside.path.outbox.announced[-1], "source_offset", None) == old.offset + 2


async def test_a_delete_between_look_and_write_is_not_undone(beside: Beside) -> None:
    old = beside.to_repair(beside.path.publish("a", title="old"))
    beside.tail.start = old.offset + 1
    beside.strikes = [beside.worker_writes(beside.path.delete("a", offset=old.offset + 1))]
    assert await beside.repair() == (1, 0)
    assert beside.titles == {}
    assert beside.path.outbox.announced[-1] == "a"


async def test_a_row_without_a_record_is_deleted_unless_it_was_published_again_meanwhile(beside: Beside) -> None:
    await beside.path.index_all(beside.path.publish("gone", title="x"), beside.path.publish("back", title="y"))
    beside.tail.start = 5
    for item_id, offset in (("gone", 0), ("back", 1)):
        beside.repairer.add(item_id.encode(), RowSource(item_id, 0, offset))
    beside.strikes = [beside.worker_writes(beside.path.publish("back", title="again", offset=7))]
    assert await beside.repair() == (2, 0)
    assert beside.titles == {"back": ("again", 7)}
    assert "gone" in beside.path.outbox.announced


async def test_a_repair_that_may_write_no_more_deletes_and_announces_nothing(beside: Beside) -> None:
    await beside.path.index_all(beside.path.publish("gone", title="x"))
    told = len(beside.path.outbox.announced)

    async def fenced() -> None:
        raise Fenced("another repair")

    beside.repairer.add(b"gone", RowSource("gone", 0, 0))
    beside.strikes = [fenced]
    with pytest.raises(Fenced):
        await beside.repair()
    assert set(beside.titles) == {"gone"} and len(beside.path.outbox.announced) == told


async def test_a_deletion_that_fails_is_repeated_and_announced_once_it_is_done(beside: Beside) -> None:
    await beside.path.index_all(beside.path.publish("gone", title="x"))
    delete, announced, calls = beside.path.index.delete, beside.path.outbox.announced, 0

    async def away_once(item_ids: Sequence[str]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            assert len(announced) == 1
            raise StoreUnavailable("Milvus", "away")
        await delete(item_ids)

    beside.path.index.delete = away_once
    beside.repairer.add(b"gone", RowSource("gone", 0, 0))
    assert await beside.repair() == (1, 0)
    assert (calls, beside.titles, announced[-1]) == (2, {}, "gone")


def test_what_is_enough_for_a_batch_is_repaired_as_one() -> None:
    beside = Beside(ItemPath(IndexConfig(batch_max_items=2)))
    one, other = RowSource("a", 0, 3), RowSource("b", 0, 4)
    assert [beside.repairer.add(*given) for given in ((b"a", one), (b"a", one), (b"b", other))] == [False, False, True]


NOTHING: dict[str, Any] = {"max_record_bytes": 100_000, "field_map": {}, "max_ahead": timedelta(hours=1)}


@pytest.mark.parametrize(
    ("settings", "change", "usable"),
    [
        ({}, {}, True),
        ({"max_record_bytes": 20}, {}, False),
        ({"field_map": {"title": "name"}}, {}, False),
        ({"field_map": {"title": ["name", "title"]}}, {}, True),
        ({"max_ahead": timedelta(seconds=-3_600 * 48)}, {}, False),
        ({}, {"key": b"b"}, False),
        ({}, {"key": None}, False),
        ({}, {"key": b"\xff"}, False),
        ({}, {"value": b"{"}, False),
        ({"max_record_bytes": 1}, {"value": None}, True),
    ],
)
def test_a_record_is_read_as_the_index_worker_reads_it(
    path: ItemPath, settings: dict[str, Any], change: dict[str, Any], usable: bool
) -> None:
    record = replace(path.publish("a", title="x", partition=2, offset=7), **change)
    expected = RecordDecoding(**(NOTHING | settings)).expect(record, 50)
    assert (expected.key, expected.partition, expected.offset, expected.time_ms) == (record.key or b"", 2, 7, 50)
    assert expected.usable is usable and (expected.content is not None) is (usable and record.value is not None)
    assert expected.item_id == {b"a": "a", b"b": "b"}.get(record.key or b"", "")


async def test_a_record_that_cannot_be_read_is_neither_mended_by_a_write_nor_left(beside: Beside) -> None:
    await beside.path.index_all(beside.path.publish("a", title="good"))
    beside.to_repair(beside.path.record("a", b"{"))
    assert await beside.repair() == (1, 0)
    assert beside.titles == {"a": ("good", 0)}


async def test_the_tail_reads_each_record_once_and_tells_records_by_their_place() -> None:
    log = MemoryLog(items=[[FakeRecord(0, 0, b"old")], []])
    zero, one = await log.partitions("items")
    reader: Any = log
    tail = LogTail(reader, {zero: 1, one: 0})
    await tail.catch_up()
    assert log.passed == [] and not tail.has_key(b"old")
    log.topics["items"][1].append(FakeRecord(1, 0, b"new", timestamp=5))
    await tail.catch_up()
    log.topics["items"][0].append(FakeRecord(0, 1, None))
    log.topics["items"][1].append(FakeRecord(1, 1, b"new", timestamp=4))
    await tail.catch_up()
    await tail.catch_up()
    assert log.passed == [("items", 1, 0), ("items", 0, 1), ("items", 1, 1)]
    assert tail.newest(b"new", RowSource("new", 0, 0)) == (5, 1, 1)
    found = [await tail.record(*place) for place in ((0, 0), (1, 0), (1, 7))]
    assert [record and (record.topic, record.partition, record.offset, record.key) for record in found] == [
        ("items", 0, 0, b"old"), ("items", 1, 0, b"new"), None,
    ]  # fmt: skip


async def test_a_row_that_is_no_longer_the_one_that_was_judged_is_left_alone(beside: Beside) -> None:
    await beside.path.index_all(beside.path.publish("a", title="x", offset=4))
    beside.repairer.add(b"a", RowSource("a", 0, 3))
    await beside.repair()
    assert beside.titles == {"a": ("x", 4)}


async def test_a_stale_row_and_a_resurrected_one_are_put_right(beside: Beside) -> None:
    await beside.path.index_all(beside.path.publish("stale", title="old"), beside.path.publish("undead", title="z"))
    for record in (beside.path.publish("stale", title="new"), beside.path.delete("undead")):
        beside.to_repair(record)
    assert await beside.repair() == (2, 0)
    assert beside.titles == {"stale": ("new", 2)}


async def test_a_row_of_an_aborted_record_is_replaced_by_the_newest_committed_one(beside: Beside) -> None:
    kept = beside.path.publish("a", title="kept")
    await beside.path.index_all(kept, beside.path.publish("a", title="aborted"))
    beside.to_repair(kept)
    assert await beside.repair() == (1, 0)
    assert beside.titles == {"a": ("kept", kept.offset)}


async def test_what_cannot_be_encoded_is_told_as_left(beside: Beside) -> None:
    beside.to_repair(beside.path.publish("a", image="bm90IGEgcGljdHVyZQ=="))
    assert await beside.repair() == (0, 1)
    assert len(beside.path.dead_letters.letters) == 1


async def test_an_older_publish_of_another_partition_does_not_bring_a_deleted_item_back(beside: Beside) -> None:
    publish = beside.path.publish("a", title="x", partition=0, ms=1)
    deletion = beside.path.delete("a", partition=1, ms=2)
    await beside.path.index_all(publish, deletion)
    beside.say(publish)
    beside.to_repair(deletion)
    for _ in range(2):
        assert await beside.repair() in ((1, 0), (0, 0))
        assert beside.titles == {}


async def test_what_a_worker_writes_meanwhile_from_another_partition_holds_by_its_time(beside: Beside) -> None:
    old = beside.to_repair(beside.path.publish("a", title="old", partition=1, offset=7, ms=5))
    beside.tail.start = 8
    beside.strikes = [
        beside.worker_writes(beside.path.publish("a", title="older still", partition=0, offset=9, ms=3)),
        allowed,
        beside.worker_writes(beside.path.publish("a", title="newest", partition=0, offset=10, ms=6)),
    ]
    assert await beside.repair() == (1, 0)
    assert beside.titles == {"a": ("newest", 10)}
    assert old.offset == 7


async def test_a_record_whose_clock_stepped_back_is_written_at_the_time_of_its_partition(beside: Beside) -> None:
    await beside.path.index_all(beside.path.publish("a", title="of the other partition", partition=1, ms=70))
    newest = beside.say(beside.path.publish("a", title="newest", ms=50))  # behind one of 100 ms
    beside.repairer.add(b"a", beside.decoding.expect(newest, newest.timestamp_ms + 50))
    beside.tail.start = newest.offset + 1
    assert await beside.repair() == (1, 0)
    row = beside.path.rows["a"]
    assert (row.title, row.produced_at_ms) == ("newest", newest.timestamp_ms + 50)


async def test_a_row_is_not_removed_while_a_batch_is_being_written(beside: Beside) -> None:
    await beside.path.index_all(beside.path.delete("gone"))
    marks = [source_of(row) for row in beside.path.rows.values()]
    async with beside.path.context.writing:
        forgetting = asyncio.create_task(beside.repairer.forget(marks, beside.tail))
        for _ in range(20):
            await asyncio.sleep(0)
        assert set(beside.path.rows) == {"gone"}
    await forgetting
    assert beside.path.rows == {}


async def test_a_mark_whose_deletion_the_log_does_not_hold_gives_way_to_what_it_holds(beside: Beside) -> None:
    kept = beside.path.publish("a", title="kept")
    await beside.path.index_all(kept, beside.path.delete("a"))
    beside.to_repair(kept)
    assert await beside.repair() == (1, 0)
    assert beside.titles == {"a": ("kept", 0)}


async def test_a_mark_without_any_record_is_forgotten_and_one_that_got_a_record_stays(beside: Beside) -> None:
    await beside.path.index_all(beside.path.delete("gone"), beside.path.delete("back"))
    marks = [source_of(row) for row in beside.path.rows.values()]
    beside.say(beside.path.publish("back", title="again", offset=9))
    await beside.repairer.forget(marks, beside.tail)
    assert set(beside.path.rows) == {"back"}


def test_the_tail_tells_the_newest_record_by_time_across_partitions_and_by_offset_within_one() -> None:
    tail = FakeTail()
    fault = Expected(b"a", "a", 1, 7, 50, None)
    tail.note(b"a", 0, 9, 49)
    assert tail.newest(b"a", fault) is None
    assert tail.newest(b"a", RowSource("a", 1, 7)) == (49, 0, 9)
    tail.note(b"a", 1, 8, 20)  # behind the fault, though the clock stepped back
    assert tail.newest(b"a", fault) == (50, 1, 8)
    tail.note(b"a", 0, 10, 51)
    tail.note(b"a", 0, 11, 30)
    assert tail.newest(b"a", fault) == (51, 0, 11)
    assert tail.newest(b"b", fault) is None and not tail.has_key(b"b")
