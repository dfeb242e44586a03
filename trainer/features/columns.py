"""The features of the moment: one pure function for training, serving and evaluation.

Letters: B rows, R histories (B, or 1 that all rows share), L history length, U distinct items, W attribute values,
P partners, G groups of attributes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trainer.features.config import HALF_LIVES, RECENT, FeatureConfig
from trainer.features.states import CATEGORY_SLOTS, NEVER, WORD_SLOTS, DrawnSources, ItemStates

_HOUR = 3_600.0
_STEPS = 4_096.0
"""Values are rounded to so many steps per unit: what decays to almost nothing becomes 0, and last digits agree."""
_SHRINK = 5.0
"""A user's share of a category is shrunk to everyone's by so many takes."""

Floats = NDArray[np.floating]


def features(
    config: FeatureConfig,
    states: ItemStates,
    target_B: NDArray[np.int64],
    history_RL: NDArray[np.int64],
    history_seconds_RL: NDArray[np.int64],
    now_B: NDArray[np.int64],
    drawn: DrawnSources | None = None,
) -> NDArray[np.float32]:
    """All features, shape (B, F), in the order of `config.names`; finite.

    `target_B` and `history_RL` index `states`; histories are newest first, 0 pads, and R is B or 1. `now_B` are the
    seconds of the rows. The values of a row depend on nothing else in the batch, to the last digit.
    """
    history_RL = _padded(history_RL, config.history_length)
    rows = _Rows(states, target_B, history_RL, _padded(history_seconds_RL, config.history_length), now_B)
    drawn = drawn or DrawnSources.none(len(target_B))
    columns: list[Floats] = [*_user(rows), *_item(rows, drawn), *_category(rows)]
    for place in range(len(config.numbers)):
        columns += _number(rows, place)
    columns += _groups(rows, len(config.groups))
    columns += _together(rows, drawn)
    out_BF = np.empty((len(target_B), len(columns)), np.float32)
    for place, column in enumerate(columns):
        out_BF[:, place] = column
    out_BF *= _STEPS
    np.rint(out_BF, out=out_BF)
    out_BF /= _STEPS
    return out_BF


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows with what several groups of features need; histories have the full length, so that sums agree."""

    states: ItemStates
    target_B: NDArray[np.int64]
    history_RL: NDArray[np.int64]
    seconds_RL: NDArray[np.int64]
    now_B: NDArray[np.int64]

    @cached_property
    def known_RL(self) -> NDArray[np.bool_]:
        return self.history_RL > 0

    @cached_property
    def length_R(self) -> NDArray[np.int64]:
        return np.asarray(self.known_RL.sum(1))

    @cached_property
    def weight_RL(self) -> NDArray[np.float32]:
        recent_L = np.exp2(-np.arange(self.history_RL.shape[1]) / RECENT).astype(np.float32)
        return np.asarray(self.known_RL * recent_L)

    @cached_property
    def weights_R(self) -> NDArray[np.float32]:
        return np.asarray(np.maximum(self.weight_RL.sum(1), np.float32(1e-9)))


def _user(rows: _Rows) -> list[Floats]:
    before_RL = rows.known_RL & (rows.seconds_RL < rows.now_B[:, None])  # a trigger item has the row's own second
    last_B = np.where(before_RL, rows.seconds_RL, NEVER).max(1)
    idle_B = np.where(last_B > NEVER, np.log1p((rows.now_B - np.where(last_B > NEVER, last_B, 0)) / _HOUR), 0.0)
    return [np.log1p(rows.length_R), (rows.length_R > 0).astype(np.float64), idle_B]


def _item(rows: _Rows, drawn: DrawnSources) -> list[Floats]:
    takes, facts = rows.states.takes, rows.states.facts
    target_B, now_B, counted_B = rows.target_B, rows.now_B, drawn.second_B > NEVER
    count_B = _own_takes(rows, drawn)
    newest_B = takes.last_U[target_B]
    since_B = _since(now_B, newest_B)
    since_source_B = _since(now_B, drawn.second_B)
    decayed_BH = takes.decayed_UH[target_B].astype(np.float64)
    columns: list[Floats] = [np.log1p(count_B)]
    for place, half_life in enumerate(HALF_LIVES.values()):
        left_B = decayed_BH[:, place] * np.exp2(-since_B / half_life)
        left_B -= counted_B * np.exp2(-since_source_B / half_life)
        columns.append(np.log1p(np.maximum(left_B, 0.0)))
    last_B = np.where(counted_B & (drawn.second_B == newest_B), takes.previous_U[target_B], newest_B)
    columns.append(np.where(last_B > NEVER, np.log1p(_since(now_B, last_B) / _HOUR), 0.0))
    kind_B, published_B = facts.age_I[target_B], facts.published_I[target_B]
    known_B = ((kind_B == 0) | ((kind_B == 1) & (count_B > 0))) & np.isfinite(published_B)
    age_B = np.maximum(now_B - np.where(known_B, published_B, now_B), 0.0)
    return [*columns, np.log1p(age_B / _HOUR), known_B.astype(np.float64)]


