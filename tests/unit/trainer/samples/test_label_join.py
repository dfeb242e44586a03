from __future__ import annotations

import pytest

from tests.factories.samples import behaviour
from tests.factories.timelines import Timeline


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


def test_take_after_the_attribution_bound_leaves_a_negative_and_enters_the_history(line: Timeline) -> None:
    line.second(0, behaviour("x1", item="a"))
    line.second(11, behaviour("t1", "click", item="a", exposure_id="x1"))
    line.second(12, behaviour("x2", item="b"))
    rows = line.end()
    assert [row.label for row in rows] == [0, 0]
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
