"""The features of the moment: one pure function for training, serving and evaluation.

Letters: B rows, R histories, L history length, U distinct items, W attribute values,
P partners, G groups of attributes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trainer.features.config import HALF_LIVES, RECENT, FeatureConfig
from trainer.features.states import (
    CATEGORY_SLOTS,
    NEVER,
    NO_ITEM,
    WORD_SLOTS,
    DrawnSources,
    ItemStates,
    Scalar,
    TakeRows,
    distinct,
    trigger_hash,
)

_HOUR = 3_600.0
_STEPS = 4_096.0
"""Values are rounded to so many steps per unit: what decays to almost nothing becomes 0, and last digits agree."""
_SHRINK = 5.0
"""A user's share of a category is shrunk to everyone's by so many takes."""

_TINY = np.float32(1e-9)
_ROW_MIX, _ONE_ROW = 0x9E37_79B1, np.zeros(1, np.int64)
_MIX = np.random.default_rng(0).integers(1 << 62, size=2_048) | 1

Floats = NDArray[np.floating]


def features(
    config: FeatureConfig,
    states: ItemStates,
    target_B: NDArray[np.int64],
    history_RL: NDArray[np.int64],
    history_seconds_RL: NDArray[np.int64],
    now_B: NDArray[np.int64],
    drawn: DrawnSources | None = None,
    query_B: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """All features, shape (B, F), in the order of `config.names`; finite.

    `target_B`, `history_RL` and `query_B` index `states`; histories are newest first, 0 pads, and R is B or 1. `now_B`
    are the seconds of the rows; a query of 0 is none, and only features that read searches look at it. The values of a
    row depend on nothing else in the batch, to the last digit.
    """
    history_RL = _padded(history_RL, config.history_length)
    seconds_RL = _padded(history_seconds_RL, config.history_length)
    rows = _Rows(states, target_B, *_distinct(history_RL, seconds_RL, len(target_B)), now_B)
    drawn = drawn or DrawnSources.none(len(target_B))
    columns: list[Floats] = [*_user(rows), *_item(rows, drawn), *_category(rows, drawn)]
    columns += _numbers(rows)
    columns += _groups(rows, len(config.groups), drawn)
    columns += _together(rows, drawn)
    if config.queries:
        columns += _query(rows, np.zeros(len(target_B), np.int64) if query_B is None else query_B, drawn)
        columns += _trigger(rows, drawn)
    out_FB = np.empty((len(columns), len(target_B)), np.float32)
    for place, column in enumerate(columns):
        out_FB[place] = column
    out_FB *= _STEPS
    np.rint(out_FB, out=out_FB)
    out_FB /= _STEPS
    return np.ascontiguousarray(out_FB.T)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows with what several groups of features need; histories have the full length, so that sums agree."""

    states: ItemStates
    target_B: NDArray[np.int64]
    history: NDArray[np.int64]
    """Distinct histories, shape (R, L)."""
    seconds: NDArray[np.int64]
    row_B: NDArray[np.int64]
    """The history of each row."""
    now_B: NDArray[np.int64]

    def of(self, values: NDArray[Scalar]) -> NDArray[Scalar]:
        """Shape (..., B, L) of (..., R, L): what is given for each row's history; (..., 1, L) for a single history."""
        return values if len(self.history) == 1 else values.take(self.row_B, axis=-2)

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """Places of a history that hold an item."""
        return self.history > 0

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of items in the history."""
        return np.asarray(self.known.sum(1)[self.row_B])

    @cached_property
    def weight(self) -> NDArray[np.float32]:
        """Weight of each item by its age in takes."""
        recent_L = np.exp2(-np.arange(self.history.shape[1]) / RECENT).astype(np.float32)
        return np.asarray(self.known * recent_L)

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """Sum of the weights."""
        return np.asarray(np.maximum(self.weight.sum(1), _TINY)[self.row_B])


def _distinct(
    history_RL: NDArray[np.int64], seconds_RL: NDArray[np.int64], rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Each history once, with its seconds and the one of each row: rows of one page or one take share theirs."""
    if len(history_RL) == 1:
        return history_RL, seconds_RL, np.zeros(rows, np.int64)
    with np.errstate(over="ignore"):
        mixed_R = (history_RL * _MIX[: history_RL.shape[1]] + seconds_RL * _MIX[-history_RL.shape[1] :]).sum(1)
    _, first, row_B = np.unique(mixed_R, return_index=True, return_inverse=True)
    return history_RL[first], seconds_RL[first], row_B


