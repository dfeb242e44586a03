"""Recorded impressions as columns: items, histories and rows, the data of every offline model.

Shapes: I items (row 0 is padding), E encoder versions, V embedding width, A attributes, T takes, N impressions,
F dense features, L history length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from trainer.samples.histories import next_takes


@dataclass(frozen=True, eq=False)
class ItemColumns:
    """All items, then all queries; row 0 is padding in every array."""

    item_ids: list[str]
    """`item_ids[0]` is empty."""
    vectors_EIV: NDArray[np.float32]
    """Unit rows per encoder version, oldest first; zero rows where there is no vector. Versions never mix."""
    has_vector_EI: NDArray[np.bool_]
    hashes_I2: NDArray[np.int64]
    """Two hashes of each id (`trainer.samples.catalogue.id_hashes`)."""
    category_I: NDArray[np.int64]
    """Number of the category, 0 unknown."""
    attributes_IA: NDArray[np.float32]
    """Attributes known at publish time: standardised, NaN-free, with a flag for each that may be unknown."""
    attribute_names: tuple[str, ...]
    titles: list[str]
    """Title and text, for language models; of a query its words."""
    queries: int = 0
    """So many of the last rows are what was searched instead of items: they have a vector, hashes and words, no
    category and no attributes, and are neither a target nor taken."""

    def __len__(self) -> int:
        return len(self.item_ids)


@dataclass(frozen=True, eq=False)
class Histories:
    """All takes of all users, contiguous per user, oldest first."""

    item_T: NDArray[np.int32]
    second_T: NDArray[np.int64]
    next_T: NDArray[np.int64] | None = None
    """Position of the user's next take of the same item, T where there is none; None if no take has one."""

    @classmethod
    def of(cls, user_T: NDArray[np.int64], item_T: NDArray[np.int64], second_T: NDArray[np.int64]) -> Histories:
        """Histories of takes in this order."""
        next_T = next_takes(user_T, item_T)
        again = bool((next_T < len(next_T)).any())
        return cls(item_T.astype(np.int32), second_T, next_T if again else None)

    def lengths(self, start_N: NDArray[np.int64], stop_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of distinct items in each slice."""
        if self.next_T is None:
            return stop_N - start_N
        again_T = np.zeros(len(self.item_T) + 1, np.int64)
        again_T[self.next_T[self.next_T < len(self.item_T)]] = 1  # a take of an item that the slice holds before it
        before_T = np.cumsum(again_T) - again_T
        return np.asarray(stop_N - start_N - (before_T[stop_N] - before_T[start_N]))

    def newest(
        self, start_N: NDArray[np.int64], stop_N: NDArray[np.int64], length: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The newest `length` items of each slice, each at its newest take: (slice, position, age in items).

        Sorted by slice; within a slice the newest first.
        """
        count_N, width = stop_N - start_N, length
        longest = int(count_N.max(initial=0))
        while True:
            back_N = np.minimum(count_N, width)
            row_P = np.repeat(np.arange(len(count_N)), back_N)
            first_N = np.cumsum(back_N) - back_N
            place_P = stop_N[row_P] - 1 - (np.arange(len(row_P)) - first_N[row_P])
            if self.next_T is not None:
                shown = self.next_T[place_P] >= stop_N[row_P]
                row_P, place_P = row_P[shown], place_P[shown]
                back_N = np.bincount(row_P, minlength=len(count_N))
                first_N = np.cumsum(back_N) - back_N
            if width >= longest or bool(((back_N >= length) | (count_N <= width)).all()):
                break
            width = min(2 * width, longest)
        age_P = np.arange(len(row_P)) - first_N[row_P]
        near = age_P < length
        return row_P[near], place_P[near], age_P[near]


@dataclass(frozen=True, eq=False)
class ImpressionColumns:
    """N impressions in order of time."""

    user_N: NDArray[np.int64]
    item_N: NDArray[np.int64]
    second_N: NDArray[np.int64]
    """Event time; midnight where only days are known."""
    label_N: NDArray[np.int8]
    retaken_N: NDArray[np.bool_]
    """The item is in the user's history."""
    history_start_N: NDArray[np.int64]
    history_stop_N: NDArray[np.int64]
    """Slice of `Histories` before the impression's second; an item that it holds several times counts once."""
    encoder_N: NDArray[np.int64]
    """The encoder version, of E, of this row's vectors."""
    dense_NF: NDArray[np.float32]
    """Features as of the impression, NaN-free."""
    dense_names: tuple[str, ...]
    query_N: NDArray[np.int64] | None = None
    """Row of `ItemColumns` of what was searched, 0 for nothing; None where no row has any."""
    trigger_N: NDArray[np.int64] | None = None
    """The item that was looked at just before, 0 where that is not known; None where it never is."""

    def __len__(self) -> int:
        return len(self.user_N)

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> ImpressionColumns:
        """These rows, in this order."""
        columns = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "dense_names"}
        return replace(self, **{name: column[rows] for name, column in columns.items() if column is not None})


@dataclass(frozen=True, eq=False)
class CtrData:
    """Impressions with the items and histories that they index."""

    items: ItemColumns
    histories: Histories
    rows: ImpressionColumns

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> CtrData:
        """These impressions; items and histories are shared."""
        return replace(self, rows=self.rows.select(rows))


def history_matrix(data: CtrData, rows: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Histories of these rows as item numbers, newest first, 0-padded: (len(rows), longest of them, at most `length`).

    The width is at least 1, so that a batch without histories still has a column of padding.
    """
    start, stop = data.rows.history_start_N[rows], data.rows.history_stop_N[rows]
    if data.histories.next_T is not None:
        row_P, place_P, age_P = data.histories.newest(start, stop, length)
        found = np.zeros((len(rows), int(age_P.max(initial=0)) + 1), np.int64)
        found[row_P, age_P] = data.histories.item_T[place_P]
        return found
    width = max(1, min(length, int((stop - start).max(initial=0))))
    if not len(data.histories.item_T):
        return np.zeros((len(rows), width), np.int64)
    place = stop[:, None] - 1 - np.arange(width)
    taken = data.histories.item_T.take(place, mode="clip")
    return np.multiply(taken, place >= start[:, None], dtype=np.int64)
