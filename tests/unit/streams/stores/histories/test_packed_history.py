"""A user's data as bytes, and what a batch makes of them."""

from __future__ import annotations

import pytest

from schemas.errors import Misconfigured
from schemas.forgotten import ForgottenUser
from streams.broker.cluster import TopicIncarnation
from streams.broker.records import BehaviourRecord
from streams.stores.histories.erasure_marks import ErasureMark
from streams.stores.histories.item_order import LATEST_MS, ItemState, newer_states, place_at
from streams.stores.histories.packed_history import (
    UserTakes,
    apply_batch,
    contains_hash,
    fresh_part,
    hash_of,
    pack_takes,
    packed_history,
    packed_items,
    packed_takes,
    skipped,
    unpack_takes,
    without_items,
)
from tests.factories.click_log import LOG, event
from tests.factories.samples import behaviour

IDS = [bytes([n]) * 7 + b"\x00" for n in range(1, 5)]


def takes(*items: str) -> UserTakes:
    n = len(items)
    return UserTakes([float(at) for at in range(n)], list(items), bytearray(at % 3 for at in range(n)), IDS[:n])


@pytest.mark.parametrize(
    ("hashes", "found"),
    [
        (b"", False),
        (b"abcdefgh", True),
        (b"12345678abcdefgh", True),
        (b"1234abcdefgh5678", False),  # across two of them
        (b"1234abcdefgh5678abcdefgh", True),
        (b"1234abcdefgh5678" * 2, False),
        (b"abcdefgh1234abcdefgh5678", True),
    ],
)
def test_a_hash_is_found_only_where_one_begins(hashes: bytes, found: bool) -> None:
    assert contains_hash(hashes, b"abcdefgh") is found


@pytest.mark.parametrize("items", [(), ("a",), ("a", "é", "商品:7", "x" * 200)])
def test_what_is_packed_comes_back_column_by_column(items: tuple[str, ...]) -> None:
    user, found = takes(*items), UserTakes()
    packed = pack_takes(user)
    unpack_takes(packed, found)
    assert (found.times, found.items, found.kinds, found.ids) == (user.times, user.items, user.kinds, user.ids)
    assert packed_history(packed) == user.history() and packed_items(packed) == list(items)


def test_a_take_lies_in_the_second_that_its_moment_is_part_of_also_where_an_earlier_build_kept_an_item_twice() -> None:
    user = UserTakes([0.2, 1.5, 2.999], ["a", "b", "c"], bytearray(3), IDS[:3])
    assert packed_takes(pack_takes(user)) == (["a", "b", "c"], [0, 1, 2])
    user.items = ["a", "b", "a"]
    assert packed_takes(pack_takes(user)) == (["b", "a"], [1, 2]) and packed_takes(None) == ([], [])


def test_a_user_without_data_has_no_history() -> None:
    user = UserTakes()
    for nothing in (None, b""):
        unpack_takes(nothing, user)
        assert packed_history(nothing) == packed_items(nothing) == user.items == []


def test_bytes_of_another_layout_are_refused_with_the_way_out_by_whoever_reads_them() -> None:
    packed = b"\x02" + pack_takes(takes("a"))[1:]
    for read in (packed_history, packed_items, lambda raw: without_items(raw, {"a"})):
        with pytest.raises(Misconfigured, match=r"unknown layout .*record --rebuild"):
            read(packed)


def test_taking_items_out_leaves_the_others_with_their_own_times_kinds_and_ids() -> None:
    changed, removed = without_items(pack_takes(takes("a", "b", "c", "d")), {"a", "c", "z"})
    found = UserTakes()
    unpack_takes(changed, found)
    assert (removed, found.items, found.times, found.ids) == (2, ["b", "d"], [1.0, 3.0], [IDS[1], IDS[3]])
    assert list(found.kinds) == [1, 0]
    assert without_items(pack_takes(takes("a", "b")), {"a", "b"}) == (b"", 2)
    assert without_items(pack_takes(takes("a")), {"z"}) == (pack_takes(takes("a")), 0)


def test_only_a_take_is_looked_for_among_the_ids_of_takes() -> None:
    user = UserTakes()
    given = {"length": 5, "remembered": 1}
    assert user.observe(behaviour("e0", "click", item="a", second=1), **given)
    assert user.observe(behaviour("e1", "exposure", item="b", second=2), **given)
    assert user.recent == hash_of("e1")
    assert not user.observe(behaviour("e0", "purchase", item="a", second=3), **given)
    assert not user.observe(behaviour("e1", "exposure", item="b", second=2), **given)
    assert user.history()[0].kind == "click" and user.recent == hash_of("e1")


