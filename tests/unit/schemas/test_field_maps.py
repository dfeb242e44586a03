"""Field maps: a platform's own names and shapes."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from schemas.base import decode
from schemas.behaviours import Behaviour
from schemas.errors import BadMessage, Reason
from schemas.field_maps import Envelope, FieldMap, checked_field_map
from schemas.items import ItemPublished

NOW = datetime(2026, 11, 1, 8, tzinfo=UTC)
PLAIN = {"item_id": "a", "title": "lamp", "published_at": "2026-01-01T00:00:00Z"}


def read(document: dict[str, object], field_map: FieldMap, **headers: bytes | None) -> ItemPublished:
    checked_field_map(field_map, ItemPublished)
    payload = json.dumps(document).encode()
    envelope = Envelope(NOW, tuple(headers.items()))
    return decode(ItemPublished, payload, now=NOW, max_bytes=9_000, field_map=field_map, envelope=envelope)


OWN_FIELDS = {
    "image": {"src": "https://a.example/1.jpg"},
    "event": "products/update",
    "schema_version": "2026-10",
    "updated_at": "2026-01-01 10:00:00",
    "category": {"id": 7},
    "year": "2026/27",
}


@pytest.mark.parametrize("name", OWN_FIELDS)
@pytest.mark.parametrize("nowhere", ["", None])
def test_a_platforms_field_of_our_name_and_another_meaning_is_hidden(name: str, nowhere: str | None) -> None:
    document = PLAIN | {name: OWN_FIELDS[name]}
    with pytest.raises(BadMessage, match=name):
        read(document, {"title": "title"})
    assert read(document, {name: nowhere}) == read(PLAIN, {name: nowhere})


def test_a_star_hides_every_field_that_the_map_does_not_name() -> None:
    field_map: FieldMap = {"*": "", "item_id": "item_id", "title": "title", "published_at": "published_at"}
    assert read(PLAIN | OWN_FIELDS, field_map) == read(PLAIN, {"event": ""})


def test_a_mapped_field_is_never_read_from_the_platforms_field_of_our_name() -> None:
    assert read(PLAIN | {"image": {"src": "x"}, "photo": None}, {"image": "photo"}).image is None
    assert read(PLAIN | {"text": 7, "body": "a lamp"}, {"text": "body"}).text == "a lamp"


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("a.b", "1"),
        ("list.0.b", "2"),
        ("list.1.b", "3"),
        ("list.2.b", ""),
        ("one.b", "4"),
        ("ones", "5"),
        ("ones.0", "5"),
        ("none", ""),
        ("none.b", ""),
        ("dotted.name", "6"),
        ("a.dotted.name", "7"),
        ("a.b.c", ""),
        ("gone", ""),
        ("gone.b.0", ""),
        (["gone", "blank", "a.b"], "1"),
        ("a.b+ones", "1-5"),
        ("a.b+gone", ""),
        ("gone+a.b", ""),
        ("a.b+blank", ""),
        ("number+ones+a.b", "9-5-1"),
        (["a.b+gone", "ones"], "5"),
        ("numbered.0", "10"),
        ("ones.1", ""),
        ("a.b.0", ""),
        ("header:h", "8"),
        ("header:H", ""),
        ("header:nothing", ""),
        ("header:odd", "\\xff"),
        ("header:h+a.b", "8-1"),
        (["header:nothing", "a.b"], "1"),
        ({"from": "a.b", "values": {"1": "one"}}, "one"),
        ({"from": ["gone", "ones"], "values": {"1": "one"}}, "5"),
        ({"from": "number", "values": {"9": "nine"}}, "nine"),
    ],
)
def test_a_value_is_found_at_its_place(place: object, found: str) -> None:
    document = {
        "a": {"b": "1", "dotted.name": "7"},
        "list": [{"b": "2"}, {"b": "3"}],
        "one": [{"b": "4"}],
        "ones": ["5"],
        "none": [],
        "dotted.name": "6",
        "blank": " ",
        "number": 9,
        "numbered": {"0": "10"},
    }
    assert read(PLAIN | document, {"text": place}, h=b"8", nothing=None, odd=b"\xff").text == found  # type: ignore[dict-item]


@pytest.mark.parametrize("place", ["lines.sku", "skus", "deep.lines.sku"])
def test_one_of_several_values_is_never_chosen_in_silence(place: str) -> None:
    lines = [{"sku": "a"}, {"sku": "b"}]
    with pytest.raises(BadMessage, match=rf"{place}: a list of 2") as caught:
        read(PLAIN | {"lines": lines, "skus": ["a", "b"], "deep": {"lines": lines}}, {"item_id": place})
    assert caught.value.reason is Reason.WRONG_TYPE


def test_of_headers_of_one_name_the_last_is_read() -> None:
    envelope = Envelope(NOW, (("h", b"1"), ("h", b"2")))
    payload = json.dumps(PLAIN).encode()
    item = decode(ItemPublished, payload, now=NOW, max_bytes=9_000, field_map={"text": "header:h"}, envelope=envelope)
    assert item.text == "2"


def test_without_an_envelope_the_time_of_production_is_now() -> None:
    payload, field_map = json.dumps(PLAIN).encode(), {"published_at": "record:timestamp", "text": "header:h"}
    item = decode(ItemPublished, payload, now=NOW, max_bytes=9_000, field_map=field_map)  # type: ignore[arg-type]
    assert (item.published_at, item.text) == (NOW, "")


def test_a_feed_without_times_may_use_the_records_own() -> None:
    item = read({"item_id": "a", "title": "lamp"}, {"published_at": ["first_seen", "record:timestamp"]})
    assert item.published_at == NOW


def test_a_value_without_translation_is_judged_as_it_is() -> None:
    document = {"event_id": "e", "user_id": "u", "item_id": "i", "occurred_at": "2026-01-01T00:00:00Z"}
    field_map: FieldMap = {"kind": {"from": "name", "values": {"Product Added": "cart"}}}

    def kind(name: str) -> str:
        payload = json.dumps(document | {"name": name}).encode()
        return decode(Behaviour, payload, now=NOW, max_bytes=9_000, field_map=field_map).kind.value

    assert (kind("Product Added"), kind("purchase")) == ("cart", "purchase")
    with pytest.raises(BadMessage, match="kind"):
        kind("Page Viewed")


@pytest.mark.parametrize(
    ("field_map", "message"),
    [
        ({"itemid": "sku"}, "no field is called itemid; there are .*item_id"),
        ({"*": "x"}, "can only hide"),
        ({"event": {"from": "op"}}, "event: a translation is"),
        ({"event": {"from": "op", "values": {"c": 1}}}, "event: places and values are texts"),
        ({"event": {"from": 7, "values": {}}}, "event: a translation is"),
        ({"event": {"from": "op", "values": ["c"]}}, "event: a translation is"),
        ({"event": {"from": "op", "values": {}, "else": "update"}}, "event: a translation is"),
        ({"event": {"from": ["op", 7], "values": {"c": "update"}}}, "event: places and values are texts"),
        ({"title": "title", "event": {"values": {}}}, "event: a translation is"),
    ],
)
def test_a_map_that_cannot_be_meant_is_refused(field_map: FieldMap, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_field_map(field_map, ItemPublished)


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("specs.colour", "red"),
        ("tags", ["new", "sale"]),
        ("labels.name", ["a", "b"]),
        ("labels.1.name", "b"),
        ("specs.pages", 320.0),
        ("sizes", ["38", "40"]),
        (["nothing", "specs.colour"], "red"),
        ({"from": "specs.colour", "values": {"red": "rouge"}}, "rouge"),
        ("header:shop", "north"),
    ],
)
def test_an_attribute_is_read_from_any_nested_field(place: object, found: object) -> None:
    document = PLAIN | {
        "specs": {"colour": "red", "pages": 320},
        "tags": ["new", "sale", None],
        "labels": [{"name": "a"}, {"name": "b"}],
        "sizes": [38, 40],
        "attributes": "theirs",
    }
    field_map: FieldMap = {"attributes.one": place}  # type: ignore[dict-item]
    assert read(document, field_map, shop=b"north").attributes == {"one": found}


def test_an_object_can_be_taken_whole_as_the_attributes() -> None:
    assert read(PLAIN | {"specs": {"a": "x", "b": ["y", "z"]}}, {"attributes": "specs"}).attributes == {
        "a": "x",
        "b": ["y", "z"],
    }


@pytest.mark.parametrize("named_first", [True, False])
def test_attributes_of_a_place_of_their_own_stand_beside_the_whole_object_in_any_order(*, named_first: bool) -> None:
    field_map: FieldMap = {"attributes": "specs", "attributes.colour": "colour"}
    if named_first:
        field_map = dict(reversed(field_map.items()))
    found = read(PLAIN | {"specs": {"size": "xl", "colour": "grey"}, "colour": "red"}, field_map)
    assert found.attributes == {"size": "xl", "colour": "red"}
    with pytest.raises(BadMessage, match="attributes"):
        read(PLAIN | {"specs": "a text", "colour": "red"}, field_map)


def test_only_items_have_attributes() -> None:
    with pytest.raises(ValueError, match=r"no field is called attributes\.one"):
        checked_field_map({"attributes.one": "x"}, Behaviour)