def _user(rows: _Rows) -> list[Floats]:
    seconds = np.where(rows.known, rows.seconds, NEVER)
    last_B = seconds.max(1)[rows.row_B]
    # a trigger item has the row's own second, and is no take
    late = np.flatnonzero(last_B >= rows.now_B)
    late_KL = seconds[rows.row_B[late]]
    last_B[late] = np.where(late_KL < rows.now_B[late, None], late_KL, NEVER).max(1)
    idle_B = np.log1p(_since(rows.now_B, last_B) / _HOUR)
    return [np.log1p(rows.lengths), (rows.lengths > 0).astype(np.float64), idle_B]


def _item(rows: _Rows, drawn: DrawnSources) -> list[Floats]:
    takes, facts = rows.states.takes, rows.states.facts
    target_B, now_B, counted_B = rows.target_B, rows.now_B, drawn.second_B > NEVER
    count_B = _own_takes(rows, drawn)
    newest_B = takes.last_U[target_B]
    since_B = _since(now_B, newest_B)
    half_life_H1 = np.array([*HALF_LIVES.values()])[:, None]
    left_HB = takes.decayed_UH[target_B].T.astype(np.float64) * np.exp2(-since_B / half_life_H1)
    some = np.flatnonzero(counted_B)
    left_HB[:, some] -= np.exp2(-_since(now_B[some], drawn.second_B[some]) / half_life_H1)
    columns: list[Floats] = [np.log1p(count_B), *np.log1p(np.maximum(left_HB, 0.0))]
    last_B = np.where(counted_B & (drawn.second_B == newest_B), takes.previous_U[target_B], newest_B)
    columns.append(np.where(last_B > NEVER, np.log1p(_since(now_B, last_B) / _HOUR), 0.0))
    kind_B, published_B = facts.age_I[target_B], facts.published_I[target_B]
    known_B = ((kind_B == 0) | ((kind_B == 1) & (count_B > 0))) & np.isfinite(published_B)
    age_B = np.maximum(now_B - np.where(known_B, published_B, now_B), 0.0)
    return [*columns, np.log1p(age_B / _HOUR), known_B.astype(np.float64)]


def _category(rows: _Rows, drawn: DrawnSources) -> list[Floats]:
    category_U, shared, counted_B = rows.states.facts.category_I, rows.states.shared, drawn.second_B > NEVER
    target_B = category_U[rows.target_B]
    known_B = target_B > 0
    same_BL = rows.of(category_U[rows.history]) == np.where(known_B, target_B, np.uint32(NO_ITEM))[:, None]
    own_B = np.count_nonzero(same_BL, axis=1)
    taken_B = np.maximum(shared.category_C[target_B % CATEGORY_SLOTS] - counted_B.astype(np.float64), 0.0)
    usual_B = (taken_B + 1.0) / (shared.takes - counted_B + max(1, int(np.count_nonzero(shared.category_C))))
    share_B = (own_B + _SHRINK * usual_B) / (rows.lengths + _SHRINK)
    return [
        np.log1p(own_B),
        own_B / np.maximum(rows.lengths, 1),
        np.where(known_B, np.log(share_B / usual_B), 0.0),
        np.log(usual_B),
        (same_BL * rows.of(rows.weight)).sum(1) / rows.weights,
        same_BL[:, 0].astype(np.float64),
    ]


