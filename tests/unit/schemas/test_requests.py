"""Bodies of HTTP requests: their bounds, and that no wish is ignored."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from schemas.base import ItemId
from schemas.scoring import MAX_CANDIDATES, MAX_NEIGHBOURS, MAX_SIMILAR_QUERIES, ScoreRequest, SimilarRequest

PHOTO = b64encode(b"photo").decode()
QUERIES: dict[str, Any] = {"item_id": "a", "item_ids": ["a", "b"], "text": "lamp", "image": PHOTO}


def similar(**body: Any) -> SimilarRequest:
    return SimilarRequest.model_validate(body)


@pytest.mark.parametrize("name", QUERIES)
def test_each_kind_of_query_is_enough_and_a_second_one_or_none_is_refused(name: str) -> None:
    found = similar(**{name: QUERIES[name]})
    assert [one for one in QUERIES if getattr(found, one) is not None] == [name]
    assert (found.k, found.include_self) == (10, False)
    for other in set(QUERIES) - {name}:
        with pytest.raises(ValidationError, match="give exactly one of item_id, item_ids, text, image"):
            similar(**{name: QUERIES[name], other: QUERIES[other]})
    with pytest.raises(ValidationError, match="given: none"):
        similar(**{name: None})


def test_an_empty_picture_is_a_query_too() -> None:
    assert similar(image="").image == b""
    with pytest.raises(ValidationError, match="exactly one"):
        similar(image="", text="lamp")


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        ({"item_id": "a", "k": 1}, True),
        ({"item_id": "a", "k": 0}, False),
        ({"item_id": "a", "k": MAX_NEIGHBOURS}, True),
        ({"item_id": "a", "k": MAX_NEIGHBOURS + 1}, False),
        ({"item_ids": []}, False),
        ({"item_ids": ["a"] * MAX_SIMILAR_QUERIES}, True),
        ({"item_ids": ["a"] * (MAX_SIMILAR_QUERIES + 1)}, False),
        ({"item_ids": ["a", ""]}, False),
        ({"text": ""}, False),
        ({"text": "x" * 2_000}, True),
        ({"text": "x" * 2_001}, False),
        ({"image": "%%%"}, False),
        ({"item_id": "a", "neighbours": 5}, False),
    ],
)
def test_bounds_of_a_search_are_inside(body: dict[str, Any], fits: bool) -> None:
    if fits:
        similar(**body)
    else:
        with pytest.raises(ValidationError):
            similar(**body)


@pytest.mark.parametrize(
    ("ids", "fits"),
    [
        ([], False),
        (["a"] * MAX_CANDIDATES, True),
        (["a b"] * MAX_CANDIDATES, True),
        (["a"] * (MAX_CANDIDATES + 1), False),
        (["a", "x" * 200, "b"], True),
        (["b", "x" * 201, "z"], False),
        (["a", ""], False),
        (["a", "\t"], False),
        (["a", " b"], False),
        (("a", "b"), True),
        ([1, "b"], True),
        ("ab", False),
        ({"a": 1}, False),
    ],
)
def test_bounds_of_candidates_are_inside(ids: Any, fits: bool) -> None:
    body = {"user_id": "u", "item_ids": ids}
    if fits:
        assert ScoreRequest.model_validate(body).item_ids == [str(one) for one in ids]
    else:
        with pytest.raises(ValidationError):
            ScoreRequest.model_validate(body)


def test_a_wish_that_scoring_does_not_know_is_refused() -> None:
    body = {"user_id": "u", "item_ids": ["a"]}
    assert ScoreRequest.model_validate(body).exclude_taken is False
    with pytest.raises(ValidationError, match="exclude_seen"):
        ScoreRequest.model_validate(body | {"exclude_seen": True})


ODD_IDS = ["a", "item 1", " a", "a ", "\u00a0", "a\u2028b", "x" * 200, "x" * 201, 7, True, None, 1.5]


@settings(max_examples=50)
@given(st.lists(st.text(max_size=3) | st.sampled_from(ODD_IDS), max_size=4))
def test_candidates_that_pass_at_once_are_those_that_pass_one_by_one(ids: list[object]) -> None:
    one_by_one = TypeAdapter(Annotated[list[ItemId], Field(min_length=1, max_length=MAX_CANDIDATES)])
    try:
        expected: object = one_by_one.validate_json(json.dumps(ids))
    except ValidationError as error:
        expected = [(("item_ids", *each["loc"]), each["msg"]) for each in error.errors()]
    try:
        found: object = ScoreRequest.model_validate_json(json.dumps({"user_id": "u", "item_ids": ids})).item_ids
    except ValidationError as error:
        found = [(each["loc"], each["msg"]) for each in error.errors()]
    assert found == expected
