"""Which columns of items are attributes, at the bounds of each rule, and what of them an item's message carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from schemas.attributes import (
    MAX_CHARACTERS,
    MAX_NAME_CHARACTERS,
    MAX_VALUE_CHARACTERS,
    MOST_ATTRIBUTES,
    MOST_VALUES,
    characters,
)
from tests.factories.offline_folders import write
from trainer.datasets.attributes import ItemAttributes, attribute_columns

N = 8


def found(folder: Path, **columns: Any) -> ItemAttributes:
    """Of eight items with these columns."""
    write(folder, "items", item_id=[f"i{n}" for n in range(N)], title=["t"] * N, publish_ts=[0] * N, **columns)
    return attribute_columns(folder / "items.parquet")[0]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        pytest.param([*"aaabbbcc"], "texts", id="three values of eight items"),
        pytest.param([*"aabbccdd"], None, id="four of eight"),
        pytest.param(["a"] * N, None, id="one for all"),
        pytest.param(["a"] * 4 + [None, "", " ", None], None, id="one for those that have one"),
        pytest.param(["a", "A", " a", "B", "b ", "b", "C", "c"], "texts", id="the same in any case"),
        pytest.param(
            ["a, b", "a", "b", "a, b", "b, a", "", None, "c"], "lists", id="three words that stand nine times"
        ),
        pytest.param(["a, b", "a", "c", "d", "c", "d", "b", None], None, id="four words that stand eight times"),
        pytest.param(["a, a"] * N, None, id="one word"),
        pytest.param(["a,"] * 4 + ["b"] * 4, "lists", id="words with a comma alone"),
        pytest.param([1, 1, 2, 2, 3, 3, 4, 4], "numbers", id="four whole numbers of eight"),
        pytest.param([1, 1, 2, 2, 3, 3, 4, 5], None, id="five whole numbers of eight, as identifiers are"),
        pytest.param([1.5, 1, 2, 2, 3, 3, 4, 5], "numbers", id="five fractions"),
        pytest.param([float(n) for n in range(N)], "numbers", id="a measure that differs for all"),
        pytest.param([2.5] * N, None, id="one number for all"),
        pytest.param([2.5, np.nan, np.inf, None, 2.5, 2.5, 2.5, 2.5], None, id="one number and none"),
        pytest.param([7, 7, 7, 8, None, None, None, None], "numbers", id="two of the four that are known"),
        pytest.param([True, False] * 4, None, id="flags"),
        pytest.param(pa.array([*"aaabbbcc"], pa.large_string()), "texts", id="large text"),
        pytest.param(pa.array([*"aaabbbcc"]).dictionary_encode(), "texts", id="a dictionary of texts"),
        pytest.param(pa.array([1, 2] * 4).dictionary_encode(), "numbers", id="a dictionary of numbers"),
        pytest.param(pa.array([1, 2] * 4).cast(pa.decimal128(23, 2)), "numbers", id="decimals"),
    ],
)
def test_a_column_is(values: Any, kind: str | None, tmp_path: Path) -> None:
    expected = {"texts": (), "lists": (), "numbers": ()} | ({kind: ("x",)} if kind else {})
    assert found(tmp_path, x=values) == ItemAttributes(**expected)


def test_names_of_the_format_and_of_diagnoses_and_long_ones_are_none(tmp_path: Path) -> None:
    fits, long = "n" * MAX_NAME_CHARACTERS, "n" * (MAX_NAME_CHARACTERS + 1)
    own = ("text", "category", "price", "year", "release_year", "first_ts", "cold_holdout", "diag_takes", long)
    known = found(tmp_path, **{key: [*"aaabbbcc"] for key in (*own, fits, "diagonal")})
    assert known == ItemAttributes((fits, "diagonal"), (), ())


def test_of_too_many_texts_come_before_words_and_these_before_numbers(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"n1": [1, 2] * 4, "w1": ["a, b"] * N, "n2": [3, 4] * 4}
    columns |= {f"t{n}": [*"aaabbbcc"] for n in range(MOST_ATTRIBUTES - 2)}
    known = found(tmp_path, **columns)
    assert (known.lists, known.numbers) == (("w1",), ("n1",)) and len(known.names) == MOST_ATTRIBUTES
    _, table = attribute_columns(tmp_path / "items.parquet")
    assert table.column_names == list(known.names)


def test_an_item_carries_what_says_something_and_no_more_of_it_than_fits() -> None:
    known = ItemAttributes(("colour", "none"), ("tags", "empty"), ("weight", "least", "gone", "size"))
    long = "x" * (MAX_VALUE_CHARACTERS + 9)
    row = {
        "colour": f" {long} ", "none": "  ", "tags": ", ".join([long, *(f"w{n}" for n in range(MOST_VALUES + 3))]),
        "empty": " , ", "weight": np.float64(1.5), "least": -np.inf, "gone": None, "size": 0,
    }  # fmt: skip
    found = known.of(row)
    assert found == {
        "colour": long[:MAX_VALUE_CHARACTERS],
        "tags": [long[:MAX_VALUE_CHARACTERS], *(f"w{n}" for n in range(MOST_VALUES - 1))],
        "weight": 1.5,
        "size": 0.0,
    }
    assert type(found["weight"]) is float


def test_what_is_too_much_beside_the_ones_before_is_left_out_and_what_fits_behind_it_is_not() -> None:
    whole = "x" * MAX_VALUE_CHARACTERS
    kept = {f"t{n:02d}": whole for n in range(MAX_CHARACTERS // (MAX_VALUE_CHARACTERS + 3))}
    left = MAX_CHARACTERS - characters(kept)
    assert len("end") < left < len("big") + MAX_VALUE_CHARACTERS
    fitting, known = "y" * (left - len("end")), ItemAttributes((*kept, "big", "end"), (), ())
    assert known.of(kept | {"end": fitting}) == kept | {"end": fitting}
    assert known.of(kept | {"big": whole, "end": fitting}) == kept | {"end": fitting}
    assert known.of(kept | {"end": fitting + "y"}) == kept
