"""Records of one item in two partitions: the order by timestamp, deletions included, whoever comes first."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest

from schemas.errors import BrokerUnavailable
from streams.broker.partitioning import home_partition
from streams.broker.records import SourceRecord
from streams.indexing.index_batch import index_batch
from streams.indexing.item_changes import newest_changes, read_change
from streams.indexing.take_over import RecentWrite, recheck
from streams.stores.vectors.item_index import FOR_EVER, ItemRow, deletion_mark
from tests.factories.item_path import NOW, PRODUCED_MS, ItemPath, allowed, picture, retry_record


def newest_of(records: Sequence[SourceRecord]) -> SourceRecord:
    """The newest record by the documented order, in plain loops."""

    def time_of(record: SourceRecord) -> int:
        return max(
            one.timestamp_ms for one in records if one.partition == record.partition and one.offset <= record.offset
        )

    return max(records, key=lambda record: (time_of(record), record.partition, record.offset))


async def assert_holds(path: ItemPath, records: Sequence[SourceRecord], why: object) -> None:
    wanted = newest_of(records)
    row = path.rows["a"]
    assert (row.source_partition, row.source_offset) == (wanted.partition, wanted.offset), why
    assert row.is_deleted == (wanted.value is None), why


async def test_every_order_of_arrival_ends_in_the_same_row() -> None:
    draw = random.Random(7)
    for seed in range(60):
        source = ItemPath()
        records: list[list[SourceRecord]] = []
        for partition in range(2):
            records.append(
                [
                    source.record(
                        "a",
                        None
                        if draw.random() < 0.4
                        else {"item_id": "a", "title": f"{seed}", "published_at": NOW.isoformat()},
                        partition=partition,
                        ms=draw.randrange(6),  # equal ones, and steps back
                    )
                    for _ in range(draw.randrange(1, 4))
                ]
            )
        path, waiting = ItemPath(), [list(its) for its in records]
        while any(waiting):  # batches that mix the partitions, each in its order
            batch = []
            for _ in range(draw.randrange(1, 4)):
                if its := [one for one in waiting if one]:
                    batch.append(draw.choice(its).pop(0))
            await path.index_all(*batch)
        await assert_holds(path, [*records[0], *records[1]], seed)
        told = path.outbox.announced[-1]
        assert isinstance(told, str) == path.rows["a"].is_deleted, seed


async def test_what_was_deleted_in_another_partition_stays_deleted_whoever_comes_first() -> None:
    for order in itertools.permutations(range(2)):
        path = ItemPath()
        records = [path.publish("a", title="x", ms=1), path.delete("a", partition=1, ms=2)]
        for place in order:
            await path.index_all(records[place])
        assert path.on_sale == {}
        assert path.rows["a"].published_at == FOR_EVER  # the topic holds the publish for good, the deletion not


async def test_a_mark_is_forgotten_when_the_topic_forgets_the_deletion_but_not_beside_an_older_publish() -> None:
    path = ItemPath()
    await path.index_all(path.publish("a", title="x"), path.publish("b", title="x"))
    await path.index_all(path.delete("a"), path.delete("b", partition=1, ms=99))
    await path.index.forget_deleted(NOW + path.context.deletions_kept)
    assert set(path.rows) == {"a", "b"}
    await path.index.forget_deleted(NOW + path.context.deletions_kept + timedelta(seconds=1))
    assert set(path.rows) == {"b"}


Marked = Callable[[ItemPath], Sequence[Sequence[SourceRecord]]]
MARKS: dict[str, tuple[Marked, bool]] = {
    "a publish in another partition, in one batch": (
        lambda path: [[path.publish("a", title="x", ms=1), path.delete("a", partition=1, ms=2)]],
        True,
    ),
    "deleted once more after that": (
        lambda path: [
            [path.publish("a", title="x", ms=1)],
            [path.delete("a", partition=1, ms=2)],
            [path.delete("a", partition=1, ms=3)],
        ],
        True,
    ),
    "a publish in the same partition": (
        lambda path: [[path.publish("a", title="x", ms=1)], [path.delete("a", ms=2)]],
        False,
    ),
    "a publish in the same partition, in one batch": (
        lambda path: [[path.publish("a", title="x", ms=1), path.delete("a", ms=2)]],
        False,
    ),
    "its own publish comes again": (
        lambda path: [[path.publish("a", title="x", ms=1, offset=0)], [path.delete("a", ms=2)],
                      [path.publish("a", title="x", ms=1, offset=0)]],
        False,
    ),
    "deleted in both partitions, the older one last": (
        lambda path: [[path.delete("a", ms=2)], [path.delete("a", partition=1, ms=1)]],
        False,
    ),
    "deleted in both partitions, in one batch": (
        lambda path: [[path.delete("a", ms=2), path.delete("a", partition=1, ms=1)]],
        False,
    ),
    "deleted in both partitions, the newer one last": (
        lambda path: [[path.delete("a", ms=1)], [path.delete("a", partition=1, ms=2)]],
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("batches", "for_ever"), MARKS.values(), ids=MARKS)
async def test_a_mark_stays_for_good_only_beside_a_publish_that_compaction_leaves(
    path: ItemPath, batches: Marked, for_ever: bool
) -> None:
    for batch in batches(path):
        await path.index_all(*batch)
    row = path.rows["a"]
    assert row.is_deleted
    assert row.published_at == (FOR_EVER if for_ever else path.now + path.context.deletions_kept)


async def test_what_was_written_is_told_with_the_time_of_its_row(path: ItemPath) -> None:
    await path.index_all(path.publish("a", title="one", ms=100), path.publish("b", title="one", ms=100))
    report = await path.index_all(
        path.publish("a", title="two", ms=50), path.delete("b", ms=40), path.publish("a", title="old", offset=0, ms=100)
    )
    assert [(one.key, one.offset, one.timestamp_ms - PRODUCED_MS) for one in report.written] == [
        (b"b", 3, 100), (b"a", 2, 100),
    ]  # fmt: skip


async def test_a_publish_after_the_deletion_brings_the_item_back_from_either_partition() -> None:
    for partition in range(2):
        path = ItemPath()
        await path.index_all(path.publish("a", title="x", ms=1), path.delete("a", partition=1, ms=2))
        await path.index_all(path.publish("a", title="again", partition=partition, price=3.0, ms=3))
        assert (path.rows["a"].title, path.rows["a"].first_price) == ("again", 3.0)


async def test_a_clock_that_steps_back_within_a_partition_keeps_that_partitions_order() -> None:
    path = ItemPath()
    first, second = path.publish("a", title="one", ms=100), path.publish("a", title="two", ms=50)
    await path.index_all(first)
    await path.index_all(second)
    assert (path.rows["a"].title, path.rows["a"].produced_at_ms) == ("two", PRODUCED_MS + 100)
    await path.index_all(path.publish("a", title="between", partition=1, ms=70))
    assert path.rows["a"].title == "two"
    await path.index_all(first)  # delivered again
    assert path.rows["a"].title == "two"


async def test_a_row_of_an_earlier_build_with_the_time_of_its_record_alone_is_ordered_too() -> None:
    path = ItemPath()
    await path.index_all(path.publish("a", title="old", offset=5, ms=10))
    await path.index_all(path.publish("a", title="older", partition=1, offset=80, ms=9))
    assert path.rows["a"].title == "old"
    await path.index_all(path.publish("a", title="newer", partition=1, offset=81, ms=11))
    assert path.rows["a"].title == "newer"


def test_the_price_at_first_publish_is_of_the_life_that_goes_on(path: ItemPath) -> None:
    records = [
        path.publish("a", title="x", price=1.0, ms=1),
        path.delete("a", partition=1, ms=2),
        path.publish("a", title="x", price=3.0, ms=3),
    ]
    changes = [read_change(one, max_bytes=9_999, max_ahead=timedelta(hours=1), field_map={}) for one in records]
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2)):
        (newest,) = newest_changes([changes[place] for place in order], {})
        assert (newest.record, newest.first_price(None)) == (records[2], 3.0)


async def test_at_equal_times_the_record_of_the_higher_partition_is_newer_whatever_its_offset() -> None:
    for order, together in itertools.product(itertools.permutations(range(2)), (True, False)):
        path = ItemPath()
        records = [
            path.publish("a", title="higher", partition=1, offset=0, ms=5),
            path.publish("a", title="lower", partition=0, offset=9, ms=5),
        ]
        batch = [records[place] for place in order]
        for part in [batch] if together else [[one] for one in batch]:
            await path.index_all(*part)
        assert path.rows["a"].title == "higher", (order, together)


async def test_a_deletion_from_before_the_row_does_not_end_the_life_that_goes_on(path: ItemPath) -> None:
    await path.index_all(path.publish("a", title="x", price=10.0, ms=3))
    late = path.delete("a", partition=1, ms=2)
    await path.index_all(late, path.publish("a", title="x", price=8.0, ms=4))
    assert (path.rows["a"].price, path.rows["a"].first_price) == (8.0, 10.0)


# ---- two owners at the same time -----------------------------------------------------------------------------------


class TwoOwners:
    """Two workers over one center: the other writes before the first one's write, its announcement, or after both."""

    def __init__(self) -> None:
        self.one = ItemPath()
        self.other = ItemPath(index=self.one.index, outbox=self.one.outbox)

    async def interleave(self, mine: SourceRecord, theirs: SourceRecord, *, step: int) -> None:
        asked = 0

        async def guard() -> None:
            nonlocal asked
            asked += 1
            if asked == step:
                await self.write(self.other, theirs)

        report = await index_batch(self.one.context, [mine], guard)
        self.mine = list(report.written)

    async def write(self, path: ItemPath, record: SourceRecord) -> None:
        self.theirs = list((await index_batch(path.context, [record], allowed)).written)

    async def recheck(self, path: ItemPath, written: Sequence[SourceRecord]) -> None:
        await recheck(path.context, [RecentWrite(record) for record in written], allowed)