def _numbers(rows: _Rows) -> list[Floats]:
    """Five columns per number, of N numbers."""
    values_NU = np.ascontiguousarray(rows.states.facts.numbers_IN.T)
    target_NB, history = values_NU.take(rows.target_B, axis=1), values_NU.take(rows.history, axis=1)
    known_NB, known = np.isfinite(target_NB), np.isfinite(history) & rows.known
    target_NB, history = np.where(known_NB, target_NB, np.float32(0)), np.where(known, history, np.float32(0))
    weight = rows.weight * known
    total = weight.sum(-1)
    total_NB = np.maximum(total, _TINY).take(rows.row_B, axis=1)
    mean_NB = (history * weight).sum(-1).take(rows.row_B, axis=1) / total_NB
    both_NB = known_NB & (total > 0).take(rows.row_B, axis=1)
    away_NBL = np.abs(rows.of(history) - target_NB[:, :, None]) * rows.of(weight)
    columns = (
        target_NB,
        known_NB,
        np.where(both_NB, target_NB - mean_NB, 0.0),
        np.where(both_NB, away_NBL.sum(-1) / total_NB, 0.0),
        np.where(both_NB, mean_NB, 0.0),
    )
    return [column_NB[n] for n in range(len(values_NU)) for column_NB in columns]


def _groups(rows: _Rows, groups: int, drawn: DrawnSources) -> list[Floats]:
    """Per group of attributes: cosine of the values of target and history, newest weighted up and not; popularity.

    A value weighs the more, the fewer takes have it. The sum over the history of a cosine is a product with the sum of
    the history's values, of which only those of some target are needed. Popularity leaves out a row's source; the
    weights, of which no feature is made but a ratio, do not.
    """
    facts, shared, size_B = rows.states.facts, rows.states.shared, len(rows.target_B)
    used = np.count_nonzero(facts.words_IW.any(axis=0)) or 1  # values come first, padding after them
    word_UW, group_UW = facts.words_IW[:, :used], facts.group_IW[:, :used].astype(np.int64)
    size_U, known_UW = len(word_UW), word_UW > 0
    weight_UW = np.log(np.float32(shared.takes) / (shared.word_C[word_UW % WORD_SLOTS] + np.float32(1)) + np.float32(1))
    weight_UW = (weight_UW + np.float32(0.1)) * known_UW
    place_UW = group_UW + np.arange(0, size_U * groups, groups)[:, None]
    squares = _summed(place_UW.ravel(), (weight_UW * weight_UW).ravel(), size_U * groups)
    value_UW = weight_UW / np.sqrt(np.maximum(squares, 1e-18))[place_UW]
    word_BW = word_UW[rows.target_B]
    wanted = np.append(distinct(word_BW), np.uint32(0xFFFF_FFFF))
    wanted = wanted[wanted > 0]
    number_UW = np.zeros(word_UW.shape, np.int64)  # 0 is that of no value, and of those that no target has
    some = np.flatnonzero(_perhaps(word_UW.astype(np.uint16), wanted) & known_UW)
    number = np.searchsorted(wanted, word_UW.ravel()[some])
    number_UW.ravel()[some] = np.where(wanted[number] == word_UW.ravel()[some], number + 1, 0)
    sums = _history_sums(rows, number_UW, value_UW, len(wanted) + 1)
    at_BW = number_UW[rows.target_B] + (rows.row_B * (len(wanted) + 1))[:, None]
    value_BW, used_BW = value_UW[rows.target_B], (word_BW > 0).astype(np.float64)
    key = (group_UW[rows.target_B] + np.arange(0, size_B * groups, groups)[:, None]).ravel()
    counted_B1 = (drawn.second_B > NEVER).astype(np.float64)[:, None]
    taken_BW = np.maximum(shared.word_C[word_BW % WORD_SLOTS] - counted_B1, 0.0)
    usual_BW = np.log((taken_BW + 1.0) / (shared.takes - counted_B1 + 100.0)) * used_BW
    recent_BG, all_BG, words_BG, usual_BG = (
        _summed(key, values.ravel(), size_B * groups).reshape(size_B, groups)
        for values in (sums[0][at_BW] * value_BW, sums[1][at_BW] * value_BW, used_BW, usual_BW)
    )
    recent_BG = recent_BG / rows.weights[:, None]
    all_BG = all_BG / np.maximum(rows.lengths, 1)[:, None]
    usual_BG = usual_BG / np.maximum(words_BG, 1)
    return [column_BG[:, g] for g in range(groups) for column_BG in (recent_BG, all_BG, usual_BG)]


