"""The features of the moment over a folder's rows, as the live trainer computes them: steps of rows in order of time.

Letters: N rows, T takes, I items.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.features.columns import features
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState, TakeColumns
from trainer.offline.as_of import DrawnFrom, Takes
from trainer.offline.data import Histories, ImpressionColumns
from trainer.samples.item_facts import FactRows

STEP_ROWS = 256
"""Rows of a step of the live trainer, by default."""


class FixedItems:
    """Items of a folder, all known from the start."""

    def __init__(self, hashes_I2: NDArray[np.int64], facts: FactRows) -> None:
        self._hashes_I2, self._facts = hashes_I2, facts

    def hashes(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Two hashes of each id."""
        return self._hashes_I2[numbers]

    def facts(self, numbers: NDArray[np.int64]) -> FactRows:
        """What is known of each item beside its takes."""
        return self._facts.rows(numbers)


def live_features(
    config: FeatureConfig,
    items: FixedItems,
    rows: ImpressionColumns,
    histories: Histories,
    takes: Takes,
    sources: DrawnFrom,
    *,
    unpaired_I: NDArray[np.bool_],
    step_rows: int = STEP_ROWS,
) -> NDArray[np.float32]:
    """Features of all rows, shape (N, F). Takes of `unpaired_I` are counted, and in no pair."""
    state = FeatureState(config, items)
    columns = _in_order(takes, unpaired_I)
    out_NF = np.zeros((len(rows), len(config.names)), np.float32)
    source_N = np.where(sources.take_N >= 0, sources.take_N + 1, 0)
    done = 0
    if len(rows):
        before = int(rows.second_N[0])
        until = int(np.searchsorted(columns.second_T, before))
        state.add(columns.select(slice(0, until)), before=before)
        done = until
    for start in range(0, len(rows), step_rows):
        chunk = np.arange(start, min(start + step_rows, len(rows)))
        out_NF[chunk] = _step(state, rows, chunk, histories, source_N[chunk], sources.second_N[chunk])
        before = int(rows.second_N[chunk[-1]])
        until = int(np.searchsorted(columns.second_T, before))
        state.add(columns.select(slice(done, until)), before=before)
        done = until
    return out_NF


def _in_order(takes: Takes, unpaired_I: NDArray[np.bool_]) -> TakeColumns:
    order = np.lexsort((np.arange(len(takes.user_T)), takes.second_T))
    alone = unpaired_I[takes.item_T[order]]
    user_T = np.where(alone, -1 - np.arange(len(order)), takes.user_T[order])
    return TakeColumns(
        user_T.astype(np.int64),
        takes.item_T[order].astype(np.int64),
        takes.second_T[order],
        order + 1,
        takes.announces_T[order],
    )


def _step(
    state: FeatureState,
    rows: ImpressionColumns,
    chunk: NDArray[np.int64],
    histories: Histories,
    source_B: NDArray[np.int64],
    source_second_B: NDArray[np.int64],
) -> NDArray[np.float32]:
    target_B = rows.item_N[chunk]
    place_BL = rows.history_stop_N[chunk][:, None] - 1 - np.arange(state.config.history_length)
    held_BL = place_BL >= rows.history_start_N[chunk][:, None]
    if len(histories.item_T):
        history_BL = np.where(held_BL, histories.item_T.take(place_BL, mode="clip"), 0).astype(np.int64)
        seconds_BL = np.where(held_BL, histories.second_T.take(place_BL, mode="clip"), 0)
    else:
        history_BL, seconds_BL = np.zeros(held_BL.shape, np.int64), np.zeros(held_BL.shape, np.int64)
    numbers_U, places = np.unique(np.concatenate([[0], target_B, history_BL.ravel()]), return_inverse=True)
    return features(
        state.config,
        state.states(numbers_U),
        places[1 : 1 + len(chunk)],
        places[1 + len(chunk) :].reshape(history_BL.shape),
        seconds_BL,
        rows.second_N[chunk],
        state.sources(target_B, source_B, source_second_B),
    )