def _category(rows: _Rows) -> list[Floats]:
    category_U, shared = rows.states.facts.category_I, rows.states.shared
    target_B = category_U[rows.target_B]
    known_B = target_B > 0
    same_BL = (category_U[rows.history_RL] == target_B[:, None]) & known_B[:, None] & rows.known_RL
    own_B = same_BL.sum(1)
    taken_B = shared.category_C[target_B % CATEGORY_SLOTS]
    usual_B = (taken_B + 1.0) / (shared.takes + max(1, np.count_nonzero(shared.category_C)))
    share_B = (own_B + _SHRINK * usual_B) / (rows.length_R + _SHRINK)
    return [
        np.log1p(own_B),
        own_B / np.maximum(rows.length_R, 1),
        np.where(known_B, np.log(share_B / usual_B), 0.0),
        np.log(usual_B),
        (same_BL * rows.weight_RL).sum(1) / rows.weights_R,
        same_BL[:, 0].astype(np.float64),
    ]


def _number(rows: _Rows, place: int) -> list[Floats]:
    values_U = rows.states.facts.numbers_IN[:, place]
    target_B, history_RL = values_U[rows.target_B], values_U[rows.history_RL]
    known_B, known_RL = np.isfinite(target_B), np.isfinite(history_RL) & rows.known_RL
    target_B, history_RL = np.where(known_B, target_B, 0), np.where(known_RL, history_RL, 0)
    weight_RL = rows.weight_RL * known_RL
    total_R = weight_RL.sum(1)
    mean_R = (history_RL * weight_RL).sum(1) / np.maximum(total_R, np.float32(1e-9))
    both_B = known_B & (total_R > 0)
    away_B = (np.abs(history_RL - target_B[:, None]) * weight_RL).sum(1) / np.maximum(total_R, np.float32(1e-9))
    return [
        target_B,
        known_B.astype(np.float64),
        np.where(both_B, target_B - mean_R, 0.0),
        np.where(both_B, away_B, 0.0),
        np.where(both_B, mean_R, 0.0),
    ]


def _groups(rows: _Rows, groups: int) -> list[Floats]:
    """Per group of attributes: cosine of the values of target and history, newest weighted up and not; popularity.

    A value weighs the more, the fewer takes have it. The sum over the history of a cosine is a product with the sum of
    the history's values, of which only those of some target are needed.
    """
    facts, shared, B = rows.states.facts, rows.states.shared, len(rows.target_B)
    word_UW, group_UW = facts.words_IW, facts.group_IW.astype(np.int64)
    count_UW = shared.word_C[word_UW % WORD_SLOTS]
    weight_UW = np.log1p(shared.takes / (count_UW + 1.0)) + 0.1
    weight_UW *= word_UW > 0
    place_UW = group_UW + np.arange(len(word_UW))[:, None] * groups
    squares = np.bincount(place_UW.ravel(), (weight_UW * weight_UW).ravel(), minlength=len(word_UW) * groups)
    value_UW = weight_UW / np.sqrt(np.maximum(squares, 1e-18))[place_UW]
    word_BW = word_UW[rows.target_B]
    wanted = np.unique(word_BW)
    wanted = wanted[wanted > 0]
    number_UW = np.searchsorted(wanted, word_UW)
    number_UW[
        (word_UW == 0) | (wanted[np.minimum(number_UW, len(wanted) - 1)] != word_UW if len(wanted) else True)
    ] = -1
    sums_RT = _history_sums(rows, number_UW, value_UW, len(wanted))
    row_B = np.zeros(B, np.int64) if len(rows.history_RL) == 1 else np.arange(B)
    at_BW = np.maximum(number_UW[rows.target_B], 0) + row_B[:, None] * max(1, len(wanted))
    value_BW, used_BW = value_UW[rows.target_B], word_BW > 0
    key_BW = group_UW[rows.target_B] + np.arange(B)[:, None] * groups
    size, key = B * groups, key_BW.ravel()
    recent_BG, all_BG, words_BG, usual_BG = (
        np.bincount(key, values.ravel(), minlength=size).reshape(B, groups)
        for values in (
            sums_RT[0][at_BW] * value_BW,
            sums_RT[1][at_BW] * value_BW,
            used_BW.astype(np.float64),
            np.log((shared.word_C[word_BW % WORD_SLOTS] + 1.0) / (shared.takes + 100.0)) * used_BW,
        )
    )
    recent_BG /= rows.weights_R[:, None]
    all_BG /= np.maximum(rows.length_R, 1)[:, None]
    usual_BG /= np.maximum(words_BG, 1)
    return [column_BG[:, g] for g in range(groups) for column_BG in (recent_BG, all_BG, usual_BG)]


