"""Features of an impression, from takes strictly before its second.

The take from which an item's publish time was inferred represents the publication and is in no popularity, rating or
pair: otherwise "no take yet" would identify exactly these takes and leak the label. For the same reason the age of such
an item is unknown until its next take, and the source of a drawn exposure is in none of its counts (`DrawnFrom`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.offline.as_of import Columns, DrawnFrom, ItemFacts, ItemTakes, Takes
from trainer.offline.data import Histories, ImpressionColumns
from trainer.offline.event_index import EventIndex
from trainer.offline.history_features import history_features

HOUR, DAY = 3_600, 86_400
WINDOWS = {"1h": HOUR, "6h": 6 * HOUR, "1d": DAY, "3d": 3 * DAY, "7d": 7 * DAY, "30d": 30 * DAY}
_SHRINK = 5.0
"""Ratings of a user or item are shrunk to the mean by this many average ones."""


def features(
    rows: ImpressionColumns,
    histories: Histories,
    takes: Takes,
    items: ItemFacts,
    sources: DrawnFrom,
    *,
    day_resolution: bool,
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """All features without vectors, shape (N, F), with their names; NaN-free, counts as logarithms."""
    of_item = ItemTakes(rows, takes, sources)
    columns: Columns = {}
    columns |= _user(rows, takes)
    columns |= _popularity(rows, of_item, day_resolution=day_resolution)
    columns |= _age(rows, of_item, items)
    if takes.rating_T is not None:
        columns |= _ratings(rows, takes, takes.rating_T, sources)
    columns |= _category(rows, takes, items)
    for name, values in items.numbers_I.items():
        if np.isfinite(values).any():
            columns[name] = np.nan_to_num(values[rows.item_N])
            columns[f"{name} known"] = np.isfinite(values[rows.item_N]).astype(float)
    columns |= history_features(rows, histories, takes, items, of_item, sources)
    names = tuple(columns)
    return np.stack([columns[name] for name in names], axis=1).astype(np.float32), names


def _user(rows: ImpressionColumns, takes: Takes) -> Columns:
    length = rows.history_stop_N - rows.history_start_N
    last = EventIndex(takes.user_T, takes.second_T).last(rows.user_N, rows.second_N)
    return {
        "history length": np.log1p(length),
        "has history": (length > 0).astype(float),
        "user idle": np.nan_to_num(np.log1p((rows.second_N - last) / HOUR)),
    }


def _popularity(rows: ImpressionColumns, of_item: ItemTakes, *, day_resolution: bool) -> Columns:
    columns: Columns = {"takes": np.log1p(of_item.count())}
    for name, length in WINDOWS.items():
        if day_resolution and length < DAY:
            continue
        columns[f"takes {name}"] = np.log1p(of_item.recent(length))
    last = of_item.last()
    columns["item idle"] = np.nan_to_num(np.log1p((rows.second_N - last) / HOUR))
    return columns


def _age(rows: ImpressionColumns, of_item: ItemTakes, items: ItemFacts) -> Columns:
    taken_again = of_item.count() > 0
    known = ~items.from_start_I[rows.item_N] & (~items.inferred_I[rows.item_N] | taken_again)
    age = np.maximum(rows.second_N - items.published_I[rows.item_N], 0)
    return {"age": np.where(known, np.log1p(age / HOUR), 0.0), "age known": known.astype(float)}


def _ratings(rows: ImpressionColumns, takes: Takes, rating_T: NDArray[np.float64], sources: DrawnFrom) -> Columns:
    """Mean ratings relative to the mean of all so far; the item's relative to its raters' means until then."""
    all_T = np.zeros(len(rating_T), np.int64)
    overall = EventIndex(all_T, takes.second_T, rating_T)
    above_T = rating_T - overall.total(all_T, takes.second_T) / np.maximum(overall.count(all_T, takes.second_T), 1)
    of_user = EventIndex(takes.user_T, takes.second_T, above_T)
    squares = EventIndex(takes.user_T, takes.second_T, above_T**2)
    mean_T = of_user.total(takes.user_T, takes.second_T) / (of_user.count(takes.user_T, takes.second_T) + _SHRINK)
    given_T = above_T - mean_T
    counted = ~takes.announces_T
    of_item = EventIndex(takes.item_T[counted], takes.second_T[counted], given_T[counted])
    seen = sources.second_N < rows.second_N
    raters = of_item.count(rows.item_N, rows.second_N) - seen
    total = of_item.total(rows.item_N, rows.second_N) - np.where(seen, given_T[sources.take_N], 0.0)
    count = of_user.count(rows.user_N, rows.second_N)
    mean = of_user.total(rows.user_N, rows.second_N) / (count + _SHRINK)
    variance = squares.total(rows.user_N, rows.second_N) / np.maximum(count, 1) - mean**2
    return {
        "user's rating": mean,
        "user's rating spread": np.sqrt(np.maximum(variance, 0)),
        "item's rating": total / (raters + _SHRINK),
    }


def _category(rows: ImpressionColumns, takes: Takes, items: ItemFacts) -> Columns:
    category_T, category_N = items.category_I[takes.item_T], items.category_I[rows.item_N]
    size = int(items.category_I.max(initial=0)) + 1
    known = category_N > 0
    mine = EventIndex(takes.user_T * size + category_T, takes.second_T)
    own = mine.count(rows.user_N * size + category_N, rows.second_N) * known
    length = rows.history_stop_N - rows.history_start_N
    all_N = np.zeros(len(rows), np.int64)
    everything = EventIndex(np.zeros(len(takes.user_T), np.int64), takes.second_T).count(all_N, rows.second_N)
    taken = EventIndex(category_T, takes.second_T).count(category_N, rows.second_N)
    usual = (taken + 1) / (everything + size)
    share = (own + 5 * usual) / (length + 5)
    return {
        "category takes": np.log1p(own),
        "category share": np.where(known, own / np.maximum(length, 1), 0.0),
        "category lift": np.where(known, np.log(share / usual), 0.0),
        "category popularity": np.log(usual),
    }
