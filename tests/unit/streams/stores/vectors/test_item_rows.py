"""What a row of the center says of its item, and which of two records of an item is the newer one."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from schemas.errors import Reason, WriteRejected
from streams.stores.vectors.item_index import ItemRow, check_rows, deletion_mark, last_of_each
from streams.stores.vectors.milvus_index import collection_name, from_milvus, is_generation, to_milvus
from streams.stores.vectors.row_scan import RowSource, source_of

MOMENT = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
ROW = ItemRow(
    item_id="a",
    encoder_version="e",
    vector=np.array([0.6, 0.8], np.float32),
    content_hash="c",
    published_at=MOMENT,
    category="shoes",
    price=3.5,
    first_price=4.25,
    has_title=True,
    has_image=False,
    source_partition=2,
    source_offset=7,
    produced_at_ms=1_000,
    title="a red shoe",
)


@pytest.mark.parametrize(
    ("partition", "offset", "time_ms", "newer"),
    [
        (2, 6, 1_000, True),
        (2, 7, 1_000, False),  # the record itself
        (2, 8, 900, False),
        (2, 6, 1_001, False),  # of a topic that was created again: offsets start over
        (2, 6, 999, True),
        (1, 99, 1_000, True),  # at equal times the higher partition
        (3, 0, 1_000, False),
        (1, 99, 1_001, False),
        (3, 0, 999, True),
    ],
)
def test_offsets_decide_within_a_partition_and_times_across(
    partition: int, offset: int, time_ms: int, newer: bool
) -> None:
    assert ROW.is_newer(partition, offset, time_ms) is newer


@pytest.mark.parametrize(
    ("changes", "searchable", "deleted", "pending"),
    [
        ({}, True, False, False),
        ({"has_title": False, "has_image": True}, True, False, False),
        ({"has_title": False}, False, False, True),
        ({"has_title": False, "content_hash": ""}, False, True, False),
    ],
)
def test_a_row_is_searchable_pending_or_the_mark_of_a_deletion(
    changes: dict[str, object], searchable: bool, deleted: bool, pending: bool
) -> None:
    row = replace(ROW, **changes)  # type: ignore[arg-type]
    assert (row.is_searchable, row.is_deleted, row.is_pending) == (searchable, deleted, pending)
    assert source_of(row) == RowSource("a", 2, 7, deleted)


def test_a_mark_has_the_place_of_its_deletion_and_no_content() -> None:
    mark = deletion_mark("a", encoder_version="e", dim=2, partition=3, offset=8, time_ms=99, until=MOMENT)
    assert (mark.is_deleted, mark.published_at, mark.vector.tolist()) == (True, MOMENT, [0.0, 0.0])
    assert (mark.source_partition, mark.source_offset, mark.produced_at_ms) == (3, 8, 99)
    check_rows([mark], encoder_version="e", dim=2)


@pytest.mark.parametrize(
    ("vector", "has_title", "fits"),
    [
        ([0.6, 0.8], True, True),
        ([1.0009, 0.0], True, True),
        ([0.9991, 0.0], True, True),
        ([1.0011, 0.0], True, False),
        ([0.9989, 0.0], True, False),
        ([0.0, 0.0], False, True),  # pending
        ([0.0, 0.0, 0.0], False, False),
    ],
)
def test_a_vector_may_differ_from_unit_length_by_a_thousandth(vector: list[float], has_title: bool, fits: bool) -> None:
    row = replace(ROW, vector=np.array(vector, np.float32), has_title=has_title)
    if fits:
        check_rows([ROW, row], encoder_version="e", dim=2)
        return
    with pytest.raises(WriteRejected) as caught:
        check_rows([ROW, row], encoder_version="e", dim=2)
    assert caught.value.reason is Reason.BAD_VECTOR


def test_of_several_rows_of_an_item_the_last_counts() -> None:
    rows = [ROW, replace(ROW, item_id="b"), replace(ROW, source_offset=9)]
    assert [(row.item_id, row.source_offset) for row in last_of_each(rows)] == [("a", 9), ("b", 7)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"category": None, "price": None, "first_price": None, "title": ""},
        {"price": 0.0, "first_price": None},
        {"price": None, "first_price": 0.0},
        {"has_title": False, "has_image": True},
        {"published_at": datetime(1969, 7, 20, 1, 2, 3, 4, tzinfo=UTC)},
        {"published_at": MOMENT.astimezone(UTC) + timedelta(microseconds=1), "content_hash": "", "has_title": False},
    ],
)
def test_a_row_comes_back_from_milvus_field_by_field(changes: dict[str, object]) -> None:
    row = replace(ROW, **changes)  # type: ignore[arg-type]
    entity = to_milvus(row)
    assert entity["searchable"] is row.is_searchable
    found = from_milvus(entity)
    assert {**vars(found), "vector": None} == {**vars(row), "vector": None}
    assert found.vector.tolist() == row.vector.tolist() and found.vector.dtype == np.float32


def test_a_title_is_cut_to_what_its_field_holds() -> None:
    assert to_milvus(replace(ROW, title="x" * 501))["title"] == "x" * 500


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        (collection_name("a", "enc-1.2"), True),
        (collection_name("a__b", "enc"), True),  # its alias is looked at, too
        (collection_name("ab", "enc"), False),
        (collection_name("a", "enc") + "_filled", False),
        ("a", False),
        ("a__x", False),
        ("a__x_00000g", False),
        ("x_" + collection_name("a", "enc"), False),
    ],
)
def test_a_collection_of_an_alias_is_known_by_its_name(name: str, generation: bool) -> None:
    assert is_generation(name, "a") is generation
