"""What a user's history holds: each item once, at its newest take.

A click, a cart and a purchase of one item are one place of a history, the newest. So are two purchases: a history is of
items, and each further place is a further item. The rule needs neither kinds nor settings, and the newest takes of a
user decide the newest items whatever came before them. So a history that keeps its newest L items alone never lacks one
that a longer history has, and takes in any order lead to the same history.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

ItemT = TypeVar("ItemT", str, int)


def place_of(items: Sequence[ItemT], times: Sequence[float], item: ItemT, at: float) -> tuple[int | None, int | None]:
    """Where a take goes in a history (oldest first), and the place of the item's former take, which is removed first.

    The new place is None if the item's take in the history is newer; of equal times the one that comes last is.
    """
    try:
        former = items.index(item)
    except ValueError:
        return bisect_right(times, at), None
    if times[former] > at:
        return None, former
    return bisect_right(times, at) - 1, former


def newest_only(items: Sequence[ItemT]) -> list[int]:
    """Places of a sequence of takes (oldest first) that its history keeps."""
    newest = {item: place for place, item in enumerate(items)}
    return sorted(newest.values())


def next_takes(user_T: NDArray[np.int64], item_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """For takes in order of time, the position of each user's next take of the same item; T where there is none.

    A history before position p holds the takes before p whose next take is not before p.
    """
    count = len(user_T)
    order = np.lexsort((np.arange(count), item_T, user_T))
    again = (user_T[order][1:] == user_T[order][:-1]) & (item_T[order][1:] == item_T[order][:-1])
    next_T = np.full(count, count, np.int64)
    next_T[order[:-1][again]] = order[1:][again]
    return next_T
