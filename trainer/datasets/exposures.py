"""Rows of a data set to a click log: exposures and takes with their seconds.

Pure functions over columns. All randomness is seeded. Exposures are drawn from what the sampled users take, as a live
system draws them from its own log.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from schemas.attributes import PublishedAtIs
from trainer.datasets.folder import DAY_SECONDS, DataSet, Flags, Ints, sample_users

NEGATIVES_PER_TAKE = 4
WINDOW_EVENTS = 1_000
"""Interactions before and after a take from which its exposures are drawn."""

_ROUNDS_OF_REJECTION = 12


@dataclass(frozen=True)
class Behaviours:
    """The click log of a set in replay order: by second, exposures before takes, otherwise shuffled by the seed."""

    ts: Ints
    """Second of event time (days are already spread)."""
    user: Ints
    item: Ints
    is_take: Flags
    defines_publish: Flags
    row: Ints
    """Row of `interactions.parquet` that the event belongs to; -1 - row of the negatives if it belongs to none."""
    draw: Ints
    """-1 for the row itself, else the running number of the negative beside it."""
    drawn_from: str | None
    """Source of the exposures that were not taken, as text for the report; None if the set contains them."""
    source: Ints
    """Row of `interactions.parquet` whose take an exposure was drawn from; -1 if it was shown, or that is not known."""
    source_ts: Ints
    """Second of that take."""
    search: Ints
    """The search that led to the event, as a place in the set's searches; -1 if there was none."""
    trigger: Ints
    """The item looked at just before; -1 if that is not known."""

    def __len__(self) -> int:
        return len(self.ts)

    def exposure_name(self, position: int) -> str:
        """Name of an exposure, unique in its set; for a take, the name of its exposure."""
        row, draw = int(self.row[position]), int(self.draw[position])
        if row < 0:
            return f"x{-1 - row}"
        return f"s{row}" if draw < 0 else f"n{row}-{draw}"


_DRAWN_NAME = re.compile(r"-n\d+-\d+$")


def is_drawn_name(event_id: str) -> bool:
    """Whether an exposure of this id, a prefix and `exposure_name`, was drawn beside a row."""
    return _DRAWN_NAME.search(event_id) is not None


def behaviours_of(data: DataSet, *, seed: int, events: int | None = None, retakes: bool = False) -> Behaviours:
    """All behaviours of a set; `events` limits the number of takes by sampling whole users.

    `retakes` is as in `draw_around`.
    """
    rows = data.interactions
    ts = spread_over_days(rows.ts, seed) if data.day_resolution else rows.ts
    definers = defining_interactions(ts, rows.ts, rows.item, data.publish_ts)
    users = None if events is None else sample_users(data, events, seed)
    negative_user, negative_item, negative_ts, negative_row, negative_draw, source = negatives_beside(
        data, ts, seed, retakes=retakes, users=users
    )
    given = data.negatives
    search, negative_search = of_rows_beside(
        rows.search, None if given is None else given.search, negative_row, len(rows)
    )
    trigger, negative_trigger = of_rows_beside(
        rows.trigger, None if given is None else given.trigger, negative_row, len(rows)
    )

    source_row = np.full(len(negative_item), -1)
    if data.negatives is None and len(negative_item):
        held = _held(rows.user, users)
        beside = np.searchsorted(held, negative_row)
        found = sources_of_draws(ts[held], rows.item[held], beside, negative_item, seed=seed)
        source_row = np.where(found >= 0, held[found], -1)
    take = np.flatnonzero(rows.taken)
    everything = np.arange(len(rows))
    merged = Behaviours(
        ts=np.concatenate([ts, ts[take], negative_ts]),
        user=np.concatenate([rows.user, rows.user[take], negative_user]),
        item=np.concatenate([rows.item, rows.item[take], negative_item]),
        is_take=np.concatenate([np.zeros(len(rows), bool), np.ones(len(take), bool), np.zeros(len(negative_ts), bool)]),
        defines_publish=np.concatenate([definers, definers[take], np.zeros(len(negative_ts), bool)]),
        row=np.concatenate([everything, take, negative_row]),
        draw=np.concatenate([np.full(len(rows) + len(take), -1), negative_draw]),
        drawn_from=source,
        source=np.concatenate([np.full(len(rows) + len(take), -1), source_row]),
        source_ts=np.zeros(0, np.int64),
        search=np.concatenate([search, search[take], negative_search]),
        trigger=np.concatenate([trigger, trigger[take], negative_trigger]),
    )
    # a fixed order inside a second would leak the label
    shuffle = np.random.default_rng([seed, 13]).permutation(len(merged))
    order = np.lexsort((shuffle, merged.is_take, merged.ts))
    if users is not None:
        order = order[users[merged.user[order]]]
    source_ts = ts[merged.source] if len(ts) else merged.source
    return _select(replace(merged, source_ts=np.where(merged.source >= 0, source_ts, 0)), order)


