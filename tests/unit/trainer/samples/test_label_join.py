from __future__ import annotations

import pytest

from tests.factories.samples import DAY0, DIM, behaviour
from trainer.samples.catalogue import Catalogue
from trainer.samples.label_join import ImpressionJoin
from trainer.samples.rows import Impression
from trainer.samples.window import Observed


class Timeline:
    """Feeds a join with seconds, as the window would."""

    def __init__(self, **over: float) -> None:
        values = {"history_length": 3, "attribution_seconds": 10, "max_users": 100} | over
        self.catalogue = Catalogue(DIM)
        self.join = ImpressionJoin(self.catalogue, **values)  # type: ignore[arg-type]
        self.rows: list[Impression] = []

    def second(self, second: int, *events: object) -> None:
        observed = [Observed(0, 0, DAY0 + second, event) for event in events]  # type: ignore[arg-type]
        self.rows += self.join.resolved(DAY0 + second)
        if observed:
            self.join.add_second(sorted(observed, key=lambda event: event.order))

    def end(self) -> list[Impression]:
        self.rows += self.join.resolved(float("inf"))
        return self.rows

    def history(self, row: Impression) -> list[str]:
        return [self.catalogue.item_id(item) for item in row.history]


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
        line.second(n, behaviour(f"t{n}", "click", user=user, item="a"))
    line.second(9, *(behaviour(f"x{user}", user=user, item="b") for user in ("u1", "u2", "u3")))
    assert [line.history(row) for row in line.end()] == [["a", "a"], [], ["a"]]


def corrected(line: Timeline) -> list[str]:
    return [row.event_id for row in line.join.corrections()]


def test_a_late_take_brings_its_exposure_once_more_as_taken_with_the_history_of_then() -> None:
    line = Timeline(correction_seconds=100, correction_rows=10)
    line.second(0, behaviour("t0", "click", item="z"))
    line.second(1, behaviour("x1", item="a"))
    line.second(2, behaviour("t1", "click", item="y"))
    line.second(50, behaviour("late", "purchase", item="a", exposure_id="x1"))
    (row,) = line.join.corrections()
    assert (row.event_id, row.second - DAY0, row.label, row.correction) == ("late", 1, 1, True)
    assert line.history(row) == ["z"] and row.taken_as == "purchase"
    assert [(row.event_id, row.label) for row in line.end()] == [("x1", 0)]
    line.second(51, behaviour("again", "purchase", item="a", exposure_id="x1"))
    assert corrected(line) == []  # once


def test_a_take_that_is_too_late_of_another_user_or_of_what_was_taken_corrects_nothing() -> None:
    line = Timeline(correction_seconds=100, correction_rows=10)
    line.second(0, behaviour("x1", item="a"))
    line.second(3, behaviour("t1", "click", item="a", exposure_id="x1"))
    line.second(4, behaviour("x2", item="b"))
    line.second(30, behaviour("t2", "cart", item="a"))
    line.second(31, behaviour("t3", "cart", user="u2", item="b", exposure_id="x2"))
    line.second(115, behaviour("t4", "cart", item="b"))
    assert corrected(line) == []


def test_what_can_be_corrected_is_bounded_and_goes_with_its_user() -> None:
    line = Timeline(correction_seconds=1000, correction_rows=1)
    for second, item in enumerate("ab"):
        event = behaviour(f"x{second}", item=item, second=second)
        line.rows += line.join.resolved(DAY0 + second)
        line.join.add_second([Observed(0, second, DAY0 + second, event)])
    line.second(50, behaviour("t1", "cart", item="a"))
    assert corrected(line) == []
    line.second(51, behaviour("t2", "cart", item="b"))
    assert corrected(line) == ["t2"]
    line.second(60, behaviour("x3", item="c"))
    line.second(90)
    line.join.forget("u1")
    line.second(91, behaviour("t3", "cart", item="c"))
    assert corrected(line) == []
