from __future__ import annotations

from base64 import b64encode
from dataclasses import fields, replace

import pytest

from schemas.behaviours import BehaviourKind
from tests.factories.feeding import through_bytes
from tests.factories.samples import DAY0, at, behaviour
from tests.factories.timelines import Timeline
from trainer.samples.id_hashes import id_hashes
from trainer.samples.rows import Impression, Moment, pack_impressions, row_bytes, unpack_impressions


@pytest.fixture
def line() -> Timeline:
    return Timeline()


def test_take_that_names_its_exposure_makes_it_a_positive(line: Timeline) -> None:
    line.second(0, behaviour("x1", item="a"), behaviour("x2", item="b"))
    line.second(3, behaviour("t1", "click", item="b", exposure_id="x2"))
    assert [(row.event_id, row.label) for row in line.end()] == [("x1", 0), ("x2", 1)]


def test_take_without_a_name_answers_the_newest_exposure_of_that_user_and_item(line: Timeline) -> None:
    line.second(0, behaviour("x1", item="a"))
    line.second(2, behaviour("x2", item="a"))
    line.second(3, behaviour("t1", "purchase", item="a"))
    assert [(row.event_id, row.label) for row in line.end()] == [("x1", 0), ("x2", 1)]


def test_take_cannot_answer_another_users_exposure(line: Timeline) -> None:
    line.second(0, behaviour("x1", user="u1", item="a"))
    line.second(1, behaviour("t1", "click", user="u2", item="a", exposure_id="x1"))
    assert [row.label for row in line.end()] == [0]


@pytest.mark.parametrize(("second", "label"), [(10, 1), (11, 0)])
def test_a_take_counts_to_the_last_second_of_the_bound_and_enters_the_history_in_any_case(
    line: Timeline, second: int, label: int
) -> None:
    line.second(0, behaviour("x1", item="a"))
    line.second(second, behaviour("t1", "click", item="a", exposure_id="x1"))
    line.second(12, behaviour("x2", item="b"))
    rows = line.end()
    assert [row.label for row in rows] == [label, 0]
    assert line.history(rows[1]) == ["a"]


def test_rows_of_a_second_see_the_histories_as_they_were_before_it(line: Timeline) -> None:
    line.second(
        0, behaviour("x1", item="a"), behaviour("t1", "click", item="a", exposure_id="x1"), behaviour("x2", item="b")
    )
    line.second(1, behaviour("x3", item="c"))
    rows = line.end()
    assert [line.history(row) for row in rows] == [[], [], ["a"]]


def test_history_is_as_of_the_moment_even_if_the_row_is_resolved_later(line: Timeline) -> None:
    line.second(0, behaviour("x1", item="a"))
    line.second(2, behaviour("t9", "click", item="z"))
    assert [line.history(row) for row in line.end()] == [[]]


def test_history_keeps_the_newest_and_a_trigger_stands_last(line: Timeline) -> None:
    for n, item in enumerate("abcd"):
        line.second(n, behaviour(f"t{n}", "click", item=item))
    line.second(9, behaviour("x1", item="q", trigger_item="look"), behaviour("x2", item="r"))
    first, second = line.end()
    assert line.history(first) == ["c", "d", "look"]
    assert [at - DAY0 for at in first.history_seconds] == [2, 3, 9]
    assert line.history(second) == ["b", "c", "d"]


def test_retaken_marks_items_that_the_user_already_took(line: Timeline) -> None:
    line.second(0, behaviour("t1", "click", item="a"))
    line.second(1, behaviour("x1", item="a"), behaviour("x2", item="b"))
    assert [row.retaken for row in line.end()] == [True, False]


def test_users_beyond_the_bound_are_forgotten_oldest_first() -> None:
    line = Timeline(max_users=2)
    for n, user in enumerate(["u1", "u2", "u1", "u3"]):
        line.second(n, behaviour(f"t{n}", "click", user=user, item=f"i{n}"))
    line.second(9, *(behaviour(f"x{user}", user=user, item="b") for user in ("u1", "u2", "u3")))
    assert [line.history(row) for row in line.end()] == [["i0", "i2"], [], ["i3"]]


def test_an_exposure_keeps_what_the_log_says_of_it_and_where_it_stands(line: Timeline) -> None:
    line.second(0, behaviour("x0", item="z"))
    searched = {"query_text": "red", "query_image": b64encode(b"photo").decode(), "defines_publish": True}
    line.second(1, behaviour("x1", item="a", **searched))
    plain, row = line.end()
    assert (row.event_id, row.user_id, row.second - DAY0, row.partition, row.offset) == ("x1", "u1", 1, 0, 1)
    assert (row.query_text, row.query_image, row.defines_publish) == ("red", b"photo", True)
    assert (plain.query_text, plain.query_image, plain.defines_publish, plain.draw) == (None, None, False, 0)


