"""Takes that wait to be counted: how many may, and what is counted when they are more."""

from __future__ import annotations

import pytest

from tests.factories.feeding import through_bytes
from trainer.online.uncounted_takes import UncountedTakes
from trainer.samples.rows import Take


def waiting(*seconds: int) -> UncountedTakes:
    takes = UncountedTakes()
    takes.add(Take(second, f"u{n}", n + 1, 100 + n, announces=n % 2 == 1) for n, second in enumerate(seconds))
    return takes


@pytest.mark.parametrize(
    ("seconds", "most", "before"),
    [
        ((1, 1, 2, 3, 3), 5, None),
        ((1, 1, 2, 3, 3), 4, 3),
        ((1, 1, 2, 3, 3), 2, 2),
        ((1, 1, 2, 3, 3), 1, 2),
        ((1, 1, 1), 1, None),
        ((), 0, None),
    ],
)
def test_whole_seconds_are_due_once_more_takes_wait_than_may(
    seconds: tuple[int, ...], most: int, before: int | None
) -> None:
    assert waiting(*seconds).due(most) == before


def test_takes_of_earlier_seconds_leave_with_all_that_is_known_of_them_also_after_a_restart() -> None:
    again = UncountedTakes()
    again.restore(through_bytes(waiting(1, 2, 3, 3).snapshot().frozen()))
    for takes in (waiting(1, 2, 3, 3), again):
        counted = takes.pop(3)
        assert (counted.item_T.tolist(), counted.second_T.tolist()) == ([1, 2], [1, 2])
        assert (counted.event_T.tolist(), counted.announces_T.tolist()) == ([100, 101], [False, True])
        assert list(takes.items()) == [3, 4] and len(set(counted.user_T.tolist())) == 2
        takes.forget("u3")
        assert list(takes.items()) == [3]
