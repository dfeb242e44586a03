"""Reading data-set folders."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encoders.base import ItemContent
from schemas.behaviours import BehaviourKind
from schemas.errors import Misconfigured
from tests.factories.offline_folders import DAY, START, real_set, write, write_small_set
from trainer.datasets.folder import ItemRecord, NoPictures, StoredPictures, open_data_set, sample_users
from trainer.datasets.images import StoredImages


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_small_set(tmp_path / "set")


def test_items_come_in_publish_order_with_ids_as_text(folder: Path) -> None:
    data = open_data_set(folder)
    assert data.item_ids == ["5", "7", "9"]
    assert data.publish_ts.tolist() == [START + 10, START + 20, START + DAY + 50]
    assert [(r.item_id, r.title, r.text, r.category, r.price) for r in data.records(1, 3)] == [
        ("7", "seven", "", None, None),
        ("9", "", "", None, None),
    ]


def test_interactions_keep_file_order_and_point_at_sorted_items(folder: Path) -> None:
    rows = open_data_set(folder)
    assert [rows.user_ids[u] for u in rows.interactions.user] == ["b", "a", "b"]
    assert [rows.item_ids[i] for i in rows.interactions.item] == ["5", "7", "9"]
    assert rows.interactions.taken.tolist() == [True, False, True]
    assert rows.interactions.kind is BehaviourKind.CLICK


def test_a_rating_is_a_take_whatever_its_value_and_a_quantity_is_a_purchase(folder: Path) -> None:
    write(
        folder,
        "interactions",
        user_id=[1, 1],
        item_id=[5, 7],
        ts=[START + 10, START + 20],
        label=[0, 1],
        rating=[2, 9],
        qty=[1, 2],
    )
    rows = open_data_set(folder).interactions
    assert rows.taken.tolist() == [True, True]
    assert rows.kind is BehaviourKind.PURCHASE


def test_catalogue_is_what_the_first_day_published(folder: Path) -> None:
    assert open_data_set(folder).catalogue.tolist() == [True, True, False]


@pytest.mark.parametrize(("file", "column"), [("items", "publish_ts"), ("items", "title"), ("interactions", "label")])
def test_a_missing_column_is_named_with_its_file(folder: Path, file: str, column: str) -> None:
    path = folder / f"{file}.parquet"
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    with pytest.raises(Misconfigured, match=rf"{file}\.parquet: column '{column}' is missing"):
        open_data_set(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "interactions.parquet").unlink()
    with pytest.raises(Misconfigured, match=r"interactions\.parquet does not exist"):
        open_data_set(folder)
    assert len(open_data_set(folder, behaviours=False).item_ids) == 3


def test_a_file_that_is_not_parquet_is_named(folder: Path) -> None:
    (folder / "items.parquet").write_bytes(b"hello")
    with pytest.raises(Misconfigured, match=r"items\.parquet is not a readable parquet file"):
        open_data_set(folder)
    (folder / "items.parquet").unlink()
    (folder / "items.parquet").mkdir()
    with pytest.raises(Misconfigured, match=r"items\.parquet is not a readable parquet file"):
        open_data_set(folder)


@pytest.mark.parametrize(
    ("file", "columns", "message"),
    [
        (
            "items",
            {"item_id": [1.5], "title": ["x"], "publish_ts": [START]},
            "'item_id' must hold whole numbers or text",
        ),
        ("items", {"item_id": [1], "title": ["x"], "publish_ts": ["now"]}, "'publish_ts' must hold times"),
        (
            "items",
            {"item_id": [1, None], "title": ["x", "y"], "publish_ts": [START] * 2},
            "'item_id' has 1 empty values",
        ),
        ("items", {"item_id": [1, 1], "title": ["x", "y"], "publish_ts": [START] * 2}, "same item more than once"),
        ("interactions", {"user_id": [1], "item_id": [4], "ts": [START], "label": [1]}, "'item_id' names .* first '4'"),
        (
            "interactions",
            {"user_id": [1], "item_id": [5], "ts": [START], "label": ["yes"]},
            "'label' holds 'yes' in row 0",
        ),
    ],
)
def test_wrong_values_are_named(folder: Path, file: str, columns: dict[str, Any], message: str) -> None:
    write(folder, file, **columns)
    with pytest.raises(Misconfigured, match=rf"{file}\.parquet: column {message}|{message}"):
        open_data_set(folder)


def test_arrow_timestamps_are_read_as_seconds(folder: Path) -> None:
    moments = [datetime(2024, 5, 1, 12, 0, 1, 999_000, tzinfo=UTC)]
    write(folder, "items", item_id=["a"], title=["x"], publish_ts=pa.array(moments, pa.timestamp("ms", "UTC")))
    assert open_data_set(folder, behaviours=False).publish_ts.tolist() == [1_714_564_801]
    nanoseconds = [1_714_564_801_999_999_999]
    for publish_ts in (nanoseconds, pa.array(nanoseconds, pa.timestamp("ns"))):
        write(folder, "items", item_id=["a"], title=["x"], publish_ts=publish_ts)
        assert open_data_set(folder, behaviours=False).publish_ts.tolist() == [1_714_564_801], "not over yet"


def test_midnights_only_mean_day_resolution(folder: Path) -> None:
    assert not open_data_set(folder).day_resolution
    write(folder, "interactions", user_id=[1, 1], item_id=[5, 7], ts=[START + DAY, START + 2 * DAY], label=[1, 1])
    assert open_data_set(folder).day_resolution
    assert not open_data_set(folder, behaviours=False).day_resolution


def test_one_type_of_negatives_is_used(folder: Path) -> None:
    kinds = pa.array(["pop", "uniform", "pop"]).dictionary_encode()
    rows = {
        "ts": [START + 10, START + 10, START + 20],
        "user_id": ["b", "b", "a"],
        "item_id": [7, 9, 5],
        "label": [0, 0, 0],
    }
    write(folder, "sampled_negatives", neg_type=kinds, **rows)
    negatives, uniform = open_data_set(folder).negatives, open_data_set(folder, neg_type="uniform").negatives
    assert negatives is not None and negatives.simulated and negatives.ts.tolist() == [START + 10, START + 20]
    assert uniform is not None and uniform.ts.tolist() == [START + 10]
    with pytest.raises(Misconfigured, match="never holds 'hard'"):
        open_data_set(folder, neg_type="hard")


def test_observed_exposures_are_preferred_and_their_takes_left_out(folder: Path) -> None:
    write(folder, "sampled_negatives", ts=[START + 10], user_id=["b"], item_id=[7], neg_type=["pop"])
    write(folder, "exposures", ts=[START + 10, START + 20], user_id=["b", "a"], item_id=[9, 7], label=[0, 1])
    negatives = open_data_set(folder).negatives
    assert negatives is not None and not negatives.simulated and negatives.item.tolist() == [2]
    write(folder, "exposures", ts=[START] * 3, user_id=[*"bab"], item_id=[9, 7, 5], label=[None, -1.0, 0.0])
    negatives = open_data_set(folder).negatives
    assert negatives is not None and negatives.item.tolist() == [2, 0], "a take of a rating below zero is a take"


def test_pictures_are_found_over_row_groups_and_the_cache_stays_small(folder: Path) -> None:
    write(folder, "images", row_group_size=1, item_id=[9, 5], image=[b"nine" * 100, b"five" * 100], w=[1, 1])
    data = open_data_set(folder)
    assert data.pictures.of(data.records(0, 3)) == [b"five" * 100, None, b"nine" * 100]
    bounded = StoredImages(folder / "images.parquet", key="item_id", max_cached_bytes=450)
    for _ in range(3):
        assert bounded.of(["5", "7", "9"]) == [b"five" * 100, None, b"nine" * 100]
        assert len(bounded._cached) == 1


def test_a_set_without_pictures_has_none(folder: Path) -> None:
    data = open_data_set(folder)
    assert isinstance(data.pictures, NoPictures)
    assert data.pictures.of(data.records(0, 2)) == [None, None]


def test_a_picture_column_of_text_is_refused(folder: Path) -> None:
    write(folder, "images", item_id=[5], image=["a path"])
    with pytest.raises(Misconfigured, match=r"images\.parquet: column 'image' must hold encoded bytes"):
        open_data_set(folder)


def test_sampled_users_are_whole_and_below_the_cap(folder: Path) -> None:
    rng = np.random.default_rng(0)
    users = rng.integers(0, 60, 500)
    write(
        folder,
        "interactions",
        user_id=users,
        item_id=[5] * 500,
        ts=START + np.arange(500),
        label=rng.integers(0, 2, 500),
    )
    data = open_data_set(folder)
    takes = np.bincount(data.interactions.user[data.interactions.taken], minlength=60)
    for cap in (1, 40, 120, 10_000):
        kept = sample_users(data, cap, seed=3)
        assert kept.tolist() == sample_users(data, cap, seed=3).tolist()
        assert takes[kept].sum() <= cap or kept.sum() == 1
        assert takes[kept].sum() > min(cap, takes.sum()) - 20
    assert sample_users(data, 120, seed=3).tolist() != sample_users(data, 120, seed=4).tolist()
    write(folder, "interactions", user_id=range(9), item_id=[5] * 9, ts=[START] * 9, label=[1] * 9)
    assert sample_users(open_data_set(folder), 4, seed=0).sum() == 4


def test_an_encoder_sees_an_item_without_its_outcomes() -> None:
    record = ItemRecord(
        "a", "title", "text", "category", 2.0, START, {"colour": "red"}, year=1999,
        described={"colour": "red", "votes": 12.0},
    )  # fmt: skip
    expected = ItemContent(
        item_id="a", title="title", text="text", category="category", price=2.0, image=b"photo", year=1999,
        attributes={"colour": "red"},
    )  # fmt: skip
    assert record.content(b"photo", {"votes"}) == expected


def test_a_record_holds_what_fits_a_message_and_nothing_for_what_is_empty(folder: Path) -> None:
    wide = {
        "title": ["t" * 2_001, "x", None], "text": ["d" * 20_001, "", None], "category": ["c" * 201, "", None],
        "year": [0, 9999, None], "release_year": [2001, 2002, 2003], "colour": ["red", "", None],
    }  # fmt: skip
    write(folder, "items", item_id=["a", "b", "c"], publish_ts=[START, START + 1, START + 2], **wide)
    data = open_data_set(folder, behaviours=False, attributes=("colour", "absent"))
    first, second, third = data.records(0, 3)
    assert (first.title, first.text, first.category) == ("t" * 2_000, "d" * 20_000, "c" * 200)
    assert (second.text, second.category, third.title, third.text, third.category) == ("", None, "", "", None)
    assert [one.year for one in (first, second, third)] == [2001, 9999, 2003]
    assert first.attributes == {"colour": "red", "absent": None}
    twice = open_data_set(folder, behaviours=False, attributes=("category", "colour", "colour")).records(0, 1)[0]
    assert twice.attributes == {"category": "c" * 201, "colour": "red"} and twice.category == "c" * 200
    assert [one.item_id for one in data.records(1, 9)] == ["b", "c"] and data.records(2, 1) == data.records(3, 4) == []


def test_items_of_one_second_come_in_the_order_of_their_ids(folder: Path) -> None:
    write(folder, "items", item_id=["b", "a", "c"], title=["x"] * 3, publish_ts=[START + 5, START + 5, START])
    assert open_data_set(folder, behaviours=False).item_ids == ["c", "a", "b"]


def test_a_set_begins_with_its_first_item_or_its_first_interaction(folder: Path) -> None:
    assert open_data_set(folder).start_ts == START + 10
    write(folder, "interactions", user_id=["b"], item_id=[5], ts=[START + 3], label=[1])
    data = open_data_set(folder)
    assert data.start_ts == START + 3
    write(folder, "items", item_id=[5, 7], title=["x"] * 2, publish_ts=[START + 3 + DAY - 1, START + 3 + DAY])
    assert open_data_set(folder).catalogue.tolist() == [True, False]


def test_other_pictures_take_the_place_of_those_in_the_folder_and_an_empty_one_is_none(folder: Path) -> None:
    write(folder, "images", item_id=[9, 5], image=[b"", b"five"])
    data = open_data_set(folder)
    assert data.pictures.of(data.records(0, 3)) == [b"five", None, None]
    assert data.pictures.of(data.records(0, 3)[::-1]) == [None, None, b"five"]
    assert open_data_set(folder, pictures=NoPictures()).pictures.of(data.records(0, 1)) == [None]


def test_ids_of_events_are_the_platforms_own_and_each_is_there_once(folder: Path) -> None:
    rows = {"user_id": ["b", "a"], "item_id": [5, 7], "ts": [START, START], "label": [1, 0]}
    write(folder, "interactions", event_id=["e1", "e2"], **rows)
    found = open_data_set(folder).interactions.event_id
    assert found is not None and found.tolist() == ["e1", "e2"]
    write(folder, "interactions", event_id=["e1", "e1"], **rows)
    with pytest.raises(Misconfigured, match="'event_id' holds the same id more than once"):
        open_data_set(folder)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "items", "users", "rows", "pictures", "by_day"),
    [
        ("hm_week_fashion", 9_859, 68_984, 200_630, 9_858, True),
        ("movietweetings100k_posters", 10_506, 16_554, 100_000, 8_049, False),
    ],
)
def test_real_sets_are_read_whole(name: str, items: int, users: int, rows: int, pictures: int, by_day: bool) -> None:
    data = real_set(name)
    assert (len(data.item_ids), len(data.user_ids), len(data.interactions)) == (items, users, rows)
    assert data.interactions.taken.all()
    assert data.day_resolution is by_day
    assert isinstance(data.pictures, StoredPictures)
    assert len(data.pictures) == pictures
    assert all(image is None or image[:2] == b"\xff\xd8" for image in data.pictures.of(data.records(0, 300)))
