"""Features of an impression as of its moment. Each sees only takes strictly before the impression's second.

The take from which an item's publish time was inferred stands for the publication and counts in no popularity, rating
or pair: otherwise "no take yet" would name exactly these takes, and the feature would give the label away. For the same
reason the age of such an item is unknown until it was taken once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.offline.data import CtrData, Histories, ImpressionColumns
from trainer.offline.facets import Facet
from trainer.offline.past import Past

HOUR, DAY = 3_600, 86_400
WINDOWS = {"1h": HOUR, "6h": 6 * HOUR, "1d": DAY, "3d": 3 * DAY, "7d": 7 * DAY, "30d": 30 * DAY}
HISTORY = 50
"""Latest takes of a user that features compare the target with."""
_HALF_LIFE = 5.0
"""Of the weight of an earlier take, counted in takes."""
_SHRINK = 5.0
"""Ratings of a user or item are pulled to the mean as if by this many average ones."""
_ROWS_PER_PASS = 32_768

# N = impressions, T = takes, P = (impression, history item) pairs of one pass


@dataclass(frozen=True, eq=False)
class Takes:
    """Everything that was taken, in any order; items are numbered from 1."""

    user_T: NDArray[np.int64]
    item_T: NDArray[np.int64]
    second_T: NDArray[np.int64]
    rating_T: NDArray[np.float64] | None
    """Where takes are ratings."""
    announces_T: NDArray[np.bool_]
    """The item's publish time was inferred from this take."""


@dataclass(frozen=True, eq=False)
class ItemFacts:
    """What features need of items; row 0 is padding."""

    published_I: NDArray[np.int64]
    inferred_I: NDArray[np.bool_]
    """The publish time was inferred from a take."""
    from_start_I: NDArray[np.bool_]
    """Of the set's first 24 hours: its publish time says nothing about its age."""
    unpaired_I: NDArray[np.bool_]
    """Held-out items: in no pair."""
    category_I: NDArray[np.int64]
    numbers_I: dict[str, NDArray[np.float64]]
    """Price, year and further ones by name, NaN where unknown."""
    facets: dict[str, Facet]
    """Section, colour, genres and the like, by name."""


Columns = dict[str, NDArray[Any]]
Summed = Callable[[NDArray[Any]], NDArray[np.float64]]


