"""The pure part of `mimstream record`: what is read, what gets a dead letter, where reading starts."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.behaviours import BehaviourKind
from schemas.errors import Misconfigured, Reason
from streams.broker.records import read_batch
from streams.recording.recorder import Placement, place
from streams.stores.histories.packed_history import (
    UserTakes,
    contains_hash,
    hash_of,
    pack_takes,
    packed_history,
    packed_items,
    unpack_takes,
)
from tests.factories.fake_consumer import IN_TIME_MS, FakeRecord
from tests.factories.samples import DAY0, behaviour

NOW = datetime.fromtimestamp(IN_TIME_MS / 1000, UTC)
Raw = partial(FakeRecord, 3)


def raw(offset: int, *, key: bytes | None = b"u1", **changes: object) -> FakeRecord:
    event = {"event_id": f"e{offset}", "kind": "click", "user_id": "u1", "item_id": "i", "occurred_at": 1_700_000_000}
    return Raw(offset, key, json.dumps(event | changes).encode())


def read(*records: FakeRecord) -> tuple[list[bool], list[tuple[int, Reason]]]:
    events, letters = read_batch(records, now=NOW, max_bytes=1_000)
    return [event.behaviour is not None for event in events], [(letter.offset, letter.reason) for letter in letters]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Raw(1, b"u1", None), Reason.NOT_JSON),
        (Raw(1, b"u1", b"\xff\xfe"), Reason.NOT_JSON),
        (Raw(1, b"u1", b"[]"), Reason.WRONG_TYPE),
        (raw(1, kind="stare"), Reason.WRONG_TYPE),
        (raw(1, event_id=""), Reason.WRONG_TYPE),
        (raw(1, key=None), Reason.NO_KEY),
        (raw(1, key=b"u2"), Reason.KEY_MISMATCH),
        (raw(1, schema_version=7), Reason.UNKNOWN_VERSION),
        (raw(1, occurred_at="2025-01-01T00:00:00"), Reason.TIMESTAMP_WITHOUT_ZONE),
        (raw(1, occurred_at="2027-01-01T00:00:00Z"), Reason.TIMESTAMP_IN_FUTURE),
        (raw(1, padding="x" * 2_000), Reason.TOO_LARGE),
    ],
)
def test_a_broken_behaviour_gets_a_letter_and_its_neighbours_go_through(broken: FakeRecord, reason: Reason) -> None:
    assert read(raw(0), broken, raw(2)) == ([True, False, True], [(1, reason)])


def test_a_letter_carries_the_original_bytes_and_where_they_came_from() -> None:
    _, (letter,) = read_batch([Raw(9, b"k", b"{broken")], now=NOW, max_bytes=1_000)
    assert (letter.topic, letter.partition, letter.offset, letter.key) == ("behaviours", 3, 9, b"k")
    assert (letter.value, letter.stage, letter.failed_at) == (b"{broken", "record", NOW)


def test_a_replay_years_later_comes_to_the_same_verdict() -> None:
    ahead = raw(0, occurred_at="2026-06-01T00:00:00Z")
    events, _ = read_batch([ahead], now=NOW.replace(year=2030), max_bytes=1_000)
    assert events[0].behaviour is None


def test_a_platforms_own_field_names_are_mapped() -> None:
    record = Raw(0, b"7", b'{"event_id":"e","kind":"cart","who":{"id":7},"sku":"s1","occurred_at":1700000000}')
    events, letters = read_batch([record], now=NOW, max_bytes=1_000, field_map={"user_id": "who.id", "item_id": "sku"})
    assert letters == []
    assert events[0].behaviour is not None
    assert (events[0].behaviour.user_id, events[0].behaviour.item_id) == ("7", "s1")


def test_reading_starts_where_the_store_stands_whatever_the_group_committed() -> None:
    assert place(stored=50, committed=40, beginning=0, end=90) == Placement(50)
    assert place(stored=50, committed=None, beginning=0, end=90) == Placement(50)
    assert place(stored=90, committed=90, beginning=90, end=90) == Placement(90)


def test_a_store_behind_the_commit_is_replayed() -> None:
    assert place(stored=50, committed=70, beginning=0, end=90) == Placement(50, behind_commit=20)


def test_what_retention_deleted_is_passed_over_and_counted() -> None:
    assert place(stored=50, committed=60, beginning=55, end=90) == Placement(55, lost=5, behind_commit=5)


def test_a_store_ahead_of_the_log_is_refused() -> None:
    with pytest.raises(Misconfigured, match=r"record --rebuild"):
        place(stored=91, committed=None, beginning=0, end=90)


ids = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=8).filter(
    lambda text: text.isprintable() and text == text.strip()
)
takes = st.lists(st.tuples(ids, ids, st.integers(0, 2**31), st.sampled_from(list(BehaviourKind))), max_size=60)


@settings(max_examples=40)
@given(takes)
def test_packing_a_user_loses_nothing(rows: list[tuple[str, str, int, BehaviourKind]]) -> None:
    user = UserTakes()
    for event_id, item_id, at, kind in rows:
        event = behaviour(event_id, kind, user="u", item=item_id, second=at - DAY0)
        user.observe(event, length=20, remembered=30)
    again = UserTakes()
    unpack_takes(pack_takes(user), again)
    again.recent = user.recent
    assert again == user
    assert packed_history(pack_takes(user)) == user.history()
    assert packed_items(pack_takes(user)) == user.items
    assert user.times == sorted(user.times)
    assert len(user.times) <= 20 and len(user.recent) <= 30 * 8


def test_an_id_is_not_recognised_across_two_neighbouring_hashes() -> None:
    first, second = hash_of("a"), hash_of("b")
    across = (first + second)[3:11]
    assert contains_hash(first + second, first) and contains_hash(first + second, second)
    assert not contains_hash(first + second, across)
    assert contains_hash(first + second + across, across)
    assert not contains_hash(b"", first)


def test_bytes_of_another_layout_are_refused_with_the_way_out() -> None:
    with pytest.raises(Misconfigured, match=r"record --rebuild"):
        unpack_takes(b"\x02whatever", UserTakes())
    with pytest.raises(Misconfigured, match=r"record --rebuild"):
        packed_history(b"\x02whatever")
