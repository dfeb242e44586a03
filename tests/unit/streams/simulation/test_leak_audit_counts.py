"""What a row may know of the takes of its item, take by take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from schemas.behaviours import Behaviour
from streams.simulation.leak_audit import LeakAudit
from tests.factories.samples import DAY0, at, behaviour
from trainer.samples.partition_merge import Entry
from trainer.samples.rows import Impression


class Audited:
    """An audit of rows that know nothing but the takes of their item."""

    def __init__(self, *, drawn_here: bool = True) -> None:
        self.audit = LeakAudit(["other", "takes"], drawn_here=drawn_here)
        catalogue: Any = SimpleNamespace(item_id=lambda number: f"i{number}")
        self.audit.catalogue = catalogue

    def hear(self, events: Sequence[Behaviour]) -> None:
        entries = [Entry(0, n, 0.0, event) for n, event in enumerate(events)]
        assert list(self.audit.hear(entries)) == entries

    def row(self, second: int, known: float, *, event: str = "x", correction: bool = False) -> list[str]:
        """A step of one row that knows so many takes; what was found by then."""
        row = Impression(
            event, 0, 0, DAY0 + second, "u", 1, (), (), retaken=False, defines_publish=False, label=0,
            correction=correction,
        )  # fmt: skip
        batch: Any = SimpleNamespace(dense_BF=torch.tensor([[9.0, math.log1p(known)]]))
        self.audit.observe([row], batch)
        return self.audit.found


def click(name: str, second: float, **more: object) -> Behaviour:
    return behaviour(name, "click", item="i1", second=second, **more)


def test_each_take_before_the_step_before_counts_once_and_one_that_announces_its_item_in_no_row() -> None:
    audited = Audited()
    taken = click("t", 50)
    audited.hear([taken, taken, click("a", 20, defines_publish=True), click("later", 100)])
    assert audited.row(100, 0) == [] and audited.row(110, 1) == []
    assert audited.row(120, 9, correction=True) == []
    assert audited.row(130, 2) == []
    assert len(audited.row(140, 3)) == 1


@pytest.mark.parametrize(("known", "found"), [(1, 0), (2, 1)])
def test_the_take_that_a_row_was_drawn_from_is_left_out(known: int, found: int) -> None:
    audited = Audited()
    audited.hear([click("t", 50), click("s", 60), behaviour("x", item="i1", drawn_from="s", drawn_at=at(60))])
    assert audited.row(100, 0, event="first") == []
    assert len(audited.row(110, known)) == found


@pytest.mark.parametrize(("drawn_here", "found"), [(True, 1), (False, 0)])
def test_drawn_exposures_name_their_takes_where_the_replay_drew_them(drawn_here: bool, found: int) -> None:
    audited = Audited(drawn_here=drawn_here)
    audited.hear([behaviour("s3-n5-1"), behaviour("s3-s5")])
    assert len(audited.audit.found) == found


def test_takes_of_the_same_second_as_the_newest_row_are_not_known_and_an_older_step_sets_nothing_back() -> None:
    audited = Audited()
    audited.hear([click("t", 99.5), click("s", 105)])
    assert audited.row(100, 0) == []
    assert audited.row(110, 1) == [], "a take at 99.5 is of second 99"
    assert audited.row(101, 2) == []
    assert audited.row(130, 2) == [], "the newest second stays 110"


def test_a_row_that_knows_a_take_of_its_own_second_is_told_from_one_that_knows_the_step_before() -> None:
    audited = Audited()
    audited.hear([click("t", 100)])
    assert audited.row(100, 1) == ["1 rows know takes of their own second or a later one"]
    assert audited.row(101, 1)[1:] == ["1 rows know takes since the step before"]


@pytest.mark.parametrize(("known", "found"), [(1002, 0), (1003, 1)])
def test_of_many_takes_a_share_may_be_rounded_away(known: int, found: int) -> None:
    audited = Audited()
    audited.hear([click(f"t{n}", 50) for n in range(1000)])
    assert audited.row(100, 0) == []
    assert len(audited.row(110, known)) == found
