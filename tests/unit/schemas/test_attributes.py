"""Attributes of items: what they may hold, and names that tell what became of an item."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from schemas.attributes import MAX_CHARACTERS, looks_like_an_outcome, words_of
from schemas.items import ItemPublished
from tests.factories.messages import item, read


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


def test_names_count_among_the_characters_of_an_item() -> None:
    most: dict[str, object] = {"a": ["x" * 200] * 32, "bb": ["x" * 200] * 7, "name": "x" * 193}
    assert sum(map(len, most)) + 39 * 200 + 193 == MAX_CHARACTERS
    assert read(item(attributes=most)).attributes == most
    with pytest.raises(ValidationError, match="characters together"):
        ItemPublished.model_validate(item(attributes=most | {"names": most["name"], "name": ""}))


def test_attributes_are_texts_lists_of_texts_and_numbers() -> None:
    given = {"colour": "red", "tags": ["a", "b"], "pages": 0, "weight": 1.5, "unknown": None, "empty": "", "none": []}
    found = read(item(attributes=given)).attributes
    assert found == {"colour": "red", "tags": ["a", "b"], "pages": 0.0, "weight": 1.5}
    numbers = {"pages": 7, "weight": 1.5, "unknown": None, "empty": "", "none": []}
    assert read(item(attributes=numbers)).content_hash() == read(item()).content_hash()


def test_words_are_the_values_of_all_names_in_turn_whatever_their_order_and_spelling() -> None:
    given = {"tags": ["b", " A ", "a", ""], "colour": "Red", "pages": 7.0}
    assert words_of(given) == [("colour", "red"), ("tags", "b"), ("tags", "a")]
    assert words_of(dict(reversed(given.items()))) == words_of(given)
    many = {f"n{number:02}": ["x", "y"] for number in range(20)}
    assert words_of(many) == [(f"n{n:02}", "x") for n in range(20)] + [(f"n{n:02}", "y") for n in range(12)]


def test_another_word_is_another_content_and_outcomes_are_none() -> None:
    hashes = [
        read(item(attributes=given)).content_hash()
        for given in ({"a": "b"}, {"a": "c"}, {"b": "b"}, {"a": ["b", "c"]}, {}, {"a": "b", "sold": "often"})
    ]
    assert len(set(hashes)) == len(hashes)
    without = read(item(attributes={"a": "b", "sold": "often"})).without({"sold"})
    assert without.attributes == {"a": "b"} and without.content_hash() == hashes[0]
    assert read(item(attributes={"a": " B"})).content_hash() == hashes[0]


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
