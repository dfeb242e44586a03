"""The items of one request as rows of arrays; free of torch, as caches of vectors hand them out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from trainer.catalogue import hash_columns


@dataclass(frozen=True, eq=False)
class ItemRows(Mapping[str, NDArray[np.float32]]):
    """Vectors by item as rows of one matrix, with what else the network reads of an item. Row 0 is padding.

    A mapping of the items that have a vector. Every item asked for has a place, whether it has a vector or not.
    """

    place: Mapping[str, int]
    """Row of each item, from 1 on, in this order."""
    vectors_UV: NDArray[np.float32]
    """Zero rows where there is no vector."""
    has_vector_U: NDArray[np.bool_]
    hashes_U2: NDArray[np.int64]

    @classmethod
    def of(cls, items: Sequence[str], vectors: Mapping[str, NDArray[np.float32]], dim: int) -> ItemRows:
        """Rows of these items (each once) from a mapping. `dim` is the width of the vectors."""
        place = {item: number for number, item in enumerate(dict.fromkeys(items), start=1)}
        rows = cls.empty(place, dim)
        rows.hashes_U2[1:] = hash_columns(list(place))
        rows.fill({item: vectors[item] for item in place if item in vectors})
        return rows

    @classmethod
    def empty(cls, place: Mapping[str, int], dim: int) -> ItemRows:
        """Rows to be filled in: no vectors, no hashes."""
        count = len(place) + 1
        return cls(place, np.zeros((count, dim), np.float32), np.zeros(count, bool), np.zeros((count, 2), np.int64))

    def fill(self, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        """Write the vectors of these items, all of which have a place; before the rows are handed out."""
        for item, vector in vectors.items():
            number = self.place[item]
            self.vectors_UV[number], self.has_vector_U[number] = vector, True

    def __getitem__(self, item: str) -> NDArray[np.float32]:
        number = self.place[item]
        if not self.has_vector_U[number]:
            raise KeyError(item)
        row: NDArray[np.float32] = self.vectors_UV[number]
        return row

    def __iter__(self) -> Iterator[str]:
        return compress(self.place, self.has_vector_U[1:].tolist())

    def __len__(self) -> int:
        return int(np.count_nonzero(self.has_vector_U))
