"""What is known of items, as arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.samples.item_facts import FactRows, FactsConfig, facts_of, scaled, word_hash


def facts(config: FactsConfig, **about: object) -> FactRows:
    plain: dict[str, object] = {"category": None, "price": None, "year": None, "attributes": {}, "published_at": 0.0}
    return facts_of(config, **{**plain, **about})  # type: ignore[arg-type]


def test_values_are_the_same_whatever_their_case_and_white_space_and_differ_by_attribute() -> None:
    assert word_hash("colour", " Red ") == word_hash("colour", "red") != word_hash("shade", "red")
    assert word_hash("colour", "  ") == 0


def test_each_attribute_has_its_share_of_the_values_that_are_kept() -> None:
    config = FactsConfig(attributes=("tags", "colour"), values_per_item=3)
    found = facts(config, attributes={"tags": [f"t{n}" for n in range(9)], "colour": "red", "other": "x"})
    assert found.group_IW[0].tolist() == [0, 0, 1] and word_hash("colour", "red") == found.words_IW[0, 2]


def test_each_attribute_has_its_share_also_where_all_are_one_group() -> None:
    found = facts(FactsConfig(values_per_item=3), attributes={"actors": [f"t{n}" for n in range(9)], "colour": "red"})
    assert word_hash("colour", "red") in found.words_IW[0] and (found.words_IW > 0).sum() == 3


def test_without_named_attributes_all_are_one_group() -> None:
    found = facts(FactsConfig(), attributes={"b": ["x", "x", "y"], "a": "x", "pages": 7.0})
    assert (found.words_IW > 0).sum() == 3 and not found.group_IW.any()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("price", math.e, 1.0), ("price", 0.0, math.nan), ("pages", -3.0, math.asinh(-3.0))),
        *(("year", 2010, 1.0), ("birth_year", -300.0, -230.0), ("birth_year", 1e36, math.nan)),
        *(("year", 0, math.nan), ("year", 9_999, 799.9), ("year", 10_000, math.nan)),
    ],
)
def test_numbers_are_on_a_scale_for_networks(name: str, value: float, expected: float) -> None:
    assert scaled(name, value) == pytest.approx(expected, nan_ok=True)


def test_a_number_that_is_a_text_is_not_known() -> None:
    config = FactsConfig(numbers=("price", "pages"))
    assert np.isnan(facts(config, attributes={"pages": "seven"}).numbers_IN).all()
    assert facts(config, price=math.e, attributes={"pages": 0.0, "price": 99.0}).numbers_IN[0].tolist() == [1.0, 0.0]
    assert np.isnan(facts(config, price=math.inf, attributes={"pages": math.inf}).numbers_IN).all()


def test_rows_that_were_kept_and_rows_that_were_restored_are_apart() -> None:
    config = FactsConfig()
    rows = facts(config, category="shoes", year=2010)
    state = rows.snapshot()
    restored = FactRows.restored(state)
    for one in (rows, restored):
        one.put(0, FactRows.empty(config, 1))
    again = FactRows.restored(state)
    assert again.category_I[0] == word_hash("category", "shoes") and again.numbers_IN[0, 1] == 1.0


def test_one_more_row_of_which_nothing_is_known_comes_last() -> None:
    config = FactsConfig(queries=True)
    known = facts(config, category="shoes", price=9.0, attributes={"colour": "red"}, title="red boots")
    rows = FactRows.joined([FactRows.empty(config, 1), known]).with_unknown()
    expected = FactRows.joined([FactRows.empty(config, 1), known, FactRows.empty(config, 1)])
    for name, column in vars(expected).items():
        np.testing.assert_array_equal(getattr(rows, name), column)
        assert getattr(rows, name).dtype == column.dtype
