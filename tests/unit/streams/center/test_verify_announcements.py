"""The last word on `embeddings` against the center: what is a fault, what is only under way, what is told again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from aiokafka import TopicPartition

from schemas.items import embedding_key
from streams.center import verify_announcements
from streams.center.compare import CenterReport
from streams.center.verify_announcements import AnnouncementCheck
from streams.indexing.announcements import as_embedding
from streams.stores.vectors.item_index import ItemRow
from tests.factories.fake_consumer import FakeRecord

VERSION = "e1"
UNIT = np.eye(8, dtype=np.float32)[0]
ROW = ItemRow("a", VERSION, UNIT, "0" * 32, datetime(2026, 5, 1, tzinfo=UTC), None, 3.0, 3.0, True, False, 2, 10, 0)


class World:
    """One partition of `embeddings` in a list, and rows in a dictionary."""

    def __init__(self) -> None:
        self.log: list[FakeRecord] = []
        self.rows: dict[str, ItemRow] = {}
        self.later: Callable[[], None] = lambda: None

    def say(self, row: ItemRow | None, item_id: str, version: str = VERSION) -> None:
        value = as_embedding(row).model_dump_json().encode() if row else None
        self.log.append(FakeRecord(0, len(self.log), embedding_key(version, item_id), value))

    async def partitions(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, 0)]

    async def bounds(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, tuple[int, int]]:
        return {one: (0, len(self.log)) for one in partitions}

    async def end(self, partition: TopicPartition) -> int:
        return len(self.log)

    async def read(self, partition: TopicPartition, start: int, end: int) -> AsyncIterator[FakeRecord]:
        for record in self.log[start:end]:
            yield record

    async def fetch(self, item_ids: Sequence[str]) -> Mapping[str, ItemRow]:
        return {name: self.rows[name] for name in item_ids if name in self.rows}

    async def settle(self) -> None:
        self.later()

    async def check(self, *, repair: bool = False, but: frozenset[str] = frozenset()) -> CenterReport:
        async def reannounce(item_ids: Sequence[str]) -> None:
            for name in item_ids:
                self.say(self.rows.get(name), name)

        reader: Any = self
        report = CenterReport(repaired=repair)
        mend = reannounce if repair else None
        check = AnnouncementCheck(
            reader, self.fetch, lambda version: version == VERSION, self.settle, mend, lambda what, done, total: None
        )
        await check.run(report, but=but)
        return report


@pytest.fixture
def world() -> World:
    return World()


def named(item_id: str, offset: int = 10) -> ItemRow:
    return replace(ROW, item_id=item_id, source_offset=offset)


async def test_announcements_that_agree_are_no_fault(world: World) -> None:
    world.say(named("a", 3), "a")
    world.say(world.rows.setdefault("a", named("a")), "a")
    world.say(named("gone"), "gone")
    world.say(None, "gone")
    world.say(named("of-another-encoder"), "of-another-encoder", version="e0")
    world.log.append(FakeRecord(0, len(world.log), b"no key of embeddings", b"?"))
    report = await world.check()
    assert (report.faults, report.changed_meanwhile) == (0, 0)


async def test_what_a_zombie_said_last_is_found_and_told_again(world: World) -> None:
    world.rows["changed"] = named("changed", 20)
    world.say(world.rows["changed"], "changed")
    world.say(None, "deleted")
    world.say(named("changed", 9), "changed")
    world.say(named("deleted", 9), "deleted")
    world.rows["kept"] = named("kept", 21)
    world.say(None, "kept")
    found = await world.check()
    assert (found.faults, found.mended) == (3, 0)
    assert {one.item_id: one.detail for one in found.examples} == {
        "changed": "announced from 2/9, yet there from 2/20",
        "deleted": "announced from 2/9, yet not there",
        "kept": "announced as gone, yet there from 2/21",
    }
    report = await world.check(repair=True)
    assert (report.found["misannounced"], report.mended, report.left) == (3, 3, 0)
    assert (await world.check()).faults == 0


async def test_what_a_live_worker_is_about_to_announce_is_no_fault(world: World) -> None:
    world.say(named("a", 3), "a")
    world.rows["a"] = named("a", 4)
    world.later = lambda: world.say(world.rows["a"], "a")
    report = await world.check(repair=True)
    assert (report.faults, report.changed_meanwhile, report.mended) == (0, 1, 0)


async def test_a_row_that_is_wrong_itself_is_told_once(world: World) -> None:
    world.say(named("a", 3), "a")
    assert (await world.check(but=frozenset({"a"}))).faults == 0


@pytest.mark.parametrize("count", [3, 4, 5])
@pytest.mark.parametrize("repair", [False, True])
async def test_however_many_there_are_each_is_compared_and_told_again(
    world: World, monkeypatch: pytest.MonkeyPatch, count: int, repair: bool
) -> None:
    monkeypatch.setattr(verify_announcements, "COMPARED_AT_ONCE", 2)
    for n in range(count):
        world.say(named(f"i{n}", 3), f"i{n}")
        world.rows[f"i{n}"] = named(f"i{n}", 4 if n else 3)
    report = await world.check(repair=repair)
    assert (report.faults, report.mended) == (count - 1, count - 1 if repair else 0)
    assert [one.item_id for one in report.examples] == [f"i{n}" for n in range(1, count)]
    assert (await world.check()).faults == (0 if repair else count - 1)


async def test_what_was_put_right_while_it_was_compared_is_no_fault(world: World) -> None:
    world.say(named("a", 3), "a")
    world.rows["a"] = named("a", 4)
    world.later = lambda: world.rows.update(a=named("a", 3))
    assert (await world.check()).faults == 0


@pytest.mark.parametrize("place", [(2, 10), (0, 0)])
async def test_an_announcement_that_nobody_can_read_is_told_again(world: World, place: tuple[int, int]) -> None:
    world.rows["a"] = replace(named("a", place[1]), source_partition=place[0])
    world.say(world.rows["a"], "a")
    world.log.append(replace(world.log[0], offset=1, value=b"{"))
    assert (await world.check(repair=True)).mended == 1
    assert (await world.check()).faults == 0
