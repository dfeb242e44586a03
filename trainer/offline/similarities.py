"""Similarities of content between target and history, in the space of the row's encoder version."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.offline.data import CtrData
from trainer.offline.history_features import HALF_LIFE, HISTORY, largest

NAMES = ("cosine mean", "cosine largest", "cosine recent", "cosine newest", "cosine known", "has vector")
_ROWS_PER_PASS = 32_768
_PAIRS_PER_PASS = 65_536


def similarity_features(data: CtrData) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Cosines of target and history by the row's encoder version, shape (N, 6), with names; zeros without vectors.

    A trigger item is the newest of the history. Where rows have queries, there is a seventh: that of target and query.
    """
    vectors, has = data.items.vectors_EIV, data.items.has_vector_EI
    names: tuple[str, ...] = NAMES if data.rows.query_N is None else (*NAMES, "cosine query")
    out = np.zeros((len(data), len(names)), np.float32)
    rows = data.rows
    for start in range(0, len(data), _ROWS_PER_PASS):
        chunk = np.arange(start, min(start + _ROWS_PER_PASS, len(data)))
        row_P, history_P, back_P = _histories(data, chunk)
        target_P, version_P = rows.item_N[chunk][row_P], rows.encoder_N[chunk][row_P]
        known_P = has[version_P, history_P] & has[version_P, target_P]
        row_P, back_P = row_P[known_P], back_P[known_P]
        cosine_P = _cosines(vectors, version_P[known_P], target_P[known_P], history_P[known_P])
        n = len(chunk)
        weight_P = np.exp2(-back_P / HALF_LIFE)
        count_N = np.bincount(row_P, minlength=n)
        out[chunk, 0] = np.bincount(row_P, cosine_P, minlength=n) / np.maximum(count_N, 1)
        out[chunk, 1] = largest(row_P, cosine_P, n)
        out[chunk, 2] = np.bincount(row_P, cosine_P * weight_P, minlength=n) / np.maximum(
            np.bincount(row_P, weight_P, minlength=n), 1e-9
        )
        out[chunk, 3] = np.bincount(row_P, cosine_P * (back_P == 0), minlength=n)
        out[chunk, 4] = count_N > 0
        out[chunk, 5] = has[rows.encoder_N[chunk], rows.item_N[chunk]]
        if rows.query_N is not None:
            # items and queries without a vector are zero rows
            out[chunk, 6] = _cosines(vectors, rows.encoder_N[chunk], rows.item_N[chunk], rows.query_N[chunk])
    return out, names


def _histories(data: CtrData, chunk: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """Row of the chunk, item and age in items of what each row has in its history, sorted by row, newest first."""
    rows = data.rows
    row_P, place_P, back_P = data.histories.newest(rows.history_start_N[chunk], rows.history_stop_N[chunk], HISTORY)
    history_P = data.histories.item_T[place_P].astype(np.int64)
    if rows.trigger_N is None:
        return row_P, history_P, back_P
    trigger_N = rows.trigger_N[chunk]
    triggered = np.flatnonzero(trigger_N)
    row_P = np.concatenate([triggered, row_P])
    history_P = np.concatenate([trigger_N[triggered], history_P])
    back_P = np.concatenate([np.zeros(len(triggered), np.int64), back_P + (trigger_N[row_P[len(triggered) :]] > 0)])
    kept = np.argsort(row_P, kind="stable")
    kept = kept[back_P[kept] < HISTORY]
    return row_P[kept], history_P[kept], back_P[kept]


def _cosines(
    vectors: NDArray[np.float32], version_P: NDArray[np.int64], one_P: NDArray[np.int64], other_P: NDArray[np.int64]
) -> NDArray[np.float64]:
    found = np.empty(len(one_P))
    for start in range(0, len(one_P), _PAIRS_PER_PASS):
        part = slice(start, start + _PAIRS_PER_PASS)
        found[part] = np.einsum(
            "pv,pv->p", vectors[version_P[part], one_P[part]], vectors[version_P[part], other_P[part]]
        )
    return found
