"""The newest takes of users: which take a drawn exposure may name, and with what that take was paired."""

from __future__ import annotations

import numpy as np

from trainer.features.config import FeatureConfig
from trainer.features.user_takes import UserTakes


def taken(takes: UserTakes, *pairs: tuple[int, int]) -> None:
    """Takes of user 5, given as (item, second)."""
    items, seconds = np.array(pairs, np.int64).T
    takes.add(np.full(len(pairs), 5), items.astype(np.uint32), seconds)


def remember(takes: UserTakes, *events: int) -> None:
    takes.remember(np.array(events), np.full(len(events), 5), np.ones(len(events), bool))


def test_the_newest_takes_are_remembered_also_where_more_come_at_once_and_one_comes_again() -> None:
    takes = UserTakes(FeatureConfig(remembered_takes=3))
    taken(takes, (1, 0))
    remember(takes, 11, 12, 13, 14)
    assert takes.rows_of([11, 12, 13, 14]).tolist() == [0, 1, 1, 1]
    remember(takes, 14, 15)
    remember(takes, 16)  # in the place that 14 had first
    assert takes.rows_of([12, 13, 14, 15, 16]).tolist() == [0, 0, 1, 1, 1]


def test_a_take_is_paired_with_the_others_of_its_user_while_it_is_among_the_newest() -> None:
    takes = UserTakes(FeatureConfig(history_length=2))

    def beside(item: int, second: int) -> set[int]:
        (found,) = takes.beside(np.array([1]), np.array([item], np.uint32), np.array([second]))
        return set(found.tolist()) - {0}

    taken(takes, (7, 0), (8, 1))
    assert beside(7, 0) == {8} and beside(8, 1) == {7}
    taken(takes, (7, 2))
    assert beside(7, 2) == {8} and beside(7, 0) == set(), "another take of the same item"
    taken(takes, (9, 3))
    assert beside(8, 1) == set()