def features(
    rows: ImpressionColumns, histories: Histories, takes: Takes, items: ItemFacts, *, day_resolution: bool
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """All features that need no vectors, shape (N, F), with their names; NaN-free, counts as logarithms."""
    counted = ~takes.announces_T
    user, item, second = takes.user_T[counted], takes.item_T[counted], takes.second_T[counted]
    of_item = Past(item, second)
    columns: Columns = {}
    columns |= _user(rows, takes)
    columns |= _popularity(rows, of_item, day_resolution=day_resolution)
    columns |= _age(rows, of_item, items)
    if takes.rating_T is not None:
        columns |= _ratings(rows, user, item, second, takes.rating_T[counted])
    columns |= _category(rows, takes, items)
    for name, values in items.numbers_I.items():
        if np.isfinite(values).any():
            columns[name] = np.nan_to_num(values[rows.item_N])
            columns[f"{name} known"] = np.isfinite(values[rows.item_N]).astype(float)
    columns |= _against_history(rows, histories, of_item, _pairs(takes, items), items)
    names = tuple(columns)
    return np.stack([columns[name] for name in names], axis=1).astype(np.float32), names


def _user(rows: ImpressionColumns, takes: Takes) -> Columns:
    length = rows.history_stop_N - rows.history_start_N
    last = Past(takes.user_T, takes.second_T).last(rows.user_N, rows.second_N)
    return {
        "history length": np.log1p(length),
        "has history": (length > 0).astype(float),
        "user idle": np.nan_to_num(np.log1p((rows.second_N - last) / HOUR)),
    }


def _popularity(rows: ImpressionColumns, of_item: Past, *, day_resolution: bool) -> Columns:
    columns: Columns = {"takes": np.log1p(of_item.count(rows.item_N, rows.second_N))}
    for name, length in WINDOWS.items():
        if day_resolution and length < DAY:
            continue
        columns[f"takes {name}"] = np.log1p(of_item.recent(rows.item_N, rows.second_N, length))
    last = of_item.last(rows.item_N, rows.second_N)
    columns["item idle"] = np.nan_to_num(np.log1p((rows.second_N - last) / HOUR))
    return columns


def _age(rows: ImpressionColumns, of_item: Past, items: ItemFacts) -> Columns:
    taken_again = of_item.count(rows.item_N, rows.second_N) > 0
    known = ~items.from_start_I[rows.item_N] & (~items.inferred_I[rows.item_N] | taken_again)
    age = np.maximum(rows.second_N - items.published_I[rows.item_N], 0)
    return {"age": np.where(known, np.log1p(age / HOUR), 0.0), "age known": known.astype(float)}


def _ratings(
    rows: ImpressionColumns,
    user: NDArray[np.int64],
    item: NDArray[np.int64],
    second: NDArray[np.int64],
    rating: NDArray[np.float64],
) -> Columns:
    """Means around the mean of everything so far; the item's around what its raters gave until then."""
    everyone = np.zeros(len(user), np.int64)
    overall = Past(everyone, second, rating)

    def mean_so_far(at: NDArray[np.int64]) -> NDArray[np.float64]:
        nobody = np.zeros(len(at), np.int64)
        return overall.total(nobody, at) / np.maximum(overall.count(nobody, at), 1)

    above = rating - mean_so_far(second)
    of_user = Past(user, second, above)
    user_mean = of_user.total(user, second) / (of_user.count(user, second) + _SHRINK)
    of_item = Past(item, second, above - user_mean)
    squares = Past(user, second, above**2)
    count = of_user.count(rows.user_N, rows.second_N)
    mean = of_user.total(rows.user_N, rows.second_N) / (count + _SHRINK)
    variance = squares.total(rows.user_N, rows.second_N) / np.maximum(count, 1) - mean**2
    raters = of_item.count(rows.item_N, rows.second_N)
    return {
        "user's rating": mean,
        "user's rating spread": np.sqrt(np.maximum(variance, 0)),
        "item's rating": of_item.total(rows.item_N, rows.second_N) / (raters + _SHRINK),
    }


def _category(rows: ImpressionColumns, takes: Takes, items: ItemFacts) -> Columns:
    category_T, category_N = items.category_I[takes.item_T], items.category_I[rows.item_N]
    size = int(items.category_I.max(initial=0)) + 1
    known = category_N > 0
    mine = Past(takes.user_T * size + category_T, takes.second_T)
    own = mine.count(rows.user_N * size + category_N, rows.second_N) * known
    length = rows.history_stop_N - rows.history_start_N
    nobody = np.zeros(len(rows), np.int64)
    everything = Past(np.zeros(len(takes.user_T), np.int64), takes.second_T).count(nobody, rows.second_N)
    taken = Past(category_T, takes.second_T).count(category_N, rows.second_N)
    usual = (taken + 1) / (everything + size)
    share = (own + 5 * usual) / (length + 5)
    return {
        "category takes": np.log1p(own),
        "category share": np.where(known, own / np.maximum(length, 1), 0.0),
        "category lift": np.where(known, np.log(share / usual), 0.0),
        "category popularity": np.log(usual),
    }


def _pairs(takes: Takes, items: ItemFacts) -> Past:
    """Pairs of items that one user took, known from the later take on; each take with the `HISTORY` before it."""
    counted = np.flatnonzero(~takes.announces_T & ~items.unpaired_I[takes.item_T])
    order = counted[np.lexsort((takes.second_T[counted], takes.user_T[counted]))]
    user, item, second = takes.user_T[order], takes.item_T[order], takes.second_T[order]
    keys, seconds = [], []
    for back in range(1, HISTORY + 1):
        together = np.flatnonzero(user[back:] == user[:-back])
        if not len(together):
            break
        keys.append(pair_key(item[together], item[together + back], len(items.category_I)))
        seconds.append(second[together + back])
    none = np.zeros(0, np.int64)
    return Past(np.concatenate([none, *keys]), np.concatenate([none, *seconds]))


def pair_key(one: NDArray[np.int64], other: NDArray[np.int64], items: int) -> NDArray[np.int64]:
    """A number for an unordered pair of items."""
    return np.minimum(one, other).astype(np.int64) * items + np.maximum(one, other)


def _against_history(
    rows: ImpressionColumns, histories: Histories, of_item: Past, pairs: Past, items: ItemFacts
) -> Columns:
    passes = [
        _one_pass(rows, histories, of_item, pairs, items, start, min(start + _ROWS_PER_PASS, len(rows)))
        for start in range(0, len(rows), _ROWS_PER_PASS)
    ]
    if not passes:
        passes = [_one_pass(rows, histories, of_item, pairs, items, 0, 0)]
    return {name: np.concatenate([one[name] for one in passes]) for name in passes[0]}


def _one_pass(
    rows: ImpressionColumns,
    histories: Histories,
    of_item: Past,
    pairs: Past,
    items: ItemFacts,
    start: int,
    stop: int,
) -> Columns:
    chunk = np.arange(start, stop)
    row_P, place_P, back_P = flat_histories(rows, chunk, HISTORY)
    history_P = histories.item_T[place_P].astype(np.int64)
    target_P, second_P = rows.item_N[chunk][row_P], rows.second_N[chunk][row_P]
    weight_P = np.exp2(-back_P / _HALF_LIFE)
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
            columns |= _number_against_history(
                name, values_I, target_P, history_P, weight_P, rows.item_N[chunk], summed
            )
    count_P = pairs.count(pair_key(target_P, history_P, len(items.category_I)), second_P).astype(float)
    other_P = of_item.count(history_P, second_P)
    own_P = of_item.count(rows.item_N[chunk], rows.second_N[chunk])[row_P]
    near_P = count_P / np.sqrt((own_P + 2.0) * (other_P + 2.0))
    columns |= {
        "together": np.log1p(summed(count_P)),
        "together most": np.log1p(_largest(row_P, count_P, n)),
        "together near": summed(near_P * weight_P) / weight_N,
        "together nearest": _largest(row_P, near_P, n),
        "together lift": np.log(
            (summed(count_P) + 0.5) / (summed(np.sqrt((own_P + 1.0) * (other_P + 1.0))) + 1.0),
        ),
    }
    return columns


def _number_against_history(
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


def flat_histories(
    rows: ImpressionColumns, chunk: NDArray[np.int64], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The latest `length` takes of each row, one after the other: (place in chunk, place in `Histories`, how far back).

    Sorted by row; within a row the newest first.
    """
    start, stop = rows.history_start_N[chunk], rows.history_stop_N[chunk]
    count = np.minimum(stop - start, length)
    row_P = np.repeat(np.arange(len(chunk)), count)
    back_P = np.arange(len(row_P)) - np.repeat(np.cumsum(count) - count, count)
    return row_P, stop[row_P] - 1 - back_P, back_P


def similarity_features(data: CtrData) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Cosines of target and history in the space of the version that serves the row; zeros without vectors."""
    vectors, has = data.items.vectors_EIV, data.items.has_vector_EI
    names = ("cosine mean", "cosine largest", "cosine recent", "cosine newest", "cosine known", "has vector")
    out = np.zeros((len(data), len(names)), np.float32)
    rows = data.rows
    for start in range(0, len(data), _ROWS_PER_PASS):
        chunk = np.arange(start, min(start + _ROWS_PER_PASS, len(data)))
        row_P, place_P, back_P = flat_histories(rows, chunk, HISTORY)
        history_P = data.histories.item_T[place_P].astype(np.int64)
        target_P, version_P = rows.item_N[chunk][row_P], rows.encoder_N[chunk][row_P]
        known_P = has[version_P, history_P] & has[version_P, target_P]
        row_P, back_P = row_P[known_P], back_P[known_P]
        cosine_P = _cosines(vectors, version_P[known_P], target_P[known_P], history_P[known_P])
        n = len(chunk)
        weight_P = np.exp2(-back_P / _HALF_LIFE)
        count_N = np.bincount(row_P, minlength=n)
        out[chunk, 0] = np.bincount(row_P, cosine_P, minlength=n) / np.maximum(count_N, 1)
        out[chunk, 1] = _largest(row_P, cosine_P, n, lowest=-1.0) * (count_N > 0)
        out[chunk, 2] = np.bincount(row_P, cosine_P * weight_P, minlength=n) / np.maximum(
            np.bincount(row_P, weight_P, minlength=n), 1e-9
        )
        out[chunk, 3] = np.bincount(row_P, cosine_P * (back_P == 0), minlength=n)
        out[chunk, 4] = count_N > 0
        out[chunk, 5] = has[rows.encoder_N[chunk], rows.item_N[chunk]]
    return out, names


def _cosines(
    vectors: NDArray[np.float32], version_P: NDArray[np.int64], one_P: NDArray[np.int64], other_P: NDArray[np.int64]
) -> NDArray[np.float64]:
    found = np.empty(len(one_P))
    for start in range(0, len(one_P), 65_536):
        part = slice(start, start + 65_536)
        found[part] = np.einsum(
            "pv,pv->p", vectors[version_P[part], one_P[part]], vectors[version_P[part], other_P[part]]
        )
    return found


def _largest(row_P: NDArray[np.int64], values_P: NDArray[Any], n: int, *, lowest: float = 0.0) -> NDArray[np.float64]:
    """Largest value per row; `row_P` is sorted."""
    found = np.full(n, lowest)
    if len(row_P):
        first = np.flatnonzero(np.concatenate([[True], row_P[1:] != row_P[:-1]]))
        found[row_P[first]] = np.maximum.reduceat(values_P, first)
    return found
