"""Item numbers as the join and the sampler use them, and which of the items have a vector."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class ItemNumbers(Protocol):
    """Items as small integers; number 0 is padding and belongs to no item."""

    def number(self, item_id: str) -> int:
        """The item's number; a new one for a new item."""
        ...

    def find(self, item_id: str) -> int | None:
        """The item's number, None if it has none yet."""
        ...

    def item_id(self, number: int) -> str:
        """The item with this number."""
        ...

    def has_vector(self, number: int) -> bool:
        """Whether the item has a vector."""
        ...

    def vector_mask(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`has_vector` of many numbers."""
        ...

    def content(self, number: int) -> str:
        """Hash of the item's content; empty if unknown."""
        ...


class FeatureNumbers:
    """Numbers of items whose features are rows of one table: the row is the number, row 0 is padding.

    Other items get numbers beyond the table and have no vector.
    """

    def __init__(self, item_ids: list[str], contents: list[str]) -> None:
        if len(item_ids) != len(contents):
            raise ValueError(f"{len(item_ids)} items and {len(contents)} contents")
        self._ids = ["", *item_ids]
        self._contents = ["", *contents]
        self._numbers = {item_id: number for number, item_id in enumerate(self._ids) if number}
        if len(self._numbers) != len(item_ids):
            raise ValueError("an item stands twice in the table")
        self.known = len(item_ids)

    def __len__(self) -> int:
        return len(self._ids)

    def number(self, item_id: str) -> int:
        """The item's number; a new one, without vector, if it is not in the table."""
        number = self._numbers.get(item_id)
        if number is None:
            number = self._numbers[item_id] = len(self._ids)
            self._ids.append(item_id)
        return number

    def find(self, item_id: str) -> int | None:
        """The item's number, None if it has none yet."""
        return self._numbers.get(item_id)

    def item_id(self, number: int) -> str:
        """The item with this number."""
        return self._ids[number]

    def has_vector(self, number: int) -> bool:
        """Whether the item is in the table."""
        return 0 < number <= self.known

    def vector_mask(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`has_vector` of many numbers."""
        return np.asarray((numbers > 0) & (numbers <= self.known))

    def content(self, number: int) -> str:
        """Hash of the item's content; an item without vector has none."""
        return self._contents[number] if number <= self.known else ""
