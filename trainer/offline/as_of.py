"""Inputs of the features as of an impression: takes, items, and the sources of drawn exposures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.offline.data import ImpressionColumns
from trainer.offline.event_index import EventIndex
from trainer.offline.facets import Facet

Columns = dict[str, NDArray[Any]]
"""Features by name, N values each."""


@dataclass(frozen=True, eq=False)
class Takes:
    """All takes, in any order; items are numbered from 1."""

    user_T: NDArray[np.int64]
    item_T: NDArray[np.int64]
    second_T: NDArray[np.int64]
    rating_T: NDArray[np.float64] | None
    """Ratings, where the takes are ratings."""
    announces_T: NDArray[np.bool_]
    """The item's publish time was inferred from this take."""
    query_T: NDArray[np.int64] | None = None
    """Numbers of what was searched before, 0 for nothing; None where searches are not read."""
    trigger_T: NDArray[np.int64] | None = None
    """Numbers of the items that were looked at just before, likewise."""


@dataclass(frozen=True, eq=False)
class ItemFacts:
    """Item columns of the features; row 0 is padding."""

    published_I: NDArray[np.int64]
    inferred_I: NDArray[np.bool_]
    """The publish time was inferred from a take."""
    from_start_I: NDArray[np.bool_]
    """Of the set's first 24 hours, so its real age is unknown."""
    unpaired_I: NDArray[np.bool_]
    """Held-out items, which are in no pair."""
    category_I: NDArray[np.int64]
    numbers_I: dict[str, NDArray[np.float64]]
    """Price, year and further ones by name, NaN where unknown."""
    facets: dict[str, Facet]
    """Section, colour, genres and the like, by name."""


@dataclass(frozen=True, eq=False)
class DrawnFrom:
    """The source take of each drawn exposure; features of the exposure leave it out.

    A positive's features exclude its own take, which has the same second. A negative that was drawn from a take of an
    hour ago would count that take in its popularity: items with few takes would be popular exactly where they are
    negatives, and popularity would leak the label, inverted.
    """

    take_N: NDArray[np.int64]
    """Position in the takes, -1 for rows that were not drawn or whose source is in no count."""
    user_N: NDArray[np.int64]
    second_N: NDArray[np.int64]
    """The largest integer where there is no source."""

    @staticmethod
    def of(take_N: NDArray[np.int64], takes: Takes) -> DrawnFrom:
        """Look up the takes; a take that announces its item is in no count and so is no source."""
        if not len(takes.user_T):
            return DrawnFrom.none(len(take_N))
        take_N = np.where((take_N >= 0) & ~takes.announces_T[take_N], take_N, -1)
        second = np.where(take_N >= 0, takes.second_T[take_N], np.iinfo(np.int64).max)
        return DrawnFrom(take_N, np.where(take_N >= 0, takes.user_T[take_N], -1), second)

    @staticmethod
    def none(rows: int) -> DrawnFrom:
        """No row was drawn from a take."""
        nowhere = np.full(rows, -1, np.int64)
        return DrawnFrom(nowhere, nowhere, np.full(rows, np.iinfo(np.int64).max))


class ItemTakes:
    """Takes of each row's target before the row's second, without the row's source and the announcing take."""

    def __init__(self, rows: ImpressionColumns, takes: Takes, sources: DrawnFrom) -> None:
        self._rows, self._source_N = rows, sources.second_N
        counted = ~takes.announces_T
        self.index = EventIndex(takes.item_T[counted], takes.second_T[counted])

    def count(self) -> NDArray[np.int64]:
        """Number of takes."""
        seen = self._source_N < self._rows.second_N
        return self.index.count(self._rows.item_N, self._rows.second_N) - seen

    def recent(self, length: int) -> NDArray[np.int64]:
        """Number of takes in the `length` seconds before."""
        second = self._rows.second_N
        seen = (self._source_N < second) & (self._source_N >= second - length)
        return self.index.recent(self._rows.item_N, second, length) - seen

    def last(self) -> NDArray[np.float64]:
        """Second of the newest take, NaN where there is none."""
        item, second = self._rows.item_N, self._rows.second_N
        newest = self.index.last(item, second)
        return np.where(newest == self._source_N, self.index.last(item, second, skip=1), newest)
