"""Comparing topic and center: which record of a key is the newest, and what is wrong with a row."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from schemas.items import ItemPublished, SourceOffset
from streams.center import compare as compare_module
from streams.center.compare import (
    CenterReport,
    Expected,
    ExpectedContent,
    Finding,
    KeyedOffsets,
    Overdue,
    Position,
    compare,
    compare_announcement,
    lost_retries,
    overdue,
    waits_in_vain,
)
from streams.stores.vectors.item_index import ItemRow, deletion_mark

NOW = datetime(2026, 5, 1, tzinfo=UTC)
ITEM = ItemPublished(item_id="a", title="a shoe", price=3.0, published_at=NOW)
EXPECTED = Expected(b"a", "a", 2, 10, 50, ExpectedContent.of(ITEM))
DELETED = replace(EXPECTED, content=None)
ROW = ItemRow("a", "e1", np.zeros(4, np.float32), ITEM.content_hash(), NOW, None, 3.0, 3.0, True, False, 2, 10, 50)
MARK = deletion_mark(
    "a", encoder_version="e1", dim=4, partition=2, offset=10, time_ms=50, until=NOW + timedelta(days=7)
)


def fault(expected: Expected, row: ItemRow | None) -> str | None:
    found = compare(expected, row, is_current=lambda version: version == "e1")
    return found.fault if found else None


@pytest.mark.parametrize(
    ("expected", "row", "what"),
    [
        (EXPECTED, ROW, None),
        (EXPECTED, None, "missing"),
        (EXPECTED, replace(ROW, source_offset=9), "stale"),
        (EXPECTED, replace(ROW, source_partition=1, source_offset=99), "stale"),
        (EXPECTED, replace(ROW, source_partition=3, source_offset=1, produced_at_ms=49), "stale"),
        (EXPECTED, replace(ROW, source_partition=3, source_offset=1), "wrong"),
        (EXPECTED, replace(ROW, source_partition=1, source_offset=1, produced_at_ms=51), "wrong"),
        (EXPECTED, replace(ROW, source_offset=11), "wrong"),
        (EXPECTED, replace(ROW, content_hash="other"), "wrong"),
        (EXPECTED, replace(ROW, encoder_version="e2"), "wrong"),
        (EXPECTED, replace(ROW, price=4.0), "wrong"),
        (EXPECTED, replace(ROW, published_at=NOW + timedelta(seconds=1)), "wrong"),
        (EXPECTED, replace(ROW, first_price=9.0, title="cut"), None),
        (EXPECTED, replace(ROW, has_title=False), None),  # waits for its picture
        (DELETED, None, None),
        (DELETED, replace(ROW, source_offset=9), "resurrected"),
        (DELETED, replace(ROW, source_partition=3), "resurrected"),
        (DELETED, replace(ROW, source_offset=11), "resurrected"),
        (DELETED, MARK, None),
        (EXPECTED, MARK, "missing"),
        (EXPECTED, replace(MARK, source_partition=1, produced_at_ms=49), "missing"),
        (EXPECTED, replace(MARK, source_partition=1, produced_at_ms=51), None),  # its deletion was compacted away
        (EXPECTED, replace(MARK, source_offset=11), "missing"),
    ],
)
def test_a_row_is_held_against_the_newest_record_of_its_item(
    expected: Expected, row: ItemRow | None, what: str | None
) -> None:
    assert fault(expected, row) == what


@pytest.mark.parametrize(
    ("announced", "row", "detail"),
    [
        ((2, 10), ROW, None),
        (None, None, None),
        (None, replace(ROW, has_title=False), None),  # waits for its picture: not to be scored yet
        ((2, 9), ROW, "announced from 2/9, yet there from 2/10"),
        ((1, 10), ROW, "announced from 1/10, yet there from 2/10"),
        ((2, 10), replace(ROW, has_title=False), "announced from 2/10, yet not there"),
        ((2, 10), MARK, "announced from 2/10, yet not there"),
        (None, MARK, None),
        (None, ROW, "announced as gone, yet there from 2/10"),
        ((2, 10), None, "announced from 2/10, yet not there"),
    ],
)
def test_a_row_is_held_against_its_last_announcement(
    announced: tuple[int, int] | None, row: ItemRow | None, detail: str | None
) -> None:
    source = SourceOffset(partition=announced[0], offset=announced[1]) if announced else None
    found = compare_announcement("a", 1, 7, source, row)
    assert (found and (found.fault, found.partition, found.offset, found.detail)) == (
        detail and ("misannounced", 1, 7, detail)
    )


def test_a_finding_says_what_differs_and_which_record_says_so() -> None:
    row = replace(ROW, content_hash="other", price=4.0, published_at=NOW + timedelta(1), encoder_version="e2")
    found = compare(EXPECTED, row, is_current=lambda version: version == "e1")
    assert found == Finding(
        "wrong", "a", 2, 10, "another content, price, time of publishing, encoder version than its record says"
    )
    stale = compare(EXPECTED, replace(ROW, source_offset=9), is_current=lambda version: True)
    assert stale == Finding("stale", "a", 2, 10, "still from 2/9")


def test_attributes_that_differ_are_found_and_what_the_settings_leave_out_is_none() -> None:
    item = ITEM.model_copy(update={"attributes": {"colour": "red", "rating": 4.5}, "published_at_is": "inferred"})
    expected = replace(EXPECTED, content=ExpectedContent.of(item, ("rating",)))
    content_hash = item.without({"rating"}).content_hash()
    row = replace(ROW, attributes={"colour": "red"}, published_at_is="inferred", content_hash=content_hash)
    assert fault(expected, row) is None
    for other in ({"attributes": dict(item.attributes)}, {"attributes": {}}, {"published_at_is": "known"}):
        found = compare(expected, replace(row, **other), is_current=lambda version: True)  # type: ignore[arg-type]
        assert found is not None and found.detail == "another attributes than its record says"
        assert fault(expected, replace(row, keeps_facts=False, **other)) is None  # type: ignore[arg-type]


def test_what_an_item_and_its_row_have_in_common_is_taken_from_the_item() -> None:
    for fields, has_image in (({}, False), ({"image": b"\xff\xd8"}, True), ({"image_url": "https://x.test/1"}, True)):
        content = ExpectedContent.of(ITEM.model_copy(update=fields | {"category": ""}))
        assert (content.has_image, content.category, content.price, content.published_at) == (
            has_image, None, 3.0, NOW,
        )  # fmt: skip
    assert ExpectedContent.of(ITEM.model_copy(update={"category": "shoes"})).category == "shoes"


def test_records_of_one_time_in_two_partitions_are_ordered_by_partition() -> None:
    offsets = KeyedOffsets()
    for partition in (2, 5, 3):
        offsets.add(b"a", 7, 50, deleted=partition == 3)
        offsets.end_partition(partition)
    found = [offsets.time_if_newest(b"a", partition, 7) for partition in (2, 3, 5)]
    assert (found, offsets.count_live(), offsets.count_split()) == ([None, None, 50], 1, 1)


PARTITIONS = 3


@pytest.mark.parametrize("settle_every", [1_000_000, 700])
def test_the_newest_record_of_each_key_is_found_as_a_dictionary_would(
    monkeypatch: pytest.MonkeyPatch, settle_every: int
) -> None:
    monkeypatch.setattr(compare_module, "_SETTLE_EVERY", settle_every)
    draw = random.Random(5)
    by_key: dict[bytes, dict[int, tuple[int, int, bool]]] = {}
    offsets = KeyedOffsets()
    for partition in range(PARTITIONS):
        for offset in range(3_000):
            key, deleted = f"key {draw.randrange(900)}".encode(), draw.random() < 0.3
            time_ms = offset + draw.randrange(-500, 500)
            its = by_key.setdefault(key, {})
            newest_so_far = max(time_ms, its.get(partition, (time_ms,))[0])
            its[partition] = (newest_so_far, offset, deleted)
            offsets.add(key, offset, time_ms, deleted=deleted)
        offsets.end_partition(partition)
    live = split = 0
    for key, its in by_key.items():
        time_ms, partition, offset, deleted = max((at[0], where, at[1], at[2]) for where, at in its.items())
        assert offsets.time_if_newest(key, partition, offset) == time_ms
        assert offsets.time_if_newest(key, partition, offset - 1) is None
        assert offsets.time_if_newest(key, partition + 1, offset) is None
        assert offsets.has_key(key)
        live, split = live + (not deleted), split + (len(its) > 1)
    assert (offsets.count_live(), offsets.count_split()) == (live, split)
    assert not offsets.has_key(b"never")


def test_nothing_is_known_of_an_empty_topic() -> None:
    offsets = KeyedOffsets()
    offsets.end_partition(0)
    assert (offsets.count_live(), offsets.has_key(b"a"), offsets.time_if_newest(b"a", 0, 0)) == (0, False, None)


@pytest.mark.parametrize(
    ("row", "awaited", "what"),
    [
        (ROW, {(2, 10)}, None),
        (ROW, {(2, 9), (1, 10)}, "wrong"),
        (replace(ROW, has_title=False), {(2, 10)}, None),
        (replace(ROW, has_title=False), set(), "missing"),
        (replace(ROW, has_image=True), set(), None),
    ],
)
def test_a_row_without_its_picture_is_right_only_as_long_as_a_retry_is_left(
    row: ItemRow, awaited: set[tuple[int, int]], what: str | None
) -> None:
    item = ITEM.model_copy(update={"image_url": "https://pictures.test/1.png"})
    found = waits_in_vain(replace(EXPECTED, content=ExpectedContent.of(item)), row, awaited)
    assert (found and found.fault) == what
    assert waits_in_vain(EXPECTED, row, set()) is None  # an item that has no picture


@pytest.mark.parametrize(
    ("committed", "end", "recent", "is_overdue"),
    [
        (10, 10, None, False),  # everything was read
        (10, 20, 5, False),  # something younger than the retention was read
        (10, 20, 10, True),  # all that was read is older than the retention
        (10, 20, None, True),
        (None, 20, 5, True),  # the group was forgotten
        (None, 0, None, False),
    ],
)
def test_deletes_may_have_been_forgotten_only_where_a_worker_was_away_for_longer_than_they_are_kept(
    committed: int | None, end: int, recent: int | None, is_overdue: bool
) -> None:
    positions = [Position(3, committed, 0, end, recent)]
    found = overdue(positions, center_is_empty=False, center_is_filled=True)
    assert found == ([Overdue(3, committed, end)] if is_overdue else [])
    assert overdue(positions, center_is_empty=True, center_is_filled=True) == []


@pytest.mark.parametrize("center_is_empty", [True, False])
@pytest.mark.parametrize(
    ("committed", "start", "is_overdue"),
    [
        (10, 0, True),  # acknowledged, and this center may not hold it
        (10, 10, False),  # nothing of that is left to be held
        (0, 0, False),
    ],
)
def test_a_center_that_never_was_complete_may_lack_whatever_was_acknowledged(
    committed: int, start: int, is_overdue: bool, center_is_empty: bool
) -> None:
    found = overdue([Position(3, committed, start, 20, 5)], center_is_empty=center_is_empty, center_is_filled=False)
    assert found == ([Overdue(3, committed, 20)] if is_overdue else [])


def test_a_new_center_of_a_new_group_has_nothing_to_be_compared_with() -> None:
    assert overdue([Position(3, None, 0, 20, 5)], center_is_empty=True, center_is_filled=False) == []


def test_retries_are_lost_only_where_retention_passed_the_position_of_a_worker() -> None:
    starts = {0: 5, 1: 5, 2: 5, 3: 0}
    assert lost_retries(starts, {0: 4, 1: 5, 3: 9}) == {0: 1}


def test_a_report_counts_everything_and_names_a_few() -> None:
    report = CenterReport()
    for n in range(300):
        report.add(Finding("stale", f"i{n}", 0, n, ""))
    assert (report.faults, report.found["stale"], len(report.examples)) == (300, 300, 100)
