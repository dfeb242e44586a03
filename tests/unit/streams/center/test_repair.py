"""Repair beside a live worker: whatever it writes at the worst moment is what holds in the end.

The guard is called between reading a row and writing it, so that is where these tests let the worker write.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta

import pytest

from streams.broker.records import SourceRecord
from streams.center.compare import CenterReport
from streams.center.repair import LogTail, RecordDecoding, Repairer
from streams.indexing.index_batch import index_batch
from streams.stores.vectors.row_scan import RowSource
from tests.factories.item_path import ItemPath, allowed


@dataclass
class FakeTail(LogTail):
    """A partition of which records become visible when somebody looks."""

    log: dict[int, SourceRecord] = field(default_factory=dict)
    seen: dict[bytes, int] = field(default_factory=dict)
    start: int = 0

    async def catch_up(self) -> None:
        self.seen = {r.key: r.offset for r in self.log.values() if r.offset >= self.start and r.key is not None}

    def newest(self, key: bytes) -> int | None:
        return self.seen.get(key)

    async def record(self, offset: int) -> SourceRecord | None:
        return self.log.get(offset)


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
        self.tail.log[record.offset] = record
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
        self.repairer.add(record.key, self.decoding.expect(self.say(record)))
        return record

    async def repair(self) -> tuple[int, int]:
        """How many rows were mended, and how many are left."""
        report = CenterReport()
        await self.repairer.repair(self.tail, report)
        return report.mended, report.left

    @property
    def titles(self) -> dict[str, tuple[str, int]]:
        return {item_id: (row.title, row.source_offset) for item_id, row in self.path.rows.items()}


@pytest.fixture
def beside() -> Beside:
    return Beside()


async def test_a_missing_row_is_made_by_the_index_path(beside: Beside) -> None:
    beside.to_repair(beside.path.publish("a", title="a shoe"))
    assert await beside.repair() == (1, 0)
    assert (beside.path.rows["a"].vector == beside.path.encoder.of(title="a shoe")).all()
    assert len(beside.path.outbox.announced) == 1


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
