"""The trainer's own copy of the representation center: item ids as small integers, vectors as rows of one matrix."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.items import ItemEmbedding

_UNKNOWN_TIME = np.nan


@dataclass(frozen=True, slots=True)
class _Held:
    vector: NDArray[np.float32]
    published_at: float
    content: str


class Catalogue:
    """Items met so far, numbered in the order in which behaviours met them.

    Vectors of items that no behaviour has named yet wait aside: were they numbered as they arrive, the order of a
    batch's items, and with it the last digit of every sum, would depend on how the topics' fetches interleave.

    Row 0 is padding and belongs to no item. A number is never given twice, so histories may hold numbers of items that
    were deleted since; their vector is gone (`has_vector` false).
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._numbers: dict[str, int] = {}
        self._unmet: dict[str, _Held] = {}
        self._ids: list[str] = [""]
        self._contents: list[str] = [""]
        self._vectors = np.zeros((1024, dim), np.float32)
        self._has_vector = np.zeros(1024, bool)
        self._published_at = np.full(1024, _UNKNOWN_TIME)
        self._hashes = np.zeros((1024, 2), np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def number(self, item_id: str) -> int:
        """The item's number; a new one if it was never met."""
        number = self._numbers.get(item_id)
        if number is None:
            number = len(self._ids)
            self._numbers[item_id] = number
            self._ids.append(item_id)
            self._contents.append("")
            if number >= len(self._vectors):
                self._grow()
            self._hashes[number] = id_hashes(item_id)
            held = self._unmet.pop(item_id, None)
            if held is not None:
                self._write(number, held)
        return number

    def find(self, item_id: str) -> int | None:
        """The item's number, None if no behaviour has named it yet."""
        return self._numbers.get(item_id)

    def item_id(self, number: int) -> str:
        """The item behind a number."""
        return self._ids[number]

    def hold(self, embedding: ItemEmbedding) -> None:
        """Take over the item's newest vector. Raises `ValueError` on another width."""
        if embedding.dim != self.dim:
            raise ValueError(f"item {embedding.item_id} has a {embedding.dim}-d vector, expected {self.dim}-d")
        held = _Held(np.frombuffer(embedding.vector, "<f4"), embedding.published_at.timestamp(), embedding.content_hash)
        number = self.find(embedding.item_id)
        if number is None:
            self._unmet[embedding.item_id] = held
        else:
            self._write(number, held)

    def drop(self, item_id: str) -> None:
        """Forget the vector of a deleted item."""
        self._unmet.pop(item_id, None)
        number = self.find(item_id)
        if number is None:
            return
        self._vectors[number] = 0
        self._has_vector[number] = False
        self._contents[number] = ""

    def has_vector(self, number: int) -> bool:
        """Whether the item has a vector now."""
        return bool(self._has_vector[number])

    def content(self, number: int) -> str:
        """Content hash of the item's vector; empty if it has none."""
        return self._contents[number]

    def published_at(self, number: int) -> float:
        """When the item went on sale, seconds since 1970; NaN if unknown."""
        return float(self._published_at[number])

    def vectors(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of these items, shape (len(numbers), dim); zero rows where there is none."""
        return self._vectors[numbers]

    def vector_mask(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these items have a vector."""
        return self._has_vector[numbers]

    def hashes(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Two stable hashes of each item's id, shape (len(numbers), 2)."""
        return self._hashes[numbers]

    def _write(self, number: int, held: _Held) -> None:
        self._vectors[number] = held.vector
        self._has_vector[number] = True
        self._published_at[number] = held.published_at
        self._contents[number] = held.content

    def _grow(self) -> None:
        size = 2 * len(self._vectors)
        self._vectors = np.resize(self._vectors, (size, self.dim))
        self._vectors[size // 2 :] = 0
        self._has_vector = np.concatenate([self._has_vector, np.zeros(size // 2, bool)])
        self._published_at = np.concatenate([self._published_at, np.full(size // 2, _UNKNOWN_TIME)])
        self._hashes = np.concatenate([self._hashes, np.zeros((size // 2, 2), np.int64)])


def id_hashes(identifier: str) -> tuple[int, int]:
    """Two independent non-negative 63-bit hashes of an id: the same in every process and for ever."""
    digest = hashlib.blake2b(identifier.encode(), digest_size=16).digest()
    first = int.from_bytes(digest[:8], "little") >> 1
    second = int.from_bytes(digest[8:], "little") >> 1
    return first, second