def spread_over_days(ts: Ints, seed: int) -> Ints:
    """Each midnight moved to a random second of its day."""
    return ts + np.random.default_rng([seed, 5]).integers(0, DAY_SECONDS, len(ts))


def defining_interactions(ts: Ints, recorded_ts: Ints, item: Ints, publish_ts: Ints) -> Flags:
    """Per interaction: whether its item's publish time was inferred from it.

    That is the first interaction of an item (by `ts`, then row) if its recorded time equals the publish time.
    """
    order = np.lexsort((np.arange(len(ts)), ts))
    _, first = np.unique(item[order], return_index=True)
    defines = np.zeros(len(ts), dtype=bool)
    defines[order[first]] = True
    return np.asarray(defines & (recorded_ts == publish_ts[item]))


PUBLISHED_AT_IS: tuple[PublishedAtIs, ...] = ("known", "inferred", "unknown")


def how_published(data: DataSet) -> NDArray[np.int8]:
    """Per item a place in `PUBLISHED_AT_IS`: inferred is what equals its first interaction.

    An item that was first seen on the set's first day may be of any age.
    """
    rows = data.interactions
    inferred = np.zeros(len(data.item_ids), np.int8)
    inferred[rows.item[defining_interactions(rows.ts, rows.ts, rows.item, data.publish_ts)]] = 1
    return np.where(data.catalogue & (inferred > 0), 2, inferred).astype(np.int8)


def draw_around(
    ts: Ints,
    user: Ints,
    item: Ints,
    publish_ts: Ints,
    *,
    seed: int,
    per_take: int = NEGATIVES_PER_TAKE,
    window: int = WINDOW_EVENTS,
    retakes: bool = False,
) -> tuple[Ints, Ints, Ints]:
    """Draw `per_take` different items for each interaction from the items of the interactions around it.

    Positions are drawn uniformly from the `window` interactions before and after (in order of time), so an item is
    drawn as often as it is taken at that time; items not yet published then, or ever taken by the user, are drawn
    again. With draws from the past alone every new item would be a positive, and age would leak the label. `retakes`
    allows items that the user took before, and takes neither then nor later. Without them nothing that a user has taken
    is ever a negative, and a model that meets such items when it serves ranks them first; with them whether something
    was taken leaks nothing that serving does not have. Evaluation keeps re-takes apart instead.

    Returns (row, running number, item) per draw, sorted; fewer than `per_take` where the window has too few.
    """
    n = len(ts)
    order = np.lexsort((np.arange(n), ts))
    ts_o, user_o, item_o = ts[order], user[order], item[order]
    n_items = len(publish_ts)
    taken, first = np.unique((user_o * n_items + item_o)[::-1], return_index=True)
    last_o = ts_o[::-1][first]  # of each pair of user and item, its last take

    def free(row: Ints, candidate: Ints) -> NDArray[np.bool_]:
        pair = user_o[row] * n_items + candidate
        if not retakes:
            return ~_contains(taken, pair)
        place = np.minimum(np.searchsorted(taken, pair), len(taken) - 1)
        return np.asarray((taken[place] != pair) | (last_o[place] < ts_o[row]))

    rng = np.random.default_rng([seed, 7])
    chosen = np.full((n, per_take), -1, dtype=np.int64)
    filled = np.zeros(n, dtype=np.int64)
    low, high = np.maximum(np.arange(n) - window, 0), np.minimum(np.arange(n) + window, n - 1)
    for _ in range(_ROUNDS_OF_REJECTION * per_take):
        open_rows = np.flatnonzero(filled < per_take)
        if not len(open_rows):
            break
        candidate = item_o[rng.integers(low[open_rows], high[open_rows] + 1)]
        fits = publish_ts[candidate] <= ts_o[open_rows]
        fits &= free(open_rows, candidate)
        fits &= ~np.any(chosen[open_rows] == candidate[:, None], axis=1)
        rows = open_rows[fits]
        chosen[rows, filled[rows]] = candidate[fits]
        filled[rows] += 1
    for row in np.flatnonzero(filled < per_take):  # few items fit there: go through the window once
        around = item_o[low[row] : high[row] + 1]
        fits = (publish_ts[around] <= ts_o[row]) & free(np.full(len(around), row), around)
        for candidate in rng.permutation(around[fits]):
            if filled[row] == per_take:
                break
            if candidate not in chosen[row]:
                chosen[row, filled[row]] = candidate
                filled[row] += 1
    at, number = np.nonzero(chosen >= 0)
    drawn = chosen[at, number]
    back = np.lexsort((number, order[at]))
    return order[at][back], number[back], drawn[back]


