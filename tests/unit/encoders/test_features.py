"""Features of items as columns, and the cache of what the towers made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from encoders.base import ItemContent, Prepared
from encoders.digests import files_sha256
from encoders.feature_cache import FeatureCache, content_key
from encoders.features import ItemFeatures, attribute_columns, category_hashes
from encoders.similarity import unit_or_zero_rows
from schemas.attributes import MOST_WORDS
from schemas.errors import EncodingFailed, Reason
from tests.factories.csft import make_features


def same(one: ItemFeatures, other: ItemFeatures) -> None:
    for each in fields(ItemFeatures):
        np.testing.assert_array_equal(getattr(one, each.name), getattr(other, each.name), err_msg=each.name)


def test_rows_of_a_table_are_selected_and_joined_in_every_column() -> None:
    whole = make_features(12)
    same(ItemFeatures.concatenate([whole.select(np.arange(5)), whole.select(np.arange(5, 12))]), whole)
    back = whole.select(np.array([7, 3]))
    assert len(back) == 2 and back.year_N.tolist() == [whole.year_N[7], whole.year_N[3]]


def test_attributes_that_are_not_known_are_told_apart_from_nought() -> None:
    columns = attribute_columns(["a", None, "B "], [0.0, None, 2001], [None, 0.0, 5.5], [(), (7,), (1, 2)])
    assert columns["category_N2"].tolist() == [list(category_hashes(name)) for name in ("a", None, "b")]
    np.testing.assert_array_equal(columns["year_N"], [0, np.nan, 2001])
    np.testing.assert_array_equal(columns["price_N"], [np.nan, 0, 5.5])
    assert columns["words_NA"].shape == (3, MOST_WORDS)
    assert [[word for word in row if word >= 0] for row in columns["words_NA"].tolist()] == [[], [7], [1, 2]]
    empty = attribute_columns([], [], [], [])
    assert empty["category_N2"].shape == (0, 2) and empty["words_NA"].shape == (0, MOST_WORDS)
    first, second = category_hashes("a")
    assert first != second and 0 <= first < 1 << 31 and 0 <= second < 1 << 31


def test_zero_rows_stay_zero_and_others_have_length_one() -> None:
    np.testing.assert_allclose(unit_or_zero_rows(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0, 0]])


CONTENT = ItemContent(item_id="a", title="coat", text="of wool", category="Coats", price=5.0, year=2001, image=b"photo")


@pytest.mark.parametrize(
    "change", [{"title": "x"}, {"text": "x"}, {"category": "x"}, {"category": None}, {"image": b"x"}, {"image": None}]
)
def test_what_the_towers_read_decides_the_key(change: dict[str, Any]) -> None:
    assert content_key(replace(CONTENT, **change)) != content_key(CONTENT)
    assert content_key(replace(CONTENT, item_id="b", price=1.0, year=None)) == content_key(CONTENT)


class Towers:
    """Lengths of title, description and picture as features; counts what it computes."""

    tower_widths = (2, 3)

    def __init__(self) -> None:
        self.computed: list[int] = []

    def prepare(self, content: ItemContent) -> Prepared:
        if content.image == b"damaged":
            raise EncodingFailed(Reason.BAD_IMAGE, "damaged")
        if not content.title and content.image is None:
            raise EncodingFailed(Reason.NO_CONTENT, "nothing")
        pixels = None if content.image is None else np.full((1, 1, 3), len(content.image), np.uint8)
        return Prepared(tokens=(len(content.title), len(content.text)) if content.title else None, pixels=pixels)

    def tower_features(self, batch: Sequence[Prepared]) -> tuple[np.ndarray, np.ndarray]:
        self.computed.append(len(batch))
        text = [[0, 0] if one.tokens is None else list(one.tokens) for one in batch]
        image = [[0 if one.pixels is None else one.pixels[0, 0, 0]] * 3 for one in batch]
        return np.array(text, np.float32), np.array(image, np.float32)


def cache(folder: Path, digest: str = "d", warned: list[str] | None = None) -> tuple[FeatureCache, Towers]:
    towers = Towers()
    warn = (lambda event, **more: warned.append(event)) if warned is not None else (lambda event, **more: None)
    return FeatureCache(folder, towers, digest, warn=warn), towers  # type: ignore[arg-type]


ITEMS = [
    ItemContent(title="coat", image=b"abc", category="c", price=1.0, year=2001),
    ItemContent(title="hat"),
    ItemContent(title="", image=b"ab", year=1999),
    ItemContent(title="", category="alone"),
    ItemContent(title="shoes", image=b"damaged", price=3.0),
    ItemContent(title="coat", image=b"abc", category="c", price=9.0, year=1950),
]


def test_each_content_passes_the_towers_once_and_attributes_are_each_items_own(tmp_path: Path) -> None:
    warned: list[str] = []
    progress: list[int] = []
    first, towers = cache(tmp_path, warned=warned)
    found = first.features(ITEMS, on_progress=progress.append)
    assert found.text_NT[:, 0].tolist() == [4, 3, 0, 0, 5, 4] and found.image_NI[:, 2].tolist() == [3, 0, 2, 0, 0, 3]
    assert found.has_text_N.tolist() == [True, True, False, False, True, True]
    assert found.has_image_N.tolist() == [True, False, True, False, False, True]
    np.testing.assert_array_equal(found.price_N, [1, np.nan, np.nan, np.nan, 3, 9])
    np.testing.assert_array_equal(found.year_N, [2001, np.nan, 1999, np.nan, np.nan, 1950])
    assert (first.computed, towers.computed, progress) == (5, [5], [1, 5])
    assert warned == ["features.picture_ignored"]
    same(first.features(ITEMS), found)
    again, idle = cache(tmp_path)
    same(again.features([*ITEMS[::-1]]).select(np.arange(5, -1, -1)), found)
    assert (again.computed, idle.computed) == (0, [])
    other, working = cache(tmp_path, "other towers")
    other.features(ITEMS[:2])
    assert working.computed == [2]
    assert cache(tmp_path)[0].features([]).text_NT.shape == (0, 2)


def test_a_damaged_picture_costs_the_picture_and_none_of_the_words(tmp_path: Path) -> None:
    item = ItemContent(title="coat", text="of wool", image=b"damaged")
    found = cache(tmp_path)[0].features([item])
    assert found.text_NT.tolist() == [[4, 7]] and found.has_image_N.tolist() == [False]


def test_a_shard_that_cannot_be_read_costs_its_rows_again_and_nothing_else(tmp_path: Path) -> None:
    first, _ = cache(tmp_path)
    first.features(ITEMS[:2])
    first.features(ITEMS[2:4])
    (first.folder / "damaged.safetensors").write_bytes(b"no shard")
    warned: list[str] = []
    again, towers = cache(tmp_path, warned=warned)
    again.features(ITEMS[:4])
    assert warned == ["features.shard_ignored"] and towers.computed == []
    assert not [path for path in first.folder.iterdir() if path.name.startswith(".")]


def test_a_digest_of_files_is_of_their_names_and_bytes_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    whole = files_sha256(tmp_path, ["a", "b"])
    assert whole == files_sha256(tmp_path, ["b", "a"]) != files_sha256(tmp_path, ["a"])
    (tmp_path / "a").write_bytes(b"2")
    (tmp_path / "b").write_bytes(b"1")
    assert whole != files_sha256(tmp_path, ["a", "b"])


def test_any_text_has_a_key_also_one_that_is_no_unicode() -> None:
    keys = {content_key(ItemContent(title=title)) for title in ("", "\ud800", "\ud801", "?")}
    assert len(keys) == 4
    assert content_key(ItemContent(title="a", text="b")) != content_key(ItemContent(title="ab"))


@pytest.mark.parametrize("count", [1_023, 1_024, 1_100])
def test_every_row_of_a_large_catalogue_is_kept_whatever_shard_it_falls_into(tmp_path: Path, count: int) -> None:
    items = [ItemContent(title="x" * (n + 1)) for n in range(count)]
    progress: list[int] = []
    first, _ = cache(tmp_path)
    found = first.features(items, on_progress=progress.append)
    assert found.text_NT[:, 0].tolist() == list(range(1, count + 1))
    assert sum(progress) == count and max(progress) <= 64
    assert len(list(first.folder.glob("*.safetensors"))) == -(-count // 1_024)
    again, idle = cache(tmp_path)
    same(again.features(items), found)
    assert (idle.computed, again.computed, first.computed) == ([], 0, count)


def test_what_is_left_of_an_item_with_a_damaged_picture_is_all_its_words(tmp_path: Path) -> None:
    towers, seen, told = Towers(), [], []
    plain = towers.prepare

    def prepare(content: ItemContent) -> Prepared:
        seen.append(content)
        return plain(content)

    towers.prepare = prepare  # type: ignore[method-assign]
    kept = FeatureCache(tmp_path, towers, "d", warn=lambda *event, **more: told.append((event, more)))  # type: ignore[arg-type]
    words = ItemContent(item_id="a", title="coat", text="of wool", category="Coats", image=b"damaged")
    found = kept.features([words, ItemContent(item_id="b", category="c", image=b"damaged")])
    assert {(one.title, one.text, one.category) for one in seen if one.image is None} == {
        ("coat", "of wool", "Coats"),
        ("", "", "c"),
    }
    assert found.has_text_N.tolist() == [True, False] and not found.has_image_N.any()
    event = ("features.picture_ignored",)
    assert sorted(more["item_id"] for _, more in told) == ["a", "b"]
    assert all(named == event and more["reason"] == "bad_image" for named, more in told)


@pytest.mark.parametrize("fault", ["without keys", "fewer keys", "without flags"])
def test_a_whole_file_that_is_no_shard_costs_its_rows_alone(tmp_path: Path, fault: str) -> None:
    first, _ = cache(tmp_path)
    first.features(ITEMS[:2])
    (path,) = first.folder.glob("*.safetensors")
    rows = {"text": np.ones((2, 2), np.float32), "image": np.ones((2, 3), np.float32), "has": np.ones((2, 2), np.uint8)}
    keys = [] if fault == "fewer keys" else ["k1", "k2"]
    if fault == "without flags":
        del rows["has"]
    save_file(
        rows, first.folder / "0.safetensors", metadata=None if fault == "without keys" else {"keys": json.dumps(keys)}
    )
    told: list[str] = []
    again, towers = cache(tmp_path, warned=told)
    found = again.features(ITEMS[:2])
    assert told == ["features.shard_ignored"] and towers.computed == [] and found.text_NT[:, 0].tolist() == [4, 3]
    assert path.exists()