def _history_sums(
    rows: _Rows, number_UW: NDArray[np.int64], value_UW: Floats, wanted: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of the values of each history, by wanted value: weighted by recency, and not; flat, shape (R * wanted)."""
    number_RLW = number_UW[rows.history_RL]
    hit = np.flatnonzero(number_RLW.ravel() >= 0)
    W, L = number_UW.shape[1], rows.history_RL.shape[1]
    take = hit // W
    value = value_UW[rows.history_RL.ravel()[take], hit % W]
    place = number_RLW.ravel()[hit] + (take // L) * wanted
    size = max(1, len(rows.history_RL) * wanted)
    return (
        np.bincount(place, value * rows.weight_RL.ravel()[take], minlength=size),
        np.bincount(place, value, minlength=size),
    )


def _together(rows: _Rows, drawn: DrawnSources) -> list[Floats]:
    takes = rows.states.takes
    count_BL = _pairs(rows, drawn)
    own_B = _own_takes(rows, drawn)
    other_RL = takes.takes_U[rows.history_RL].astype(np.float32)
    own_B1 = own_B.astype(np.float32)[:, None]
    near_BL = count_BL / np.sqrt((own_B1 + 2) * (other_RL + 2))
    usual_BL = np.sqrt((own_B1 + 1) * (other_RL + 1)) * rows.known_RL
    sum_B = count_BL.sum(1)
    return [
        np.log1p(sum_B),
        np.log1p(count_BL.max(1)),
        (near_BL * rows.weight_RL).sum(1) / rows.weights_R,
        near_BL.max(1),
        np.log((sum_B + 0.5) / (usual_BL.sum(1) + 1.0)),
    ]


def _pairs(rows: _Rows, drawn: DrawnSources) -> NDArray[np.float32]:
    """Pairs of takes of target and history item: of the two lists of partners the one that counts more."""
    takes, hash_U = rows.states.takes, rows.states.hash_U
    target_B, history_RL = hash_U[rows.target_B], hash_U[rows.history_RL]
    partner_BP, partner_RLP = takes.partner_UP[rows.target_B], takes.partner_UP[rows.history_RL]
    B, L = len(target_B), history_RL.shape[1]
    P = partner_BP.shape[1]
    count_BL = np.zeros((B, L), np.float32)
    found = np.flatnonzero(partner_BP[:, None, :] == history_RL[:, :, None])
    place = found // P
    count_BL.ravel()[place] = takes.together_UP[rows.target_B][place // L, found % P]
    found = np.flatnonzero(partner_RLP == target_B[:, None, None])
    place = found // P
    row_R = place // L if len(history_RL) > 1 else np.zeros(len(place), np.int64)
    theirs = takes.together_UP[rows.history_RL[row_R, place % L], found % P]
    count_BL.ravel()[place] = np.maximum(count_BL.ravel()[place], theirs)
    some = np.flatnonzero(drawn.second_B > NEVER)
    if len(some) and drawn.partner_BM.shape[1]:
        mine_SL = history_RL[some if len(history_RL) > 1 else np.zeros(len(some), np.int64)]
        counted_SL = (mine_SL[:, :, None] == drawn.partner_BM[some][:, None, :]).sum(2)
        count_BL[some] = np.maximum(count_BL[some] - counted_SL, 0)
    return count_BL


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
