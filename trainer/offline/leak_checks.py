"""Checks for label leakage, run on every data set before models are trained on it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.offline.data import CtrData


def leaks(data: CtrData, *, encoder_stops: NDArray[np.int64], learned_from_N: NDArray[np.bool_]) -> list[str]:
    """One message per leak found.

    `encoder_stops`: per encoder version, the second before which all its training data lies. `learned_from_N`: rows
    that models are trained on.
    """
    rows, histories = data.rows, data.histories
    found = []
    some = rows.history_stop_N > rows.history_start_N
    newest = np.where(some, rows.history_stop_N - 1, 0)
    if len(histories.second_T):
        late = some & (histories.second_T[newest] >= rows.second_N)
        if late.any():
            found.append(f"{int(late.sum())} histories reach into the second or day of their own impression")
    newer = encoder_stops[rows.encoder_N] > rows.second_N
    if newer.any():
        found.append(f"{int(newer.sum())} impressions are served by an encoder that saw their second or later")
    retaken = learned_from_N & rows.retaken_N
    if retaken.any():
        found.append(f"{int(retaken.sum())} re-takes are learned from")
    if not np.isfinite(rows.dense_NF).all():
        found.append("features hold values that are not numbers")
    if np.any(np.diff(rows.second_N) < 0):
        found.append("impressions are not in order of time")
    return found