Make = Callable[[ItemPath], tuple[SourceRecord, SourceRecord]]
CASES: dict[str, Make] = {
    "an old publish over a deletion": lambda path: (
        path.publish("a", title="old", ms=1),
        path.delete("a", partition=1, ms=2),
    ),
    "an old deletion over a publish": lambda path: (
        path.delete("a", ms=1),
        path.publish("a", title="new", partition=1, ms=2),
    ),
    "an old publish over a new one": lambda path: (
        path.publish("a", title="old", ms=1),
        path.publish("a", title="new", partition=1, ms=2),
    ),
    "a new one over an old one": lambda path: (
        path.publish("a", title="new", ms=3),
        path.publish("a", title="old", partition=1, ms=2),
    ),
}


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
async def test_what_one_owner_overwrites_of_the_other_is_put_right_when_both_look_again(make: Make, step: int) -> None:
    both = TwoOwners()
    mine, theirs = make(both.one)
    await both.interleave(mine, theirs, step=step)
    await both.recheck(both.one, both.mine)
    await both.recheck(both.other, both.theirs)
    await assert_holds(both.one, [mine, theirs], make)
    told = both.one.outbox.announced[-1]
    newest = newest_of([mine, theirs])
    if newest.value is None:
        assert told == "a"
    else:
        assert isinstance(told, ItemRow)
        assert (told.source_offset, told.source_partition) == (newest.offset, newest.partition)