def _history_sums(
    rows: _Rows, number_UW: NDArray[np.int64], value_UW: NDArray[np.float64], wanted: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of the values of each history, by wanted value: weighted by recency, and not; flat, shape (R * wanted)."""
    taken = np.flatnonzero(rows.history)
    item, first = rows.history.ravel()[taken], taken // rows.history.shape[1] * wanted
    number_KW = number_UW.take(item, axis=0)
    hit = np.flatnonzero(number_KW)
    take = hit // number_UW.shape[1]
    value = value_UW.take(item, axis=0).ravel()[hit]
    place = number_KW.ravel()[hit] + first[take]
    size = len(rows.history) * wanted
    recent = _summed(place, value * rows.weight.ravel()[taken][take], size)
    return recent, _summed(place, value, size)


def _summed(places: NDArray[np.int64], values: Floats, size: int) -> NDArray[np.float64]:
    return np.bincount(places, values, minlength=size).astype(np.float64, copy=False)


def _together(rows: _Rows, drawn: DrawnSources) -> list[Floats]:
    count_BL = _pairs(rows, drawn)
    own_B1 = _own_takes(rows, drawn).astype(np.float32)[:, None]
    other_BL = rows.of(rows.states.takes.takes_U[rows.history].astype(np.float32))
    near_BL = count_BL / np.sqrt((own_B1 + 2) * (other_BL + 2))
    usual_BL = np.sqrt((own_B1 + 1) * (other_BL + 1)) * rows.of(rows.known)
    sum_B = count_BL.sum(1)
    return [
        np.log1p(sum_B),
        np.log1p(count_BL.max(1)),
        (near_BL * rows.of(rows.weight)).sum(1) / rows.weights,
        near_BL.max(1),
        np.log((sum_B + 0.5) / (usual_BL.sum(1) + 1.0)),
    ]


def _query(rows: _Rows, query_B: NDArray[np.int64], drawn: DrawnSources) -> list[Floats]:
    """What was taken after this search."""
    return _led_to(rows, rows.states.takes, rows.states.hash_U, query_B, drawn)


def _trigger(rows: _Rows, drawn: DrawnSources) -> list[Floats]:
    """What was taken right after the newest item of the history was looked at, which is the trigger where there is one.

    Unlike pairs of takes this has a direction, and tells a next step from what the same users took at some time.
    """
    triggered = rows.states.triggered
    assert triggered is not None, "states without triggers"
    return _led_to(rows, triggered, trigger_hash(rows.states.hash_U), rows.history[rows.row_B, 0], drawn)


def _led_to(
    rows: _Rows, takes: TakeRows, hash_U: NDArray[np.uint32], place_B: NDArray[np.int64], drawn: DrawnSources
) -> list[Floats]:
    """How often the target was taken after this: as a count, as a share of what was, and beyond its usual share.

    `place_B` are rows of `takes` and of the hashes that drawn sources name, 0 for none. What led to takes has a list of
    partners as an item has; what is not among them was not taken, or rarely.
    """
    known_B = place_B > 0
    target_B1, led_B1 = rows.states.hash_U[rows.target_B][:, None], hash_U[place_B][:, None]
    own_B = ((drawn.partner_BM == led_B1) & known_B[:, None]).any(1).astype(np.float64)
    hit_BP = (takes.partner_UP[place_B] == target_B1) * takes.together_UP[place_B].astype(np.float64)
    count_B = np.maximum(hit_BP.sum(1) - own_B, 0.0)
    all_B = np.maximum(takes.takes_U[place_B] - own_B, 0.0)
    usual_B = all_B * _own_takes(rows, drawn) / max(rows.states.shared.takes, 1)
    lift_B = np.log((count_B + 0.5) / (usual_B + 0.5))
    return [np.log1p(count_B) * known_B, count_B / (all_B + 2.0) * known_B, lift_B * known_B]


def _pairs(rows: _Rows, drawn: DrawnSources) -> NDArray[np.float32]:
    """Pairs of takes of target and history item, shape (B, L): the larger count of their two lists of partners."""
    takes, hash_U, row_B = rows.states.takes, rows.states.hash_U, rows.row_B
    target_B, history = hash_U[rows.target_B], hash_U[rows.history]
    size_L, size_P = history.shape[1], takes.partner_UP.shape[1]
    row_R1 = np.arange(len(history))[:, None]
    partner, together, short_UP = (
        takes.partner_UP.ravel(),
        takes.together_UP.ravel(),
        takes.partner_UP.astype(np.uint16),
    )
    # lists of the targets: the history's items among their partners, each at its newest place
    keys_R, first, number = np.unique(_paired(row_R1, history), return_index=True, return_inverse=True)
    found = np.flatnonzero(_perhaps(short_UP.take(rows.target_B, axis=0), history, row_B[:, None], row_R1))
    target = found // size_P
    at = rows.target_B[target] * size_P + found % size_P
    hit, key = _found(keys_R, _paired(row_B[target], partner.take(at)))
    count_BL = np.zeros((len(target_B), size_L), np.float32)
    count_BL.ravel()[target[hit] * size_L + first[key] % size_L] = together.take(at[hit])
    newest_BL = rows.of(first[number.reshape(history.shape)] % size_L) + np.arange(0, count_BL.size, size_L)[:, None]
    count_BL = count_BL.take(newest_BL)
    # lists of the histories: the targets among their partners
    found = np.flatnonzero(_perhaps(short_UP.take(rows.history, axis=0), target_B, row_R1[:, :, None], row_B))
    keys, key_B = np.unique(_paired(row_B, target_B), return_inverse=True)
    item = found // size_P
    at = rows.history.ravel()[item] * size_P + found % size_P
    hit, key = _found(keys, _paired(item // size_L, partner.take(at)))
    count_KL = np.zeros((len(keys), size_L), np.float32)
    count_KL.ravel()[key * size_L + item[hit] % size_L] = together.take(at[hit])
    count_BL = np.maximum(count_BL, count_KL.take(key_B, axis=0))
    some = np.flatnonzero(drawn.second_B > NEVER)
    if len(some) and drawn.partner_BM.shape[1]:
        partner_M = drawn.partner_BM[some].ravel()
        row_M = np.repeat(some, drawn.partner_BM.shape[1])
        found = np.flatnonzero(_perhaps(partner_M.astype(np.uint16), history, row_B[row_M], row_R1))
        hit, key = _found(keys_R, _paired(row_B[row_M[found]], partner_M[found]))
        counted = np.bincount(row_M[found[hit]] * size_L + first[key] % size_L, minlength=count_BL.size)
        count_BL = np.maximum(count_BL - counted.take(newest_BL), 0)
    return np.asarray(count_BL * rows.of(rows.known), np.float32)


def _perhaps(
    short: NDArray[np.uint16],
    wanted: NDArray[np.uint32],
    row: NDArray[np.int64] = _ONE_ROW,
    wanted_row: NDArray[np.int64] = _ONE_ROW,
) -> NDArray[np.bool_]:
    """Which hashes, by their low 16 bits, may be among the wanted of their row: all that are, and few others."""
    table = np.zeros(1 << 16, bool)
    table[wanted.astype(np.uint16) ^ (wanted_row * _ROW_MIX).astype(np.uint16)] = True
    return table.take(short ^ (row * _ROW_MIX).astype(np.uint16), mode="clip")


def _found(keys: NDArray[np.int64], wanted: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of the wanted are among the sorted keys, and where."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    hit = np.flatnonzero(keys[place] == wanted)
    return hit, place[hit]


def _paired(high: NDArray[np.int64], low: NDArray[np.uint32]) -> NDArray[np.int64]:
    return (high << 32) | low


def _own_takes(rows: _Rows, drawn: DrawnSources) -> NDArray[np.float64]:
    """Takes of each target, without the row's source."""
    count_B = rows.states.takes.takes_U[rows.target_B].astype(np.float64)
    return np.asarray(np.maximum(count_B - (drawn.second_B > NEVER), 0.0))


def _since(now_B: NDArray[np.int64], second_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """Seconds since then, at least 0; 0 where there was nothing."""
    return np.maximum(now_B - np.where(second_B > NEVER, second_B, now_B), 0).astype(np.float64)


def _padded(array_RL: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """The newest `length` columns, filled up with zeros."""
    missing = length - array_RL.shape[1]
    return np.pad(array_RL, ((0, 0), (0, missing))) if missing > 0 else array_RL[:, :length]
