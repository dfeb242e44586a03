"""Features that compare a target with the user's latest takes, as of the impression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.offline.as_of import Columns, DrawnFrom, ItemFacts, ItemTakes, Takes
from trainer.offline.data import Histories, ImpressionColumns
from trainer.offline.event_index import EventIndex

HISTORY = 50
"""Number of the user's latest items that the target is compared with."""
HALF_LIFE = 5.0
"""Half-life of the weight of an earlier item, in items."""
_ROWS_PER_PASS = 32_768

# N = impressions, T = takes, P = (impression, history item) pairs of one pass

Summed = Callable[[NDArray[Any]], NDArray[np.float64]]


class CoOccurrence:
    """Pairs of items taken by one user, counted from the later take on; each take with the `HISTORY` before it."""

    def __init__(self, takes: Takes, items: ItemFacts) -> None:
        self._items = len(items.category_I)
        self._counted_T = ~takes.announces_T & ~items.unpaired_I[takes.item_T]
        counted = np.flatnonzero(self._counted_T)
        order = counted[np.lexsort((takes.second_T[counted], takes.user_T[counted]))]
        user, item, second = takes.user_T[order], takes.item_T[order], takes.second_T[order]
        keys, seconds = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for back in range(1, HISTORY + 1):
            both = np.flatnonzero(user[back:] == user[:-back])
            if not len(both):
                break
            keys.append(self._pair(item[both], item[both + back]))
            seconds.append(second[both + back])
        self._pairs = EventIndex(np.concatenate(keys), np.concatenate(seconds))
        self._takes = EventIndex(user * self._items + item, second)
        self._taken = order
        self._place_T = np.zeros(len(takes.user_T), np.int64)
        self._place_T[order] = np.arange(len(order))

    def count(
        self, one_P: NDArray[np.int64], other_P: NDArray[np.int64], second_P: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Number of such pairs before the second."""
        return self._pairs.count(self._pair(one_P, other_P), second_P).astype(np.float64)

    def of_source(
        self,
        take_P: NDArray[np.int64],
        user_P: NDArray[np.int64],
        other_P: NDArray[np.int64],
        second_P: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """1 where such a pair consists of this take and another of its user, taken before the second; else 0."""
        other_take = self._takes.newest(user_P * self._items + other_P, second_P)
        known = (other_take >= 0) & self._counted_T[take_P]
        other_place = self._place_T[self._taken[np.maximum(other_take, 0)]] if len(self._taken) else 0
        apart = np.abs(self._place_T[take_P] - other_place)
        return np.asarray(known & (apart > 0) & (apart <= HISTORY), np.float64)

    def _pair(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.minimum(one, other).astype(np.int64) * self._items + np.maximum(one, other)


def history_features(
    rows: ImpressionColumns,
    histories: Histories,
    takes: Takes,
    items: ItemFacts,
    of_item: ItemTakes,
    sources: DrawnFrom,
) -> Columns:
    """Category, facets and numbers of the target beside the history's, and their co-occurrence with it."""
    co_occurrence = CoOccurrence(takes, items)
    own_N = of_item.count()

    def one_pass(start: int) -> Columns:
        chunk = np.arange(start, min(start + _ROWS_PER_PASS, len(rows)))
        return _one_pass(rows, chunk, histories, items, of_item.index, own_N[chunk], co_occurrence, sources)

    passes = [one_pass(start) for start in range(0, max(1, len(rows)), _ROWS_PER_PASS)]
    return {name: np.concatenate([one[name] for one in passes]) for name in passes[0]}


def _one_pass(
    rows: ImpressionColumns,
    chunk: NDArray[np.int64],
    histories: Histories,
    items: ItemFacts,
    of_item: EventIndex,
    own_N: NDArray[np.int64],
    co_occurrence: CoOccurrence,
    sources: DrawnFrom,
) -> Columns:
    row_P, place_P, back_P = histories.newest(rows.history_start_N[chunk], rows.history_stop_N[chunk], HISTORY)
    history_P = histories.item_T[place_P].astype(np.int64)
    target_P, second_P = rows.item_N[chunk][row_P], rows.second_N[chunk][row_P]
    weight_P = np.exp2(-back_P / HALF_LIFE)
    n = len(chunk)

    def summed(values_P: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(row_P, values_P, minlength=n).astype(np.float64)

    weight_N = np.maximum(summed(weight_P), 1e-9)
    category_P = items.category_I[history_P]
    same_P = ((category_P == items.category_I[target_P]) & (category_P > 0)).astype(float)
    columns: Columns = {
        "category recent": summed(same_P * weight_P) / weight_N,
        "category newest": summed(same_P * (back_P == 0)),
    }
    for name, facet in items.facets.items():
        shared_P = facet.shared(target_P, history_P)
        columns[f"{name} shared"] = summed(shared_P * weight_P) / weight_N
        columns[f"{name} share"] = summed(shared_P) / np.maximum(summed(np.ones(len(row_P))), 1)
    for name, values_I in items.numbers_I.items():
        if np.isfinite(values_I).any():
            columns |= _number_features(name, values_I, target_P, history_P, weight_P, rows.item_N[chunk], summed)
    count_P = co_occurrence.count(target_P, history_P, second_P)
    drawn = np.flatnonzero(sources.second_N[chunk][row_P] < second_P)
    source = chunk[row_P[drawn]]
    count_P[drawn] -= co_occurrence.of_source(
        sources.take_N[source], sources.user_N[source], history_P[drawn], second_P[drawn]
    )
    other_P = of_item.count(history_P, second_P)
    own_P = own_N[row_P]
    near_P = count_P / np.sqrt((own_P + 2.0) * (other_P + 2.0))
    columns |= {
        "together": np.log1p(summed(count_P)),
        "together most": np.log1p(largest(row_P, count_P, n)),
        "together near": summed(near_P * weight_P) / weight_N,
        "together nearest": largest(row_P, near_P, n),
        "together lift": np.log(
            (summed(count_P) + 0.5) / (summed(np.sqrt((own_P + 1.0) * (other_P + 1.0))) + 1.0),
        ),
    }
    return columns


def _number_features(
    name: str,
    values_I: NDArray[np.float64],
    target_P: NDArray[np.int64],
    history_P: NDArray[np.int64],
    weight_P: NDArray[np.float64],
    target_N: NDArray[np.int64],
    summed: Summed,
) -> Columns:
    known_P = np.isfinite(values_I[history_P]) & np.isfinite(values_I[target_P])
    weight_P = weight_P * known_P
    total_N = summed(weight_P)
    has_N = total_N > 0
    mean_N = summed(np.nan_to_num(values_I[history_P]) * weight_P) / np.maximum(total_N, 1e-9)
    away_P = np.where(known_P, np.abs(values_I[history_P] - values_I[target_P]), 0.0)
    return {
        f"{name} against history": np.where(has_N, np.nan_to_num(values_I[target_N]) - mean_N, 0.0),
        f"{name} away from history": np.where(has_N, summed(away_P * weight_P) / np.maximum(total_N, 1e-9), 0.0),
        f"{name} of history": np.where(has_N, mean_N, 0.0),
    }


def largest(row_P: NDArray[np.int64], values_P: NDArray[Any], n: int) -> NDArray[np.float64]:
    """Largest value per row, 0 where there is none; `row_P` is sorted."""
    found = np.zeros(n)
    if len(row_P):
        first = np.flatnonzero(np.concatenate([[True], row_P[1:] != row_P[:-1]]))
        found[row_P[first]] = np.maximum.reduceat(values_P, first)
    return found
