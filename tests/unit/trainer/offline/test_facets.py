"""Which further columns of a folder are facets or numbers, and how alike two items are by a facet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.factories.offline_folders import START, write
from trainer.datasets.folder import open_data_set
from trainer.offline.facets import Facet, facet_of, further_columns

Columns = tuple[dict[str, Facet], dict[str, Any]]


def columns(folder: Path, **more: Any) -> Columns:
    """Six items whose rows lie in the reverse of the order of publication: `f` is item 1 and `a` is item 6."""
    items = {"item_id": [*"abcdef"], "title": ["x"] * 6, "publish_ts": [START - n for n in range(6)]}
    write(folder, "items", **items, **more)
    return further_columns(open_data_set(folder, behaviours=False), folder)


def same(facet: Facet, one: int, other: int) -> float:
    return float(facet.shared(np.array([one]), np.array([other]))[0])


def test_values_are_those_of_each_item_without_white_space_and_case(tmp_path: Path) -> None:
    colours = pa.array([" Red", "blue", "red ", None, "RED", ""], pa.large_string())
    facets, numbers = columns(tmp_path, colour=colours)
    assert facets.keys() == {"colour"} and not numbers
    found = facets["colour"]
    pairs = {(a, b) for a in range(7) for b in range(a, 7) if same(found, a, b)}
    reds = (2, 4, 6)
    assert pairs == {(5, 5), *((a, b) for a in reds for b in reds if a <= b)}


def test_numbers_are_fractions_beyond_the_format_and_what_was_computed_on_the_whole_log_is_left_out(
    tmp_path: Path,
) -> None:
    _, numbers = columns(
        tmp_path,
        height=[1.5, 2.5, None, 3.0, 4.0, 5.0],
        width=pa.array([1, 2, 3, 4, 5, 6], pa.decimal128(6, 1)),
        whole=pa.array([1, 2, 3, 4, 5, 6], pa.decimal128(6, 0)),
        count=[1, 2, 3, 4, 5, 6],
        release_year=[2001.0] * 6,
        year=[2001.0] * 6,
        price=[1.5] * 6,
        diag_popularity=[0.5] * 6,
    )
    assert numbers.keys() == {"height", "width"}
    np.testing.assert_equal(numbers["height"], [np.nan, 5.0, 4.0, 3.0, np.nan, 2.5, 1.5])
    np.testing.assert_equal(numbers["width"], [np.nan, 6, 5, 4, 3, 2, 1])
    assert columns(tmp_path, diag_kind=["p", "q"] * 3)[0] == {}


def test_words_weigh_by_the_logarithm_of_how_rare_they_are() -> None:
    genres = facet_of(["", "comedy, drama", "comedy", " war ,", "comedy,drama", "", "comedy"])
    assert genres is not None
    often, seldom = math.log(7 / 4), math.log(7 / 2)
    assert same(genres, 1, 2) == pytest.approx(often / math.hypot(often, seldom))
    assert [same(genres, 1, 4), same(genres, 3, 3), same(genres, 1, 3), same(genres, 5, 5)] == pytest.approx(
        [1, 1, 0, 0]
    )


@pytest.mark.parametrize(("words", "one_by_one"), [(128, True), (129, False)])
def test_so_many_different_words_are_read_as_words_and_more_as_whole_texts(words: int, one_by_one: bool) -> None:
    every = ", ".join(f"w{n}" for n in range(words))
    found = facet_of(["", every, "w0", every, "w0", "w0", "w1", "w1"])
    assert found is not None and (same(found, 1, 2) > 0) is one_by_one and same(found, 1, 3) == pytest.approx(1)


def test_a_text_column_is_a_facet_where_it_has_two_values_or_more_and_over_two_items_for_each() -> None:
    assert facet_of(["", "a", "b", "a", "b"]) is not None  # two values of five rows
    assert facet_of(["", "a", "b", "a"]) is None
    assert facet_of(["", "a", "a", "a", "a"]) is None
    plain = facet_of(["", "a, ", "b", "a, ", "b"])
    assert plain is not None and plain.value_I is not None, "no text has two words"