def sources_of_draws(ts: Ints, item: Ints, row: Ints, drawn: Ints, *, seed: int, window: int = WINDOW_EVENTS) -> Ints:
    """For each item that `draw_around` drew beside a row: one of the interactions that it may have been drawn from.

    Uniform over the item's interactions in the row's window, as the draw is. Returns rows of the interactions, -1 where
    the window has none of that item.
    """
    n = len(ts)
    order = np.lexsort((np.arange(n), ts))
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n)
    keys = item[order] * n + np.arange(n)
    by_item = np.argsort(keys, kind="stable")
    keys = keys[by_item]
    low = np.searchsorted(keys, drawn * n + np.maximum(place[row] - window, 0))
    high = np.searchsorted(keys, drawn * n + np.minimum(place[row] + window, n - 1), side="right")
    chosen = low + (np.random.default_rng([seed, 37]).random(len(row)) * (high - low)).astype(np.int64)
    return np.where(high > low, order[by_item[np.minimum(chosen, n - 1)]], -1)


def match_to_rows(ts: Ints, user: Ints, shown_ts: Ints, shown_user: Ints) -> Ints:
    """The interaction beside each exposure: of the same user and recorded time, distributed in file order.

    Returns a row of the interactions per exposure, -1 where that user has none at that time.
    """
    span = max(int(max(ts.max(initial=0), shown_ts.max(initial=0))) + 1, 1)
    base = min(int(min(ts.min(initial=0), shown_ts.min(initial=0))), 0)
    key, shown_key = user * (span - base) + (ts - base), shown_user * (span - base) + (shown_ts - base)
    rows_by_key = np.argsort(key, kind="stable")
    groups, starts, sizes = np.unique(key[rows_by_key], return_index=True, return_counts=True)
    if not len(groups):
        return np.full(len(shown_ts), -1, dtype=np.int64)
    shown_by_key = np.argsort(shown_key, kind="stable")
    sorted_shown = shown_key[shown_by_key]
    _, first, inverse, counts = np.unique(sorted_shown, return_index=True, return_inverse=True, return_counts=True)
    rank = np.arange(len(sorted_shown)) - first[inverse]
    place = np.minimum(np.searchsorted(groups, sorted_shown), len(groups) - 1)
    matched = groups[place] == sorted_shown
    row = rows_by_key[np.where(matched, starts[place] + rank * sizes[place] // counts[inverse], 0)]
    result = np.empty(len(shown_ts), dtype=np.int64)
    result[shown_by_key] = np.where(matched, row, -1)
    return result


def id_prefix(data_name: str, seed: int) -> str:
    """Prefix of the event ids of one set and seed: a second replay gives the same ids, which are duplicates."""
    return hashlib.sha256(f"{data_name}\0{seed}".encode()).hexdigest()[:10]


def negatives_beside(
    data: DataSet, ts: Ints, seed: int, *, retakes: bool = False, users: Flags | None = None
) -> tuple[Ints, Ints, Ints, Ints, Ints, str | None]:
    """Exposures that were not taken: (user, item, second, interaction beside, running number, source as text).

    `ts` are the seconds of the interactions. Exposures are drawn beside and from the interactions of `users` alone, by
    default of all: one that was drawn from a take that the log lacks could not leave it out of its features. An
    exposure without an interaction beside it has row -1 - its position.
    """
    rows = data.interactions
    none = np.zeros(0, np.int64)
    given = data.negatives
    if given is not None:
        row = match_to_rows(rows.ts, rows.user, given.ts, given.user)
        own_ts = spread_over_days(given.ts, seed + 1) if data.day_resolution else given.ts
        when = np.where(row >= 0, ts[row], own_ts) if len(rows) else own_ts
        number = _running_numbers(row)
        row = np.where(row >= 0, row, -1 - np.arange(len(row)))
        return given.user, given.item, when, row, number, f"sampled ({given.source})" if given.simulated else None
    if not len(rows) or not rows.taken.all():
        return none, none, none, none, none, None
    held = _held(rows.user, users)
    row, number, item = draw_around(
        ts[held], rows.user[held], rows.item[held], data.publish_ts, seed=seed, retakes=retakes
    )
    row = held[row]
    words = (
        f"drawn by seed {seed}: {NEGATIVES_PER_TAKE} per take from what was taken within {WINDOW_EVENTS:,} events "
        f"before or after, already published then, {'not' if retakes else 'never'} taken by that user"
        + (" then or later" if retakes else "")
    )
    return rows.user[row], item, ts[row], row, number, words


def of_rows_beside(of_rows: Ints | None, own: Ints | None, row_of_negative: Ints, rows: int) -> tuple[Ints, Ints]:
    """A column of the interactions and of the negatives: their own, else of the interaction that they stand beside.

    A search that only takes had would tell takes from exposures.
    """
    of_rows = np.full(rows, -1) if of_rows is None else of_rows
    if own is not None:
        return of_rows, own
    if not rows:
        return of_rows, np.full(len(row_of_negative), -1)
    return of_rows, np.where(row_of_negative >= 0, of_rows[np.maximum(row_of_negative, 0)], -1)


def _held(user: Ints, users: Flags | None) -> Ints:
    """Rows of the interactions of these users."""
    return np.arange(len(user)) if users is None else np.flatnonzero(users[user])


def _running_numbers(row: Ints) -> Ints:
    """0, 1, 2, ... within each value of `row`, in order of appearance."""
    order = np.argsort(row, kind="stable")
    ordered = row[order]
    _, first, inverse = np.unique(ordered, return_index=True, return_inverse=True)
    numbers = np.empty(len(row), dtype=np.int64)
    numbers[order] = np.arange(len(row)) - first[inverse]
    return numbers


def _contains(ordered: Ints, values: Ints) -> NDArray[np.bool_]:
    """Whether each value is in the sorted array."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.asarray(ordered[place] == values)


def _select(behaviours: Behaviours, order: Ints) -> Behaviours:
    return Behaviours(
        ts=behaviours.ts[order],
        user=behaviours.user[order],
        item=behaviours.item[order],
        is_take=behaviours.is_take[order],
        defines_publish=behaviours.defines_publish[order],
        row=behaviours.row[order],
        draw=behaviours.draw[order],
        drawn_from=behaviours.drawn_from,
        source=behaviours.source[order],
        source_ts=behaviours.source_ts[order],
        search=behaviours.search[order],
        trigger=behaviours.trigger[order],
    )
