"""Columns of folders: every type of Parquet is converted exactly, or refused with file, column and row."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from schemas.attributes import Attributes
from schemas.base import Identifier, is_identifier
from schemas.errors import Misconfigured
from streams.replay.timeline import Timeline
from tests.factories.offline_folders import START, read_protocol, write, write_days, write_small_set
from trainer.datasets.attributes import ItemAttributes
from trainer.datasets.exposures import behaviours_of
from trainer.datasets.folder import DataSet, open_data_set
from trainer.datasets.spans import BehaviourLog
from trainer.offline.facets import further_columns

PRICES = {
    "int64": pa.array([3, None, 0]),
    "int8": pa.array([3, None, 0], pa.int8()),
    "uint64": pa.array([3, None, 0], pa.uint64()),
    "float16": pa.array([np.float16(3), None, np.float16(0)], pa.float16()),
    "float32": pa.array([3.0, None, 0.0], pa.float32()),
    "float64 with NaN": pa.array([3.0, float("nan"), 0.0]),
    "decimal128": pa.array([Decimal("3.00"), None, Decimal("0.00")]),
    "decimal256": pa.array([Decimal("3.00"), None, Decimal("0.00")], pa.decimal256(40, 2)),
    "text": pa.array(["3.0", " ", "0"]),
    "large text": pa.array(["3", None, "0"], pa.large_string()),
    "dictionary of floats": pa.array([3.0, None, 0.0]).dictionary_encode(),
    "dictionary of texts": pa.array(["3", None, "0"]).dictionary_encode(),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_small_set(tmp_path / "set")


def with_items(folder: Path, **columns: Any) -> DataSet:
    rows = {"item_id": ["a", "b", "c"], "title": ["x"] * 3, "publish_ts": [START] * 3}
    write(folder, "items", **rows | columns)
    return open_data_set(folder, behaviours=False)


@pytest.mark.parametrize("kind", PRICES)
def test_a_price_of_any_numeric_type_is_read(folder: Path, kind: str) -> None:
    assert [one.price for one in with_items(folder, price=PRICES[kind]).records(0, 3)] == [3.0, None, 0.0]


@pytest.mark.parametrize("column", ["year", "release_year"])
@pytest.mark.parametrize("kind", PRICES)
def test_a_year_of_any_numeric_type_is_read(folder: Path, kind: str, column: str) -> None:
    assert [one.year for one in with_items(folder, **{column: PRICES[kind]}).records(0, 3)] == [3, None, None]


def test_values_are_exact(folder: Path) -> None:
    prices = [Decimal("0.10"), Decimal("129.95"), Decimal("99999999.99")]
    assert [one.price for one in with_items(folder, price=pa.array(prices)).records(0, 3)] == [0.1, 129.95, 99999999.99]
    assert sorted(one.price or 0.0 for one in with_items(folder, price=[2**53 + 1, 1, 2]).records(0, 3))[2] == 2.0**53


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("price", ["3", "12,50", "1"], "'price' holds '12,50' in row 1, which is no number"),
        ("price", ["3", "EUR 2", "1"], "'price' holds 'EUR 2' in row 1"),
        ("price", [1.0, 2.0, -0.5], r"'price' holds -0\.5 in row 2; a price is at least 0"),
        ("price", [1.0, float("inf"), 0.5], "'price' holds inf in row 1"),
        ("price", [[1], [2], [3]], "'price' must hold numbers, it is list"),
        ("price", [date(2026, 1, 1)] * 3, "'price' must hold numbers, it is date32"),
        ("year", [1999.5, 2000, 2001], r"'year' holds 1999\.5 in row 0; a year is a whole number"),
        ("year", [1999, 20_000, 2001], "'year' holds 20000.* in row 1"),
        ("year", [1999, -1, 2001], "'year' holds -1.* in row 1"),
        ("release_year", ["1999", "MMXX", None], "'release_year' holds 'MMXX' in row 1"),
    ],
)
def test_what_is_no_price_and_no_year_is_refused_with_its_row(
    folder: Path, column: str, values: list[Any], message: str
) -> None:
    with pytest.raises(Misconfigured, match=rf"items\.parquet: column {message}"):
        with_items(folder, **{column: values})


SECOND = 1_767_225_600
TIMES = {
    "seconds": pa.array([SECOND] * 3),
    "ms": pa.array([SECOND * 1_000] * 3),
    "us": pa.array([SECOND * 1_000_000 + 999_999] * 3),
    "ns": pa.array([SECOND * 1_000_000_000] * 3),
    "uint64 of ns": pa.array([SECOND * 1_000_000_000] * 3, pa.uint64()),
    "uint32": pa.array([SECOND] * 3, pa.uint32()),
    "float": pa.array([SECOND + 0.9] * 3),
    "decimal": pa.array([Decimal(SECOND)] * 3),
    "dictionary": pa.array([SECOND] * 3).dictionary_encode(),
    "date32": pa.array([date(2026, 1, 1)] * 3),
    "date64": pa.array([date(2026, 1, 1)] * 3, pa.date64()),
    **{
        f"timestamp {unit}": pa.array([SECOND * size] * 3, pa.timestamp(unit))
        for unit, size in (("s", 1), ("ms", 1_000), ("us", 1_000_000))
    },
    "timestamp ns": pa.array([datetime(2026, 1, 1, tzinfo=UTC)] * 3, pa.timestamp("ns", "UTC")),
}


@pytest.mark.parametrize("kind", TIMES)
def test_times_of_any_type_and_unit_are_read_and_can_be_sent(folder: Path, kind: str) -> None:
    data = with_items(folder, publish_ts=TIMES[kind])
    assert data.publish_ts.tolist() == [SECOND] * 3
    sent = [json.loads(one.value) for one in Timeline(data, None, 0, datetime(2026, 1, 2, tzinfo=UTC))]
    assert {one["published_at"] for one in sent} == {"2026-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([float("nan"), float(SECOND), 1.0], "holds nan in row 0"),
        ([float(SECOND), float("inf"), 1.0], "holds inf in row 1"),
        ([SECOND, 2026, SECOND], r"holds 2026 seconds since 1970, which looks like a year; .* \(row 1\)"),
        ([20_454] * 3, r".*looks like days since 1970; .* \(row 0\)"),
        ([20_260_916] * 3, r".*looks like a date; .* \(row 0\)"),
        ([SECOND * 1_000, SECOND, SECOND], r".*\(row 1\)"),
        ([-SECOND, SECOND, SECOND], r".*looks like a time since something else than 1970; .* \(row 0\)"),
        ([1e25] * 3, r"holds 1e\+25, which is no time"),
        (["2026-01-01"] * 3, "must hold times, it is string"),
        ([True] * 3, "must hold times, it is bool"),
        ([None, SECOND, SECOND], "has 1 empty values, first in row 0"),
    ],
)
def test_what_is_no_time_is_refused_with_its_row(folder: Path, values: list[Any], message: str) -> None:
    with pytest.raises(Misconfigured, match=rf"items\.parquet: column 'publish_ts' {message}"):
        with_items(folder, publish_ts=values)
    write_small_set(folder)
    write(folder, "interactions", user_id=["u"] * 3, item_id=[5, 7, 9], ts=values, label=[1] * 3)
    with pytest.raises(Misconfigured, match=rf"interactions\.parquet: column 'ts' {message}"):
        open_data_set(folder)


def test_the_first_second_that_counts_is_read(folder: Path) -> None:
    assert with_items(folder, publish_ts=[100_000_000] * 3).publish_ts.tolist() == [100_000_000] * 3
    with pytest.raises(Misconfigured, match="99999999 seconds"):
        with_items(folder, publish_ts=[100_000_000, 100_000_000, 99_999_999])


BAD_IDS = ["", " a", "a\u00a0", "a\nb", "a\x00", "\u2028", "x" * 201]


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize(
    ("file", "column"),
    [
        ("items", "item_id"),
        ("interactions", "user_id"),
        ("interactions", "event_id"),
        ("exposures", "user_id"),
        ("images", "item_id"),
    ],
)
def test_an_id_that_no_record_may_have_is_refused_with_its_row(folder: Path, file: str, column: str, bad: str) -> None:
    rows = {
        "items": {"item_id": ["5", "7", "9"], "title": ["x"] * 3, "publish_ts": [START] * 3},
        "interactions": {"user_id": ["a", "b"], "item_id": ["5"] * 2, "ts": [START] * 2, "label": [1] * 2,
                         "event_id": ["e1", "e2"]},
        "exposures": {"user_id": ["a", "b"], "item_id": ["5"] * 2, "ts": [START] * 2},
        "images": {"item_id": ["5", "7"], "image": [b"x"] * 2},
    }  # fmt: skip
    rows[file][column][1] = bad
    for name, columns in rows.items():
        write(folder, name, **columns)
    if column == "user_id" and bad == "":
        assert open_data_set(folder).without_user == 1
        return
    with pytest.raises(Misconfigured, match=rf"{file}\.parquet: column '{column}' holds .* in row 1; an id is a"):
        open_data_set(folder)


@given(st.text(max_size=5) | st.sampled_from([*BAD_IDS, "x" * 200, "\U0001f6cb" * 200, "a b"]))
def test_folders_and_records_agree_on_what_an_id_is(text: str) -> None:
    try:
        TypeAdapter(Identifier).validate_python(text)
    except ValidationError:
        assert not is_identifier(text)
    else:
        assert is_identifier(text)


def test_ids_of_any_exact_type_are_read(folder: Path) -> None:
    for ids in (
        pa.array([1, 2, 3], pa.uint64()),
        pa.array([1, 2, 3]).dictionary_encode(),
        pa.array(["1", "2", "3"], pa.large_string()),
        pa.array(["1", "2", "3"]).dictionary_encode(),
    ):
        assert with_items(folder, item_id=ids).item_ids == ["1", "2", "3"]
    with pytest.raises(Misconfigured, match="'item_id' has 2 empty values, first in row 1"):
        with_items(folder, item_id=pa.array(["a", None, None]).dictionary_encode())


@pytest.mark.parametrize("file", ["exposures", "sampled_negatives"])
def test_a_user_who_never_clicked_is_one_of_the_set(folder: Path, file: str) -> None:
    before = open_data_set(folder)
    write(folder, file, ts=[START + 30] * 2, user_id=["stranger", "b"], item_id=[5, 7])
    data = open_data_set(folder)
    assert data.user_ids == [*before.user_ids, "stranger"]
    assert data.negatives is not None and data.negatives.user.tolist() == [2, 0]
    log = behaviours_of(data, seed=0)
    shown = [json.loads(one.value) for one in Timeline(data, log, 0, datetime(2026, 1, 2, tzinfo=UTC))]
    assert [one["kind"] for one in shown if one.get("user_id") == "stranger"] == ["exposure"]
    assert len(behaviours_of(data, seed=0, events=1)) > 0


def test_a_folder_is_evaluated_although_some_users_never_clicked(tmp_path: Path) -> None:
    folder = write_days(tmp_path / "days")
    known = read_protocol(folder)[1]
    table = pa.parquet.read_table(folder / "sampled_negatives.parquet")
    strangers = table.slice(0, 5).set_column(0, "user_id", pa.array([10_000 + n for n in range(5)]))
    pa.parquet.write_table(pa.concat_tables([table, strangers]), folder / "sampled_negatives.parquet")
    assert len(read_protocol(folder)[1].rows) == len(known.rows)


LABELS = {
    "bool": pa.array([True, False, None]),
    "float with NaN": pa.array([1.0, 0.0, float("nan")]),
    "decimal": pa.array([Decimal(1), Decimal(0), None]),
    "text": pa.array(["1", "0", ""]),
    "dictionary": pa.array([1, 0, None]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_numeric_type_are_read_alike_everywhere(folder: Path, kind: str) -> None:
    rows = {"user_id": ["u"] * 3, "item_id": [5, 7, 9], "ts": [START] * 3}
    write(folder, "interactions", label=LABELS[kind], **rows)
    write(folder, "exposures", label=LABELS[kind], **rows)
    data = open_data_set(folder)
    assert data.interactions.taken.tolist() == [True, False, False]
    assert BehaviourLog.of(data, folder).liked.tolist() == [True, False, False]
    assert data.negatives is not None and len(data.negatives.ts) == 2


def test_held_out_items_may_be_marked_by_any_flag(folder: Path) -> None:
    for marks in ([True, False, None], [1, 0, None], ["1", "0", ""], [1.0, 0.0, float("nan")]):
        write(folder, "items", item_id=[5, 7, 9], title=["x"] * 3, publish_ts=[START] * 3, cold_holdout=marks)
        data = open_data_set(folder, attributes=("cold_holdout",))
        assert BehaviourLog.of(data, folder).held_out.tolist() == [False, True, False, False]
    write(folder, "items", item_id=[5, 7, 9], title=["x"] * 3, publish_ts=[START] * 3, cold_holdout=["no"] * 3)
    with pytest.raises(Misconfigured, match="'cold_holdout' holds 'no' in row 0"):
        BehaviourLog.of(open_data_set(folder, attributes=("cold_holdout",)), folder)


def test_further_columns_of_texts_and_fractions_are_found_whatever_their_type(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    names = [f"i{n}" for n in range(8)]
    colours = ["red", "blue"] * 4
    write(folder, "items", item_id=names, title=names, publish_ts=[START] * 8,
          colour=pa.array(colours).dictionary_encode(), weight=pa.array([Decimal("1.5")] * 8),
          size=pa.array([0.5] * 8).dictionary_encode(), half=pa.array([np.float16(0.5)] * 8, pa.float16()),
          stock=pa.array([7] * 8))  # fmt: skip
    facets, numbers = further_columns(open_data_set(folder, behaviours=False), folder)
    assert set(facets) == {"colour"}
    assert {name: values[1] for name, values in numbers.items()} == {"weight": 1.5, "size": 0.5, "half": 0.5}


def test_further_columns_are_attributes_where_items_share_their_values(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    names = [f"i{n}" for n in range(8)]
    write(folder, "items", item_id=names, title=names, publish_ts=[START] * 8,
          colour=pa.array(["red", "blue", None, " "] * 2).dictionary_encode(), tags=["a, b", "b", "", "a,c"] * 2,
          note=[f"words of {name}, once" for name in names], weight=pa.array([Decimal("1.5"), Decimal("2.5")] * 4),
          number=list(range(8)), stock=[7, None] * 4, pages=[100, 200, None, 100] * 2, on_sale=[True, False] * 4,
          cold_holdout=[0, 1] * 4, diag_takes=[1, 2] * 4, first_ts=[START] * 8)  # fmt: skip
    data = open_data_set(folder, behaviours=False)
    assert data.described == ItemAttributes(("colour",), ("tags",), ("weight", "pages"))
    records = data.records(0, 8)
    assert records[0].described == {"colour": "red", "tags": ["a", "b"], "weight": 1.5, "pages": 100.0}
    assert records[2].described == {"weight": 1.5}


def test_attributes_of_an_item_that_a_message_has_no_room_for_are_left_out() -> None:
    columns = ItemAttributes(("colour",), ("tags", "notes", "genres"), ("pages",))
    words = [f"{n:04}".ljust(200, "x") for n in range(32)]
    row = {"colour": "red", "tags": ",".join(words), "notes": ",".join(words[:10]), "genres": "a,b", "pages": 5}
    found = columns.of(row)
    assert found == {"colour": "red", "tags": words, "genres": ["a", "b"], "pages": 5.0}
    assert TypeAdapter(Attributes).validate_python(found) == found
