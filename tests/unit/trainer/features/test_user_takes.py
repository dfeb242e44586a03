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
    none = np.zeros(len(events), np.uint32)
    takes.remember(np.array(events), np.full(len(events), 5), np.ones(len(events), bool), none, none)


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


def test_of_too_many_users_the_idle_go_of_equally_idle_ones_the_smallest_and_none_of_the_same_step() -> None:
    takes = UserTakes(FeatureConfig(max_users=16))

    def left_after(second: int, *users: int) -> set[int]:
        takes.add(np.array(users), np.full(len(users), 7, np.uint32), np.full(len(users), second))
        return set(takes.snapshot().arrays["takes.user"].tolist()) - {0}

    for user in range(16, 0, -1):  # the smallest took last
        left_after(100 - user, user)
    left_after(200, 16)
    assert left_after(201, 99) == {*range(1, 15), 16, 99}, "a user who took again is not idle"
    left_after(300, *range(1, 15))
    assert left_after(301, 98) == {*range(1, 15), 98, 99}
    assert left_after(302, 97) == {*range(1, 15), 97, 98}
    assert left_after(303, 96) == {*range(2, 15), 96, 97, 98}
    assert left_after(304, 2, 95) == {2, *range(4, 15), 95, 96, 97, 98}
