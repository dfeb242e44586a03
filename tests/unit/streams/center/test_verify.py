"""The whole verification over a log in memory: across partitions, beside a worker, with and without retries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiokafka import TopicPartition

from schemas.errors import Reason
from schemas.items import ImageRetry
from schemas.letters import DeadLetter
from streams.broker.clients import BrokerConfig
from streams.broker.partitioning import home_partition
from streams.broker.records import SourceRecord
from streams.broker.topics import TopicsConfig
from streams.center import newest_records, verify
from streams.center.compare import CenterReport
from streams.center.repair import RecordDecoding, Repairer
from streams.center.verify import CenterVerification
from streams.indexing.announcements import as_embedding
from streams.indexing.config import IndexConfig
from streams.stores.vectors.item_index import ItemRow
from streams.stores.vectors.row_scan import InMemoryRowScan
from tests.factories.fake_consumer import IN_TIME_MS, FakeRecord
from tests.factories.item_path import NOW, PICTURE_URL, VERSION, ItemPath, allowed
from tests.factories.memory_log import MemoryLog


class World:
    """Topics in lists, a center in memory, and what happens right before rows are read."""

    def __init__(self) -> None:
        self.path = ItemPath()
        self.logs: dict[str, list[list[FakeRecord]]] = {
            name: [[], []] for name in ("items", "items-retry", "embeddings", "dead-letters")
        }
        self.acknowledged: dict[TopicPartition, int] = {}
        self.before_rows: Callable[[], None] = lambda: None
        self.retries_since = NOW - timedelta(days=7)
        self.on_progress: Callable[[str, int, int], None] = lambda what, done, total: None

    def say(self, *records: SourceRecord) -> None:
        for one in records:
            self.logs["items"][one.partition].append(
                FakeRecord(one.partition, one.offset, one.key, one.value, one.timestamp_ms)
            )
            self.acknowledged[TopicPartition("items", one.partition)] = one.offset + 1

    async def index(self, *records: SourceRecord) -> None:
        self.say(*records)
        await self.path.index_all(*records)

    def waiting(self, *retries: ImageRetry) -> None:
        log = self.logs["items-retry"][0]
        for retry in retries:
            log.append(FakeRecord(0, len(log), b"k", retry.model_dump_json().encode()))

    # ---- the part of a reader that verification uses

    async def partitions(self, name: str) -> list[TopicPartition]:
        return [TopicPartition(name, number) for number in range(len(self.logs[name]))]

    async def bounds(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, tuple[int, int]]:
        return {one: (0, await self.end(one)) for one in partitions}

    async def end(self, partition: TopicPartition) -> int:
        log = self.logs[partition.topic][partition.partition]
        return log[-1].offset + 1 if log else 0

    async def committed(self, role: str) -> Mapping[TopicPartition, int]:
        return self.acknowledged

    async def read(self, partition: TopicPartition, start: int, end: int) -> AsyncIterator[Any]:
        for record in list(self.logs[partition.topic][partition.partition]):
            if start <= record.offset < end:
                yield TopicRecord(partition.topic, record)

    async def one(self, partition: TopicPartition, offset: int) -> Any:
        async for record in self.read(partition, offset, offset + 1):
            return record
        return None

    async def fetch(self, item_ids: Sequence[str]) -> Mapping[str, ItemRow]:
        self.before_rows()
        return await self.path.index.fetch(item_ids, pending=True)  # type: ignore[no-any-return]

    async def verify(self, *, repair: bool = False) -> CenterReport:
        for number, told in enumerate(self.path.outbox.announced):
            item_id, value = (told, None) if isinstance(told, str) else (told.item_id, as_embedding(told))
            key = f"{VERSION}:{item_id}".encode()
            self.logs["embeddings"][0].append(
                FakeRecord(0, number, key, None if value is None else value.model_dump_json().encode())
            )
        reader: Any = self
        decoding = RecordDecoding(100_000, {}, timedelta(hours=1))
        verification = CenterVerification(
            reader,
            reader,
            self.fetch,
            InMemoryRowScan(self.path.index),
            decoding,
            is_current=lambda version: version == VERSION,
            retries_since=self.retries_since,
            repairer=Repairer(self.path.context, allowed, decoding, lambda version: True) if repair else None,
            on_progress=self.on_progress,
        )
        return await verification.run()


class TopicRecord:
    """A record that names its topic."""

    def __init__(self, topic: str, record: FakeRecord) -> None:
        self.topic = topic
        self.partition, self.offset, self.timestamp = record.partition, record.offset, record.timestamp
        self.key, self.value, self.headers = record.key, record.value, record.headers


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(verify, "_ANNOUNCED_SECONDS", 0.0)
    return World()


async def test_a_deletion_in_another_partition_holds_through_repair_after_repair(world: World) -> None:
    publish, deletion = world.path.publish("a", title="x", ms=1), world.path.delete("a", partition=1, ms=2)
    world.say(publish, deletion)
    await world.path.index_all(deletion)
    await world.path.index_all(publish)
    for _ in range(2):
        report = await world.verify(repair=True)
        assert (report.faults, report.left, report.split, world.path.on_sale) == (0, 0, 1, {})


async def test_a_deletion_that_was_compacted_away_is_remembered_by_its_mark(world: World) -> None:
    publish, deletion = world.path.publish("a", title="x", ms=1), world.path.delete("a", partition=1, ms=2)
    await world.path.index_all(publish, deletion)
    world.say(publish)
    report = await world.verify(repair=True)
    assert (report.faults, report.left, world.path.on_sale) == (0, 0, {})
    assert world.path.rows["a"].is_deleted


async def test_a_center_that_took_the_older_of_two_partitions_is_put_right_once_and_for_all(world: World) -> None:
    old, new = world.path.publish("a", title="old", ms=1), world.path.publish("a", title="new", partition=1, ms=2)
    await world.path.index_all(old)
    world.say(old, new)
    first = await world.verify(repair=True)
    assert (first.found["stale"], first.mended, first.left) == (1, 1, 0)
    assert world.path.rows["a"].title == "new"
    world.logs["embeddings"][0].clear()
    assert (await world.verify(repair=True)).faults == 0


async def test_an_item_whose_retry_is_lost_is_missing_and_gets_another(world: World) -> None:
    await world.index(world.path.publish("bare", image_url=PICTURE_URL))
    (retry,) = world.path.outbox.retries
    world.waiting(retry)
    assert (await world.verify()).faults == 0
    world.acknowledged[TopicPartition("items-retry", 0)] = 1  # committed past it, and never handled
    world.path.outbox.retries.clear()
    report = await world.verify(repair=True)
    assert (report.found["missing"], report.left) == (1, 0)
    assert [one.source for one in world.path.outbox.retries] == [retry.source]


async def test_a_title_without_its_picture_is_judged_only_while_letters_and_retries_are_kept(world: World) -> None:
    await world.index(world.path.publish("a", title="x", image_url=PICTURE_URL))
    assert (await world.verify()).found["wrong"] == 1
    world.logs["embeddings"][0].clear()
    world.retries_since = NOW + timedelta(milliseconds=1)
    assert (await world.verify()).faults == 0
    # a row that waits is judged at any time
    await world.index(world.path.publish("bare", image_url=PICTURE_URL, ms=0))
    world.logs["embeddings"][0].clear()
    assert dict((await world.verify()).found) == {"missing": 1}
    world.logs["embeddings"][0].clear()
    world.retries_since = NOW
    assert dict((await world.verify()).found) == {"missing": 1, "wrong": 1}


@pytest.mark.parametrize("held", [True, False])
async def test_an_item_whose_newest_record_nobody_can_read_is_no_fault_whatever_the_center_holds(
    world: World, held: bool
) -> None:
    if held:
        await world.index(world.path.publish("a", title="good"))
    world.say(world.path.record("a", b"{"), world.path.record(b"\xff", None), world.path.record("b", b"{"))
    report = await world.verify(repair=True)
    assert (report.unusable, report.faults, report.mended, report.left) == (3, 0, 0, 0)
    assert set(world.path.on_sale) == ({"a"} if held else set())


async def test_a_row_of_which_the_topic_holds_no_record_goes_with_a_repair_and_is_announced_as_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "COMPARED_AT_ONCE", 2)
    lost = [world.path.publish(f"lost{n}", title="x", partition=n % 2) for n in range(5)]
    kept = [world.path.publish(f"kept{n}", title="x") for n in range(5)]
    await world.path.index_all(*lost, *kept)
    world.say(*kept)
    found = await world.verify()
    assert (found.faults, found.mended, found.found["resurrected"]) == (5, 0, 5)
    one = next(one for one in found.examples if one.item_id == "lost1")
    assert (one.partition, one.offset, one.detail) == (1, None, "there from 1/0, yet the topic holds no record of it")
    world.logs["embeddings"][0].clear()
    report = await world.verify(repair=True)
    assert (report.found["resurrected"], report.mended, report.left) == (5, 5, 0)
    assert set(world.path.rows) == {f"kept{n}" for n in range(5)}
    assert set(world.path.outbox.announced[-5:]) == {f"lost{n}" for n in range(5)}


@pytest.mark.parametrize("what", ["published", "deleted", "written"])
async def test_a_row_without_a_record_that_changes_meanwhile_is_not_judged(world: World, what: str) -> None:
    await world.path.index_all(world.path.publish("a", title="x"), world.path.publish("b", title="x"))

    def meanwhile() -> None:
        if what == "published":
            world.say(world.path.publish("a", title="again"))
        elif what == "deleted":
            world.path.rows.pop("a", None)
        else:
            world.path.rows["a"] = replace(world.path.rows["a"], source_offset=9)

    fetches = 0

    def once() -> None:
        nonlocal fetches
        fetches += 1
        if fetches == 2:  # the first one is of no records at all
            meanwhile()

    world.before_rows = once
    report = await world.verify(repair=True)
    assert (report.changed_meanwhile, report.found["resurrected"]) == (1, 1)
    assert report.examples[0].item_id == "b" and "b" not in world.path.rows


async def test_more_items_than_are_compared_at_once_are_all_compared_and_mended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "COMPARED_AT_ONCE", 2)
    world.path = ItemPath(IndexConfig(batch_max_items=3))
    world.say(*(world.path.publish(f"i{n}", title="x", partition=n % 2) for n in range(7)))
    report = await world.verify(repair=True)
    assert (report.found["missing"], report.mended, report.left) == (7, 7, 0)
    assert len(world.path.on_sale) == 7


async def test_what_a_worker_wrote_from_beyond_the_end_is_not_judged(world: World) -> None:
    await world.index(world.path.publish("a", title="x"))
    newer = world.path.publish("a", title="newer", partition=1, ms=9)

    def written_meanwhile() -> None:
        if world.path.rows["a"].title == "x":
            row = world.path.rows["a"]
            world.path.rows["a"] = replace(
                row, title="newer", source_partition=1, source_offset=newer.offset, produced_at_ms=newer.timestamp_ms
            )
            world.say(newer)

    world.before_rows = written_meanwhile
    report = await world.verify()
    assert (report.changed_meanwhile >= 1, report.found["wrong"], report.found["stale"]) == (True, 0, 0)


async def test_what_no_worker_acknowledged_waits_in_whatever_partition(world: World) -> None:
    await world.index(world.path.publish("a", title="x", ms=1))
    world.say(world.path.delete("a", partition=1, ms=2))
    world.acknowledged[TopicPartition("items", 1)] = 0
    report = await world.verify(repair=True)
    assert (report.waiting, report.faults, world.path.rows["a"].title) == (1, 0, "x")


async def test_marks_of_which_the_topic_holds_nothing_go_with_a_repair(world: World) -> None:
    await world.path.index_all(world.path.delete("gone", ms=1))
    report = await world.verify()
    assert (set(world.path.rows), report.faults, report.changed_meanwhile) == ({"gone"}, 0, 0)
    await world.verify(repair=True)
    assert world.path.rows == {}


def letter_of(topic: str, partition: int, offset: int, value: bytes | None) -> FakeRecord:
    letter = DeadLetter(topic, partition, offset, b"k", value, "image", Reason.IMAGE_UNAVAILABLE, "x", NOW)
    return FakeRecord(0, 0, letter.letter_key, letter.value, headers=tuple(letter.headers()))


@pytest.mark.parametrize("by", ["the record", "its retry"])
async def test_a_record_that_was_refused_is_no_fault_and_another_one_is(world: World, by: str) -> None:
    refused = world.path.publish("a", title="x", image_url=PICTURE_URL)
    await world.index(refused)
    (retry,) = world.path.outbox.retries
    lost = world.path.publish("b", title="y")
    world.say(lost)
    topic = "items" if by == "the record" else "items-retry"
    value = None if by == "the record" else retry.model_dump_json().encode()
    world.logs["dead-letters"][1] += [
        FakeRecord(1, 0, b"?", b"no letter"),
        letter_of("items-retry", 0, 3, b"{broken"),
        letter_of("behaviours", lost.partition, lost.offset, None),
        letter_of("items", lost.partition + 1, lost.offset, None),
        letter_of("items-retry", lost.partition, lost.offset, None),
        letter_of(topic, refused.partition, refused.offset, value),
    ]
    for number, record in enumerate(world.logs["dead-letters"][1]):
        world.logs["dead-letters"][1][number] = replace(record, partition=1, offset=number)
    report = await world.verify()
    assert (report.unusable, dict(report.found)) == (1, {"missing": 1})


async def test_records_are_counted_by_where_their_keys_belong_and_what_was_passed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newest_records, "_PROGRESS_EVERY", 1)
    passed: list[tuple[str, int, int]] = []
    at_home = {name: home_partition(name.encode(), 2) for name in ("a", "b", "c", "d", "e")}
    for name, home in at_home.items():
        await world.index(world.path.publish(name, title=name, partition=home if name != "c" else 1 - home))
    world.logs["items"][0].append(FakeRecord(0, 90, None, b"{}"))  # no item
    empty = b"f"  # a value that is there and empty is no delete
    world.logs["items"][home_partition(empty, 2)].append(FakeRecord(home_partition(empty, 2), 91, empty, b""))
    world.acknowledged |= {TopicPartition("items", number): 92 for number in range(2)}
    world.on_progress = lambda *told: passed.append(told)
    report = await world.verify()
    assert (report.records, report.items, report.foreign, report.split, report.unusable) == (7, 6, 1, 0, 1)
    assert report.faults == 0 and report.repaired is False and report.seconds > 0
    totals = {what: total for what, _, total in passed}
    assert set(totals) == {"reading", "comparing", "reading announcements", "comparing announcements"}
    assert all(0 <= done < total for _, done, total in passed)
    items = [done for what, done, _ in passed if not what.endswith("announcements")]
    assert items == sorted(items) and len(items) == 7 + 7 and items[7] >= totals["reading"] // 2


class Groups(MemoryLog):
    """`items`, of which offsets 3 to 5 are markers of transactions."""

    def __init__(self) -> None:
        super().__init__(items=[[FakeRecord(0, n, b"k%d" % n, b"{}") for n in (0, 1, 2)], []])
        self.ends = {0: 6, 1: 0}

    async def end(self, partition: TopicPartition) -> int:
        return self.ends[partition.partition]


@pytest.mark.parametrize(
    ("committed", "filled", "overdue"),
    [
        (3, True, []),  # only markers follow, which no group acknowledges
        (2, True, [0]),  # a record that is older than deletes are kept
        (2, False, [0]),
        (None, True, [0]),
    ],
)
async def test_a_partition_is_overdue_where_a_record_and_no_mere_marker_was_left_unread_for_too_long(
    monkeypatch: pytest.MonkeyPatch, committed: int | None, filled: bool, overdue: list[int]
) -> None:
    log = Groups()
    if committed is not None:
        log.groups["index"] = {(await log.partitions("items"))[0]: committed}
    monkeypatch.setattr(verify, "LogReader", log)
    now = datetime.fromtimestamp(IN_TIME_MS / 1000, UTC) + timedelta(hours=2)
    found = await verify.find_overdue(
        BrokerConfig(), TopicsConfig(tombstone_retention_hours=1), now=now, center_is_empty=False,
        center_is_filled=filled,
    )  # fmt: skip
    assert [one.partition for one in found] == overdue
    if committed == 3:  # nor where retention has taken all that was acknowledged
        log.topics["items"][0], log.first[(await log.partitions("items"))[0]] = [], 3
    in_time = now - timedelta(hours=1)
    found = await verify.find_overdue(
        BrokerConfig(), TopicsConfig(tombstone_retention_hours=1), now=in_time, center_is_empty=False,
        center_is_filled=True,
    )  # fmt: skip
    assert [one.partition for one in found] == ([0] if committed is None else [])