@pytest.mark.parametrize(
    "kinds", [("click", "purchase"), ("purchase", "click"), ("cart", "purchase"), ("click", "click")]
)
def test_the_most_reliable_kind_that_came_in_time_stays(line: Timeline, kinds: tuple[str, str]) -> None:
    line.second(0, behaviour("x1", item="a"))
    for second, kind in enumerate(kinds, 1):
        line.second(second, behaviour(f"t{second}", kind, item="a", exposure_id="x1"))
    (row,) = line.end()
    assert row.taken_as == ("purchase" if "purchase" in kinds else "click")


def test_a_take_that_names_an_exposure_of_another_item_does_not_answer_it(line: Timeline) -> None:
    line.second(0, behaviour("x1", item="a"), behaviour("x2", item="b"))
    line.second(1, behaviour("t1", "click", item="b", exposure_id="x1"))
    assert [row.label for row in line.end()] == [0, 0]


def test_takes_of_a_second_enter_the_history_in_their_order(line: Timeline) -> None:
    line.second(0, *(behaviour(f"t{name}", "click", item=name) for name in "cab"))
    line.second(1, behaviour("x1", item="q"))
    assert line.history(line.end()[0]) == ["a", "b", "c"]


def test_what_is_resolved_or_forgotten_frees_only_its_own_name(line: Timeline) -> None:
    """Ids of two users' events may be the same, and a user meets an item twice."""
    line.second(0, behaviour("x", user="u1", item="a"), behaviour("y", user="u3", item="a"))
    line.second(5, behaviour("x", user="u2", item="a"), behaviour("z", user="u3", item="a"))
    line.second(12, behaviour("t1", "click", user="u2", item="a", exposure_id="x"))  # the first second is resolved
    line.second(13, behaviour("t2", "click", user="u3", item="a"))
    assert [(row.user_id, row.event_id, row.label) for row in line.end()] == [
        ("u1", "x", 0), ("u3", "y", 0), ("u2", "x", 1), ("u3", "z", 1),
    ]  # fmt: skip


def test_a_forgotten_user_leaves_no_history_and_no_exposure_that_could_be_answered(line: Timeline) -> None:
    line.second(0, behaviour("t0", "click", item="a"))
    line.second(1, behaviour("x1", item="b"), behaviour("x2", user="u2", item="b"))
    assert [row.event_id for row in line.join.forget("u1")] == ["x1"]
    line.second(2, behaviour("t1", "click", item="b", exposure_id="x1"), behaviour("t2", "click", item="b"))
    line.second(3, behaviour("x3", item="c"))
    rows = line.end()
    assert [(row.event_id, row.label) for row in rows] == [("x2", 0), ("x3", 0)]
    assert line.history(rows[1]) == ["b"]


def rows_of_all_fields() -> list[Impression]:
    """One with another value in each field than the default, one with none, one with an empty picture."""
    full = Impression(
        event_id="e", partition=1, offset=2, second=3, user_id="u", item=4, history=(5, 6), history_seconds=(7, 8),
        retaken=True, defines_publish=True, label=1, taken_as=BehaviourKind.CART, query_text="words",
        query_image=b"photo", query=12, correction=True, value=13.5, taken_before=BehaviourKind.CLICK,
        exposure_id="x", draw=9,
        drawn_from=10, drawn_second=11, moment=Moment(b"four"),
    )  # fmt: skip
    bare = Impression("f", 0, 0, 0, "v", 1, (), (), False, False)
    assert all(getattr(full, one.name) != getattr(bare, one.name) for one in fields(Impression))
    return [full, bare, replace(bare, query_text="", query_image=b"", taken_as=BehaviourKind.CLICK), full]


def test_rows_come_back_from_a_checkpoint_with_every_field() -> None:
    found = unpack_impressions(through_bytes(pack_impressions(rows_of_all_fields())))
    assert found == rows_of_all_fields()
    assert [row.moment.features for row in found] == [b"four", b"", b"", b"four"]
    assert unpack_impressions(through_bytes(pack_impressions([]))) == []


def test_a_row_stands_for_an_event_of_the_log_unless_it_corrects_or_was_drawn() -> None:
    bare = rows_of_all_fields()[1]
    assert bare.own_event and bare.shown_as == "f"
    assert not replace(bare, correction=True).own_event and not replace(bare, draw=1).own_event
    assert replace(bare, exposure_id="x").shown_as == "x"
    assert row_bytes(replace(bare, history=(1, 2), query_image=b"abc")) == row_bytes(bare) + 2 * 16 + 3


def test_a_join_restored_anywhere_goes_on_as_the_one_that_was_not() -> None:
    events = [
        (0, behaviour("t0", "click", item="z")),
        (1, behaviour("x1", item="a", trigger_item="look")),
        (2, behaviour("x2", user="u2", item="a")),
        (3, behaviour("x3", item="b")),
        (8, behaviour("t1", "click", item="a")),
        (9, behaviour("t2", "cart", user="u2", item="a", exposure_id="x2")),
        (12, behaviour("x4", item="c")),
    ]

    def run(cut: int) -> list[Impression]:
        line = Timeline(max_users=2)
        for number, (second, event) in enumerate(events):
            if number == cut:
                state, before = line.join.snapshot(), line
                line = Timeline(max_users=2)
                line.catalogue, line.rows, line.offset = before.catalogue, before.rows, before.offset
                line.join = before.rules.join(line.catalogue)
                line.join.restore(through_bytes(state))
                assert (line.join.waiting, line.join.waiting_bytes) == (before.join.waiting, before.join.waiting_bytes)
            line.second(second, event)
        assert line.join.waiting == 3
        return line.end()

    whole = run(-1)
    assert [row.label for row in whole] == [1, 1, 0, 0]
    assert all(run(cut) == whole for cut in range(1, len(events)))


