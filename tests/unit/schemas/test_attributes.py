"""Attributes of items: what they may hold, and names that tell what became of an item."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from schemas.attributes import looks_like_an_outcome
from schemas.items import ItemPublished
from tests.unit.schemas.test_messages import item, read


@pytest.mark.parametrize(
    "attributes",
    [
        {f"a{n}": "x" for n in range(33)},
        {"a" * 65: "x"},
        {"": "x"},
        {"a": "x" * 201},
        {"a": ["x"] * 33},
        {"a": {"b": 1}},
        {"a": float("inf")},
        {f"a{n}": ["x" * 200] * 20 for n in range(3)},
        ["a"],
    ],
)
def test_attributes_are_bounded(attributes: object) -> None:
    with pytest.raises(ValidationError, match="attributes"):
        ItemPublished.model_validate(item(attributes=attributes))


def test_attributes_are_texts_lists_of_texts_and_numbers() -> None:
    given = {"colour": "red", "tags": ["a", "b"], "pages": 7, "weight": 1.5, "unknown": None, "empty": "", "none": []}
    found = read(item(attributes=given)).attributes
    assert found == {"colour": "red", "tags": ["a", "b"], "pages": 7.0, "weight": 1.5}
    assert read(item(attributes=given)).content_hash() == read(item()).content_hash()


@pytest.mark.parametrize(
    "name", ["rating", "avg_rating", "totalSales", "num-views", "ReviewCount", "popularity", "units.sold"]
)
def test_a_name_that_looks_like_an_outcome_is_told(name: str) -> None:
    assert looks_like_an_outcome(name)


@pytest.mark.parametrize(
    "name", ["genres", "colour_group_name", "director", "salesforce_id_group", "overview", "startup", "scorer"]
)
def test_other_names_do_not_look_like_outcomes(name: str) -> None:
    assert not looks_like_an_outcome(name)
