"""Dead letters set against what was sent."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from encoders.base import ItemContent
from encoders.hashing import HashingEncoder
from schemas.errors import Reason
from schemas.letters import DeadLetter
from streams.demo.audit import DrawnExposures, judge_letters, prepare_as_indexed
from tests.factories.item_path import picture

NOW = datetime(2026, 1, 1, tzinfo=UTC)
Source = tuple[str, int, int]


def letters(*found: tuple[int, bytes, str, Reason]) -> dict[Source, DeadLetter]:
    return {
        ("items", 0, offset): DeadLetter("items", 0, offset, key, b"{}", stage, reason, "why", NOW)
        for offset, key, stage, reason in found
    }


def test_a_refused_picture_of_an_item_that_is_held_is_no_refused_item() -> None:
    found = letters(
        (0, b"held", "image", Reason.BAD_IMAGE),
        (1, b"not held", "image", Reason.BAD_IMAGE),
        (2, b"held", "decode", Reason.NOT_JSON),
        (3, b"broken", "image", Reason.BAD_IMAGE),
    )
    judged = judge_letters(found, {("items", 0, 3): Reason.BAD_IMAGE}, {"held"})
    assert (judged.items, judged.pictures, judged.expected, judged.missing) == (3, 1, 1, [])
    assert [one.split(":")[0] for one in judged.unexpected] == ["items/0/1", "items/0/2"]


def test_a_broken_event_without_its_letter_is_missing() -> None:
    broken: dict[Source, Reason] = {("items", 0, 3): Reason.BAD_IMAGE, ("items", 0, 4): Reason.NOT_JSON}
    judged = judge_letters(letters((3, b"x", "decode", Reason.NO_CONTENT)), broken, set())
    assert [one.split(":")[0] for one in judged.missing] == ["items/0/3", "items/0/4"]


def test_an_item_whose_picture_cannot_be_used_is_encoded_afresh_as_it_was_indexed() -> None:
    encoder = HashingEncoder(8)
    damaged = ItemContent("a", "a title", image=picture()[:40])
    assert not prepare_as_indexed(encoder, damaged).has_image
    assert prepare_as_indexed(encoder, ItemContent("a", "a title", image=picture())).has_image


def test_drawn_exposures_that_do_not_name_their_take_are_counted() -> None:
    audit = DrawnExposures()
    shown = {"event_id": "ab12-s7", "kind": "exposure"}
    drawn = {"event_id": "ab12-n7-0", "kind": "exposure", "drawn_from": "ab12-t3", "drawn_at": "2026-01-01T00:00:00Z"}
    take = {"event_id": "ab12-n7-0", "kind": "click"}
    for event in (shown, drawn, take, drawn | {"drawn_from": None}, {**drawn, "drawn_at": None}):
        audit.see(json.dumps(event).encode())
    assert (audit.drawn, audit.without_source) == (3, 2)