@pytest.mark.parametrize(("stored", "left"), [(0, [3, 4, 7]), (3, [3, 4, 7]), (4, [4, 7]), (5, [7]), (8, [])])
def test_what_lies_below_the_stored_position_is_left_out(stored: int, left: list[int]) -> None:
    events = [BehaviourRecord(offset, None) for offset in (3, 4, 7)]
    assert [one.offset for one in fresh_part(events, stored=stored)] == left
    assert list(fresh_part([], stored=stored)) == []


def test_a_report_counts_each_record_once_and_names_who_changed() -> None:
    events = [
        event(0, "a", user="u1"), event(1, "a", user="u1"), event(2, "b", user="u2", kind="exposure"),
        BehaviourRecord(3, None), event(4, "c", user="u2", kind="exposure"), event(5, "d", user="u3", kind="purchase"),
        event(6, "d", user="u3", kind="purchase"),
    ]  # fmt: skip
    users = {name: UserTakes() for name in ("u1", "u2", "u3")}
    report, changed, took = apply_batch(users, events, partition=2, next_offset=9, length=5, remembered=5)
    assert (report.partition, report.next_offset, report.takes, report.exposures) == (2, 9, 2, 2)
    assert (report.duplicates, report.broken, report.users, report.stored) == (2, 1, 3, 4)
    assert (changed, took) == ({"u1", "u2", "u3"}, {"u1", "u3"})
    done = skipped(report, replayed=4, erased=6)
    assert (done.replayed, done.erased, done.takes) == (4, 6, 2)


# ---- marks of erased users -------------------------------------------------------------------------------------------


def mark_of(ends: dict[int, int]) -> ErasureMark:
    user = {"user_id": "u", "forgotten_at": "2026-01-01T00:00:00Z", "cluster_id": "cluster-1", "topic_id": "topic-1"}
    return ErasureMark.of(ForgottenUser.model_validate(user | {"ends": ends}))


def test_a_mark_is_read_as_it_was_written_without_partitions_that_were_empty() -> None:
    mark = mark_of({0: 5, 1: 0, 12: 7})
    assert mark.ends == {0: 5, 12: 7} and ErasureMark.parse(mark.dump()) == mark


@pytest.mark.parametrize(
    ("beginnings", "positions", "spent"),
    [
        ({0: 5, 1: 3}, {0: 5, 1: 3}, True),
        ({0: 9, 1: 9}, {0: 9, 1: 9}, True),
        ({0: 4, 1: 3}, {0: 9, 1: 9}, False),
        ({0: 9, 1: 2}, {0: 9, 1: 9}, False),
        ({0: 9, 1: 9}, {0: 4, 1: 9}, False),
        ({0: 9, 1: 9}, {0: 9, 1: 2}, False),
        ({0: 9}, {0: 9, 1: 9}, False),
        ({0: 9, 1: 9}, {0: 9}, False),
    ],
)
def test_a_mark_is_spent_once_log_and_store_are_past_each_of_its_ends(
    beginnings: dict[int, int], positions: dict[int, int], spent: bool
) -> None:
    mark = mark_of({0: 5, 1: 3})
    assert mark.is_spent(LOG, beginnings, positions) is spent
    for other in (TopicIncarnation("cluster-2", LOG.topic, "topic-1"), TopicIncarnation("cluster-1", LOG.topic, "t")):
        assert mark.is_spent(other, {}, {}) and mark.ends_in(other.cluster_id, other.topic_id) == {}


# ---- the order of records of an item ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "time_ms", "partition", "place"),
    [
        (None, 5, 1, place_at(5, 1)),
        (place_at(5, 1), 4, 1, place_at(5, 1)),  # a clock stepped back
        (place_at(5, 1), 6, 1, place_at(6, 1)),
        (place_at(5, 1), 5, 0, None),
        (place_at(5, 1), 5, 2, place_at(5, 2)),
        (place_at(5, 1), 4, 2, None),
        (place_at(5, 1), 6, 0, place_at(6, 0)),
        (place_at(5, 1), 5, 1025, place_at(5, 1025)),  # of 1024 partitions apart: taken for the same one
    ],
)
def test_which_state_of_an_item_is_newer(known: int | None, time_ms: int, partition: int, place: int | None) -> None:
    for is_deleted in (True, False):
        states = {"a": ItemState(time_ms, is_deleted), "b": ItemState(1, is_deleted)}
        found = newer_states(states, {"a": known, "b": place_at(99, partition + 1)}, partition=partition)
        assert found == ({} if place is None else {"a": (place, is_deleted)})


def test_places_are_exact_as_floats_and_ordered_by_time_then_partition() -> None:
    for time_ms in (0, 1_790_000_000_123, LATEST_MS, LATEST_MS + 1, 1 << 62):
        place = place_at(time_ms, 1023)
        assert int(float(place)) == place < 1 << 53
    assert place_at(5) == place_at(5, 0) < place_at(5, 1) < place_at(5, 1023) < place_at(6, 0)
    assert place_at(LATEST_MS + 1, 3) == place_at(LATEST_MS, 3)
