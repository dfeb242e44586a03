"""The features of the moment over a folder's rows, as the live trainer computes them: steps of rows in order of time.

Letters: N rows, T takes, I items.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from trainer.datasets.exposures import PUBLISHED_AT_IS, how_published
from trainer.datasets.folder import DataSet
from trainer.features.columns import features
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState
from trainer.features.take_columns import TakeColumns
from trainer.offline.as_of import DrawnFrom, Takes
from trainer.offline.data import Histories, ImpressionColumns
from trainer.offline.event_index import EventIndex
from trainer.samples.item_facts import FactRows, facts_of

STEP_ROWS = 256
"""Rows of a step of the live trainer, by default."""
_ITEMS_AT_ONCE = 4_096


def folder_facts(config: FeatureConfig, data: DataSet, *, outcomes: Collection[str] = (), queries: int = 0) -> FactRows:
    """Facts of a folder's items by item number, as a live trainer has them: without outcomes, none of queries."""
    facts = FactRows.empty(config, len(data.item_ids) + 1 + queries)
    known = how_published(data)
    for start in range(0, len(data.item_ids), _ITEMS_AT_ONCE):
        for number, record in enumerate(data.records(start, start + _ITEMS_AT_ONCE), start):
            row = facts_of(
                config,
                category=record.category,
                price=record.price,
                year=record.year,
                attributes=record.described_without(outcomes),
                published_at=float(record.publish_ts),
                published_at_is=PUBLISHED_AT_IS[known[number]],
                title=record.title,
            )
            facts.put(number + 1, row)
    return facts


class FixedItems:
    """Items of a folder and behind them its queries, all known from the start."""

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
        done = _until(columns, before)
        state.add(columns.select(slice(0, done)), before=before)
    for start in range(0, len(rows), step_rows):
        chunk = np.arange(start, min(start + step_rows, len(rows)))
        out_NF[chunk] = _step(state, rows, chunk, histories, source_N[chunk], sources.second_N[chunk])
        before = int(rows.second_N[chunk[-1]])
        until = _until(columns, before)
        state.add(columns.select(slice(done, until)), before=before)
        done = until
    return out_NF


def state_leaks(
    config: FeatureConfig,
    found_NF: NDArray[np.float32],
    rows: ImpressionColumns,
    takes: Takes,
    sources: DrawnFrom,
    *,
    step_rows: int = STEP_ROWS,
) -> list[str]:
    """One message per way in which the counts of takes differ from those that a row may know, by another computation.

    A row knows the takes before the second of the last row of the step before it, and not the take that it was drawn
    from.
    """
    last_N = np.maximum(np.arange(len(rows)) // step_rows * step_rows - 1, 0)
    before_N = rows.second_N[last_N]
    counted = ~takes.announces_T
    index = EventIndex(takes.item_T[counted], takes.second_T[counted])
    source_N = sources.second_N < before_N
    expected_N = index.count(rows.item_N, before_N) - source_N
    takes_N = np.expm1(found_NF[:, config.names.index("takes")].astype(np.float64))
    wrong_N = np.abs(takes_N - expected_N) > 0.01 * (1 + expected_N)
    messages: list[str] = []
    for some_N, wanted in ((source_N, "without the take that it was drawn from"), (~source_N, "before its last step")):
        if count := int((wrong_N & some_N).sum()):
            messages.append(f"{count} rows know other takes of their item than those {wanted}")
    return messages


def _until(columns: TakeColumns, before: int) -> int:
    """Number of takes of earlier seconds; they are in order."""
    return int(np.searchsorted(columns.second_T, before))


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
        *(None if led_T is None else np.where(alone, 0, led_T[order]) for led_T in (takes.query_T, takes.trigger_T)),
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
    if rows.trigger_N is not None:
        trigger_B, second_B = rows.trigger_N[chunk], rows.second_N[chunk]
        history_BL, seconds_BL = _newest(trigger_B, trigger_B, history_BL), _newest(trigger_B, second_B, seconds_BL)
    query_B = np.zeros(len(chunk), np.int64) if rows.query_N is None else rows.query_N[chunk]
    numbers_U, places = np.unique(np.concatenate([[0], target_B, query_B, history_BL.ravel()]), return_inverse=True)
    (target_place_B, query_place_B), places_BL = (
        places[1 : 1 + 2 * len(chunk)].reshape(2, -1),
        places[1 + 2 * len(chunk) :],
    )
    return features(
        state.config,
        state.states(numbers_U),
        target_place_B,
        places_BL.reshape(history_BL.shape),
        seconds_BL,
        rows.second_N[chunk],
        state.sources(target_B, source_B, source_second_B),
        query_place_B,
    )


def _newest(has_B: NDArray[np.int64], newest_B: NDArray[np.int64], history_BL: NDArray[np.int64]) -> NDArray[np.int64]:
    """Histories with these as the newest, in place of the oldest, where `has_B` is not 0."""
    moved_BL = np.concatenate([newest_B[:, None], history_BL[:, :-1]], axis=1)
    return np.where(has_B[:, None] > 0, moved_BL, history_BL)