@pytest.mark.parametrize("sessions", [0.6, 0.61, -0.01])
@pytest.mark.parametrize("make", list(CASES.values())[:3], ids=list(CASES)[:3])
async def test_a_write_that_was_held_for_long_looks_again_before_it_overwrites(make: Make, sessions: float) -> None:
    both = TwoOwners()
    mine, theirs = make(both.one)
    silent = True

    async def guard() -> None:
        nonlocal silent
        if silent:
            silent = False
            await both.write(both.other, theirs)
            both.one.now += timedelta(seconds=sessions * both.one.config.session_timeout_seconds)
            raise BrokerUnavailable("Kafka", "no heartbeat")

    report = await index_batch(both.one.context, [mine], guard)
    await assert_holds(both.one, [mine, theirs], make)
    told = both.one.outbox.announced[-1]
    assert (told if isinstance(told, str) else told.title) == ("a" if theirs.value is None else "new")
    assert list(report.written) == []


async def test_a_late_picture_of_a_record_at_the_same_offset_of_another_partition_is_not_written() -> None:
    url = "https://pictures.test/1.png"
    path = ItemPath()
    await path.index_all(path.publish("a", title="old", image_url=url, ms=1))
    retry = path.outbox.retries.pop()
    await path.index_all(path.publish("a", title="new", partition=1, ms=2))
    assert path.rows["a"].source_offset == retry.source.offset
    path.web[url] = picture()
    assert ((await path.retry(retry)).outcome, path.rows["a"].has_image) == ("superseded", False)


async def test_a_late_picture_does_not_bring_back_what_was_deleted_in_another_partition() -> None:
    url = "https://pictures.test/1.png"
    path = ItemPath()
    await path.index_all(path.publish("a", image_url=url, ms=1))
    retry = path.outbox.retries.pop()
    await path.index_all(path.delete("a", partition=1, ms=2))
    report = await path.retry(retry)
    assert (report.outcome, path.on_sale) == ("superseded", {})
    assert retry_record(retry).partition == 0


def test_two_hashes_put_most_keys_into_different_partitions_and_ours_is_that_of_java() -> None:
    # murmur2 of Java clients: 21 -> partition 1 of 3, and so on; from Kafka's own UtilsTest
    assert home_partition(b"21", 2**31) == -973932308 & 0x7FFFFFFF
    assert home_partition(b"foobar", 2**31) == -790332482 & 0x7FFFFFFF


def test_a_mark_is_no_row_to_be_searched_or_waited_for() -> None:
    mark = deletion_mark("a", encoder_version="e", dim=2, partition=1, offset=2, time_ms=3, until=NOW)
    assert (mark.is_deleted, mark.is_pending, mark.is_searchable) == (True, False, False)
