"""Counts, sums and last times of a key's events strictly before a second, for many queries at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class EventIndex:
    """Events by key in order of time. Every query returns events strictly before its second.

    Events of that second are excluded, since one of them may be the target of a prediction.
    """

    def __init__(
        self, key_T: NDArray[np.int64], second_T: NDArray[np.int64], value_T: NDArray[np.float64] | None = None
    ) -> None:
        self._keys, number = np.unique(key_T, return_inverse=True)
        self._base = int(second_T.min()) if len(second_T) else 0
        self._span = (int(second_T.max()) - self._base + 2) if len(second_T) else 2
        place = number.reshape(-1) * self._span + (second_T - self._base)
        order = np.argsort(place, kind="stable")
        self._place = place[order]
        self._order = order
        self._second = second_T[order]
        self._starts = np.searchsorted(self._place, np.arange(len(self._keys)) * self._span)
        self._sums = None if value_T is None else np.concatenate([[0.0], np.cumsum(value_T[order])])

    def bounds(
        self, key_N: NDArray[np.int64], second_N: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Slice of the ordered events of each query."""
        if not len(self._keys):
            return np.zeros(len(key_N), np.int64), np.zeros(len(key_N), np.int64)
        number = np.minimum(np.searchsorted(self._keys, key_N), len(self._keys) - 1)
        known = self._keys[number] == key_N
        wanted = number * self._span + np.clip(second_N - self._base, 0, self._span - 1)
        stop = np.searchsorted(self._place, wanted, side="left")
        return np.where(known, self._starts[number], 0), np.where(known, stop, 0)

    def count(self, key_N: NDArray[np.int64], second_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of events."""
        start, stop = self.bounds(key_N, second_N)
        return stop - start

    def recent(self, key_N: NDArray[np.int64], second_N: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Number of events in the `length` seconds before."""
        return self.count(key_N, second_N) - self.count(key_N, second_N - length)

    def total(self, key_N: NDArray[np.int64], second_N: NDArray[np.int64]) -> NDArray[np.float64]:
        """Sum of the events' values. Raises `ValueError` without values."""
        if self._sums is None:
            raise ValueError("these events were given no values")
        start, stop = self.bounds(key_N, second_N)
        return np.asarray(self._sums[stop] - self._sums[start])

    def last(self, key_N: NDArray[np.int64], second_N: NDArray[np.int64], *, skip: int = 0) -> NDArray[np.float64]:
        """Second of the newest event after skipping `skip`, NaN where there is none."""
        start, stop = self.bounds(key_N, second_N)
        if not len(self._second):
            return np.full(len(key_N), np.nan)
        place = stop - 1 - skip
        return np.where(place >= start, self._second[np.maximum(place, 0)], np.nan)

    def newest(self, key_N: NDArray[np.int64], second_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Position of the newest event in the constructor's arrays, -1 where there is none."""
        start, stop = self.bounds(key_N, second_N)
        if not len(self._order):
            return np.full(len(key_N), -1, np.int64)
        return np.where(stop > start, self._order[np.maximum(stop - 1, 0)], -1)
