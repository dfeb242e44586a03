"""Recorded impressions as columns: items, histories and rows, the data of every offline model.

Shapes: I items (row 0 is padding), E encoder versions, V embedding width, A attributes, T takes, N impressions,
F dense features, L history length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ItemColumns:
    """All items; row 0 is padding in every array."""

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
    """Title and text, for language models."""

    def __len__(self) -> int:
        return len(self.item_ids)


@dataclass(frozen=True, eq=False)
class Histories:
    """All takes of all users, contiguous per user, oldest first."""

    item_T: NDArray[np.int32]
    second_T: NDArray[np.int64]


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
    """Slice of `Histories` before the impression's second."""
    encoder_N: NDArray[np.int64]
    """The encoder version, of E, of this row's vectors."""
    dense_NF: NDArray[np.float32]
    """Features as of the impression, NaN-free."""
    dense_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.user_N)

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> ImpressionColumns:
        """These rows, in this order."""
        columns = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "dense_names"}
        return replace(self, **{name: column[rows] for name, column in columns.items()})


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
    width = max(1, min(length, int((stop - start).max(initial=0))))
    if not len(data.histories.item_T):
        return np.zeros((len(rows), width), np.int64)
    place = stop[:, None] - 1 - np.arange(width)
    taken = data.histories.item_T.take(place, mode="clip")
    return np.multiply(taken, place >= start[:, None], dtype=np.int64)