def test_a_trigger_item_ends_the_history_of_its_row_and_counts_as_no_earlier_take(line: Timeline) -> None:
    line.second(0, behaviour("x1", item="a", trigger_item="a"), behaviour("x2", item="a"))
    line.second(1, behaviour("t1", "click", item="b"))
    line.second(2, behaviour("x3", item="c", trigger_item="c"))
    rows = line.end()
    assert [(line.history(row), row.retaken) for row in rows] == [(["a"], False), ([], False), (["b", "c"], False)]


def in_use(line: Timeline) -> set[str]:
    return {line.catalogue.item_id(item) for item in line.join.items_in_use()}


def test_items_are_in_use_while_a_history_a_row_or_one_that_can_be_corrected_names_them() -> None:
    times = {"correction_seconds": 20, "cart_correction_seconds": 0, "purchase_correction_seconds": 0}
    line = Timeline(history_length=1, correction_megabytes=1, **times)
    line.second(0, behaviour("t0", "click", item="a"))
    line.second(1, behaviour("x1", item="b"))
    line.second(2, behaviour("t1", "click", item="c"))
    assert in_use(line) == {"a", "b", "c"}
    line.second(31, behaviour("x2", user="u2", item="z"))
    assert line.join.unresolved == 1 and in_use(line) == {"a", "b", "c", "z"}
    line.second(32, behaviour("x3", user="u2", item="y"))  # 10 and 20 seconds are over
    assert in_use(line) == {"c", "z", "y"}


def test_items_are_in_use_while_exposures_may_be_drawn_from_their_takes() -> None:
    line = Timeline(draw_exposures=2, draw_window_seconds=20, max_users=1)
    line.second(0, behaviour("t0", "click", user="o", item="a"))
    line.second(1, behaviour("t1", "click", item="b"))
    line.second(20, behaviour("x1", item="c"))
    assert in_use(line) == {"a", "b", "c"}
    line.second(21, behaviour("x2", item="c"))
    assert in_use(line) == {"b", "c"}


def test_what_waited_of_a_forgotten_user_takes_no_memory_and_answers_no_take() -> None:
    line = Timeline(draw_exposures=1, draw_window_seconds=20)
    line.second(0, behaviour("x1", item="a"), behaviour("x2", user="u2", item="a"))
    before = line.join.waiting_bytes
    line.join.forget("u1")
    assert (line.join.unresolved, line.join.waiting_bytes) == (1, before // 2)
    line.second(1, behaviour("t1", "click", item="a"))
    assert [(row.event_id, row.label, row.draw) for row in line.end()] == [("x2", 0, 0), ("t1", 1, 1)]
    assert line.join.waiting_bytes == 0


def restarted(line: Timeline) -> None:
    join = line.rules.join(line.catalogue)
    join.restore(through_bytes(line.join.snapshot()))
    line.join = join


@pytest.mark.parametrize("restart", [False, True])
def test_after_a_restart_too_the_user_inactive_for_longest_is_forgotten(restart: bool) -> None:
    line = Timeline(max_users=2)
    for second, user in enumerate(("u1", "u2", "u3", "u4")):  # the last one lies where the first one did
        line.second(second, behaviour(f"t{second}", "click", user=user, item=f"i{second}"))
    if restart:
        restarted(line)
    line.second(4, behaviour("t4", "click", user="u5", item="i4"))
    line.second(5, *(behaviour(f"x{user}", user=user, item="b") for user in ("u3", "u4", "u5")))
    assert [line.history(row) for row in line.end()] == [[], ["i3"], ["i4"]]


def test_takes_are_numbered_on_after_a_restart_although_the_newest_one_was_forgotten() -> None:
    line = Timeline()
    for second, user in enumerate(("u1", "u2")):
        line.second(second, behaviour(f"t{second}", "click", user=user, item="a"))
    line.join.forget("u2")
    before = line.join.snapshot().values
    restarted(line)
    assert line.join.snapshot().values == before and before["next_take"] == 2


def test_a_drawn_exposure_names_the_second_in_which_its_source_was_taken(line: Timeline) -> None:
    line.second(4, behaviour("x1", item="a", drawn_from="t9", drawn_at=at(2.9)), behaviour("x2", item="b"))
    drawn, shown = line.end()
    assert (drawn.drawn_second, drawn.drawn_from) == (DAY0 + 2, id_hashes("t9")[0])
    assert (shown.drawn_second, shown.drawn_from) == (0, 0)
