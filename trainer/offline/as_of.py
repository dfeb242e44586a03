"""What features as of a moment are made from: takes, items, and where drawn exposures come from."""

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
    """Everything that was taken, in any order; items are numbered from 1."""

    user_T: NDArray[np.int64]
    item_T: NDArray[np.int64]
    second_T: NDArray[np.int64]
    rating_T: NDArray[np.float64] | None
    """Where takes are ratings."""
    announces_T: NDArray[np.bool_]
    """The item's publish time was inferred from this take."""


@dataclass(frozen=True, eq=False)
class ItemFacts:
    """What features need of items; row 0 is padding."""

    published_I: NDArray[np.int64]
    inferred_I: NDArray[np.bool_]
    """The publish time was inferred from a take."""
    from_start_I: NDArray[np.bool_]
    """Of the set's first 24 hours: its publish time says nothing about its age."""
    unpaired_I: NDArray[np.bool_]
    """Held-out items: in no pair."""
    category_I: NDArray[np.int64]
    numbers_I: dict[str, NDArray[np.float64]]
    """Price, year and further ones by name, NaN where unknown."""
    facets: dict[str, Facet]
    """Section, colour, genres and the like, by name."""


@dataclass(frozen=True, eq=False)
class DrawnFrom:
    """The take that each drawn exposure was drawn from; features of that exposure are made as if it had not been.

    A positive's features never see its own take, which lies at its very second. A negative that was drawn from a take
    of an hour ago would see that take among its popularity: items with few takes would be popular exactly where they
    are negatives, and popularity would give the label away, upside down.
    """

    take_N: NDArray[np.int64]
    """Place among the takes, -1 for rows that were not drawn or whose source counts nowhere."""
    user_N: NDArray[np.int64]
    second_N: NDArray[np.int64]
    """After everything where there is no source."""

    @staticmethod
    def of(take_N: NDArray[np.int64], takes: Takes) -> DrawnFrom:
        """Look up the takes; one that announces its item is in no count and so is no source."""
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
    """Takes of each row's target before the row's second, its source and what announced the item left out."""

    def __init__(self, rows: ImpressionColumns, takes: Takes, sources: DrawnFrom) -> None:
        self._rows, self._source_N = rows, sources.second_N
        counted = ~takes.announces_T
        self.past = EventIndex(takes.item_T[counted], takes.second_T[counted])

    def count(self) -> NDArray[np.int64]:
        """How many."""
        seen = self._source_N < self._rows.second_N
        return self.past.count(self._rows.item_N, self._rows.second_N) - seen

    def recent(self, length: int) -> NDArray[np.int64]:
        """How many in the `length` seconds before."""
        second = self._rows.second_N
        seen = (self._source_N < second) & (self._source_N >= second - length)
        return self.past.recent(self._rows.item_N, second, length) - seen

    def last(self) -> NDArray[np.float64]:
        """Second of the newest, NaN where there is none."""
        item, second = self._rows.item_N, self._rows.second_N
        newest = self.past.last(item, second)
        return np.where(newest == self._source_N, self.past.last(item, second, skip=1), newest)
