from __future__ import annotations

from tests.unit.trainer_factories import DAY0, DIM, behaviour
from trainer.catalogue import Catalogue
from trainer.impressions import Impression, ImpressionJoin
from trainer.window import Observed


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
        self.join.add_second(sorted(observed, key=lambda event: event.order))

    def end(self) -> list[Impression]:
        self.rows += self.join.resolved(float("inf"))
        return self.rows

    def history(self, row: Impression) -> list[str]:
        return [self.catalogue.item_id(item) for item in row.history]


def test_take_that_names_its_exposure_makes_it_a_positive() -> None:
    line = Timeline()
    line.second(0, behaviour("x1", item="a"), behaviour("x2", item="b"))
    line.second(3, behaviour("t1", "click", item="b", exposure_id="x2"))
    assert [(row.event_id, row.label) for row in line.end()] == [("x1", 0), ("x2", 1)]


def test_take_without_a_name_answers_the_newest_exposure_of_that_user_and_item() -> None:
    line = Timeline()
    line.second(0, behaviour("x1", item="a"))
    line.second(2, behaviour("x2", item="a"))
    line.second(3, behaviour("t1", "purchase", item="a"))
    assert [(row.event_id, row.label) for row in line.end()] == [("x1", 0), ("x2", 1)]


def test_take_cannot_answer_another_users_exposure() -> None:
    line = Timeline()
    line.second(0, behaviour("x1", user="u1", item="a"))
    line.second(1, behaviour("t1", "click", user="u2", item="a", exposure_id="x1"))
    assert [row.label for row in line.end()] == [0]


def test_take_after_the_attribution_bound_leaves_a_negative_and_enters_the_history() -> None:
    line = Timeline()
    line.second(0, behaviour("x1", item="a"))
    line.second(11, behaviour("t1", "click", item="a", exposure_id="x1"))
    line.second(12, behaviour("x2", item="b"))
    rows = line.end()
    assert [row.label for row in rows] == [0, 0]
    assert line.history(rows[1]) == ["a"]


def test_rows_of_a_second_see_the_histories_as_they_were_before_it() -> None:
    line = Timeline()
    line.second(
        0,
        behaviour("x1", item="a"),
        behaviour("t1", "click", item="a", exposure_id="x1"),
        behaviour("x2", item="b"),
    )
    line.second(1, behaviour("x3", item="c"))
    rows = line.end()
    assert [line.history(row) for row in rows] == [[], [], ["a"]]


def test_history_is_as_of_the_moment_even_if_the_row_is_resolved_later() -> None:
    line = Timeline()
    line.second(0, behaviour("x1", item="a"))
    line.second(2, behaviour("t9", "click", item="z"))
    assert [line.history(row) for row in line.end()] == [[]]


def test_history_keeps_the_newest_and_a_trigger_stands_last() -> None:
    line = Timeline()
    for n, item in enumerate("abcd"):
        line.second(n, behaviour(f"t{n}", "click", item=item))
    line.second(9, behaviour("x1", item="q", trigger_item="look"), behaviour("x2", item="r"))
    first, second = line.end()
    assert line.history(first) == ["c", "d", "look"]
    assert line.history(second) == ["b", "c", "d"]


def test_retaken_marks_items_that_the_user_already_took() -> None:
    line = Timeline()
    line.second(0, behaviour("t1", "click", item="a"))
    line.second(1, behaviour("x1", item="a"), behaviour("x2", item="b"))
    assert [row.retaken for row in line.end()] == [True, False]


def test_users_beyond_the_bound_are_forgotten_oldest_first() -> None:
    line = Timeline(max_users=2)
    for n, user in enumerate(["u1", "u2", "u1", "u3"]):
        line.second(n, behaviour(f"t{n}", "click", user=user, item="a"))
    assert [bool(line.join.taken_by(user)) for user in ("u1", "u2", "u3")] == [True, False, True]
