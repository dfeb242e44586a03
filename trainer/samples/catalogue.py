"""The trainer's copy of the representation center: item ids as small integers, vectors as rows of one matrix."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.items import ItemEmbedding
from trainer.changed_rows import ChangedRows
from trainer.samples.id_hashes import id_hashes
from trainer.state import State, Table
from trainer.tables import Slots

_UNKNOWN_TIME = np.nan


@dataclass(frozen=True, slots=True)
class _Embedding:
    item_id: str
    vector: NDArray[np.float32]
    published_at: float
    content: str


class Catalogue:
    """Items numbered in the order in which behaviours first named them.

    Vectors of items that no behaviour has named yet are stored apart: were they numbered on arrival, the order of a
    batch's items, and with it the last digit of every sum, would depend on how the topics' fetches interleave.

    Row 0 is padding and belongs to no item. A number is never reused, so histories may contain numbers of items that
    were deleted since and have no vector (`has_vector` false).
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._numbers: dict[str, int] = {}
        self._unnamed: dict[str, int] = {}
        self._unnamed_rows: Slots[_Embedding] = Slots()
        self._changed = ChangedRows()
        self._ids: list[str] = [""]
        self._contents: list[str] = [""]
        self._digests: dict[int, bytes] = {}
        self._vectors = np.zeros((1024, dim), np.float32)
        self._has_vector = np.zeros(1024, bool)
        self._published_at = np.full(1024, _UNKNOWN_TIME)
        self._hashes = np.zeros((1024, 2), np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def number(self, item_id: str) -> int:
        """The item's number; a new one for a new item."""
        number = self._numbers.get(item_id)
        if number is None:
            number = len(self._ids)
            self._numbers[item_id] = number
            self._ids.append(item_id)
            self._contents.append("")
            if number >= len(self._vectors):
                self._grow()
            self._hashes[number] = id_hashes(item_id)
            self._changed.touch(number)
            row = self._unnamed.pop(item_id, None)
            if row is not None:
                self._write(number, self._unnamed_rows.pop(row))
        return number

    def find(self, item_id: str) -> int | None:
        """The item's number, None if no behaviour has named it yet."""
        return self._numbers.get(item_id)

    def item_id(self, number: int) -> str:
        """The item with this number."""
        return self._ids[number]

    def put_embedding(self, embedding: ItemEmbedding) -> None:
        """Store the item's newest vector. Raises `ValueError` on another width."""
        if embedding.dim != self.dim:
            raise ValueError(f"item {embedding.item_id} has a {embedding.dim}-d vector, expected {self.dim}-d")
        item_id, vector = embedding.item_id, np.frombuffer(embedding.vector, "<f4")
        stored = _Embedding(item_id, vector, embedding.published_at.timestamp(), embedding.content_hash)
        number = self.find(item_id)
        if number is not None:
            self._write(number, stored)
        elif item_id in self._unnamed:
            self._unnamed_rows[self._unnamed[item_id]] = stored
        else:
            self._unnamed[item_id] = self._unnamed_rows.add(stored)

    def delete_item(self, item_id: str) -> None:
        """Remove the vector of a deleted item; its number stays."""
        row = self._unnamed.pop(item_id, None)
        if row is not None:
            self._unnamed_rows.pop(row)
        number = self.find(item_id)
        if number is None:
            return
        self._changed.touch(number)
        self._vectors[number] = 0
        self._has_vector[number] = False
        self._contents[number] = ""
        self._digests.pop(number, None)

    def has_vector(self, number: int) -> bool:
        """Whether the item has a vector now."""
        return bool(self._has_vector[number])

    def content(self, number: int) -> str:
        """Content hash of the item's vector; empty if it has none."""
        return self._contents[number]

    def digest(self, number: int) -> bytes:
        """16-byte digest of the item's content hash and vector; empty if it has none."""
        digest = self._digests.get(number)
        if digest is None:
            if not self._has_vector[number]:
                return b""
            digest = self._digests[number] = vector_digest(self._contents[number], self._vectors[number])
        return digest

    def published_at(self, number: int) -> float:
        """Time of publication, seconds since 1970; NaN if unknown."""
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

    def snapshot(self) -> State:
        """Numbers, the newest vectors, and those of items without a number."""
        state = State()
        state.put_table("", Table(len(self._ids), self._changed, self._copied))
        state.put_table("unmet.", self._unnamed_rows.table(self._packed))
        return state

    def _copied(self, numbers: NDArray[np.int64]) -> Callable[[slice], State]:
        rows = numbers.tolist()
        ids, contents = [self._ids[row] for row in rows], [self._contents[row] for row in rows]
        columns = {
            "vectors": self._vectors[numbers],
            "has_vector": self._has_vector[numbers],
            "published_at": self._published_at[numbers],
            "hashes": self._hashes[numbers],
        }

        def packed(part: slice) -> State:
            state = State({name: column[part] for name, column in columns.items()})
            state.put_texts("ids", ids[part])
            state.put_texts("contents", contents[part])
            return state

        return packed

    def _packed(self, rows: Sequence[_Embedding | None]) -> State:
        none = _Embedding("", np.zeros(self.dim, np.float32), _UNKNOWN_TIME, "")
        kept = [row or none for row in rows]
        vectors = np.array([row.vector for row in kept], np.float32).reshape(-1, self.dim)
        state = State({"vectors": vectors, "published_at": np.array([row.published_at for row in kept], np.float64)})
        state.put_texts("ids", (row.item_id for row in kept))
        state.put_texts("contents", (row.content for row in kept))
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`. Raises `ValueError` if its vectors have another width."""
        arrays = state.arrays
        if arrays["vectors"].shape[1] != self.dim:
            raise ValueError(f"vectors are {arrays['vectors'].shape[1]}-d, expected {self.dim}-d")
        self._ids, self._contents = state.texts("ids"), state.texts("contents")
        self._numbers = {item_id: number for number, item_id in enumerate(self._ids) if number}
        self._digests.clear()
        count = len(self._ids)
        while len(self._vectors) < count:
            self._grow()
        for own, kept in (
            (self._vectors, arrays["vectors"]),
            (self._has_vector, arrays["has_vector"]),
            (self._published_at, arrays["published_at"]),
            (self._hashes, arrays["hashes"]),
        ):
            if len(kept) != count:
                raise ValueError(f"{count} items have {len(kept)} rows")
            own[:count] = kept
        unnamed = zip(
            state.texts("unmet.ids"),
            arrays["unmet.vectors"],
            arrays["unmet.published_at"].tolist(),
            state.texts("unmet.contents"),
            strict=True,
        )
        rows = [_Embedding(*row) if row[0] else None for row in unnamed]
        self._unnamed_rows, self._changed = Slots(rows), ChangedRows()
        self._unnamed = {row.item_id: number for number, row in enumerate(rows) if row}

    @property
    def items_with_vector(self) -> list[str]:
        """Ids of all items that have a vector now, numbered or not."""
        numbered = [item_id for item_id, has in zip(self._ids, self._has_vector[: len(self._ids)], strict=True) if has]
        return numbered + list(self._unnamed)

    def _write(self, number: int, embedding: _Embedding) -> None:
        self._changed.touch(number)
        self._digests.pop(number, None)
        self._vectors[number] = embedding.vector
        self._has_vector[number] = True
        self._published_at[number] = embedding.published_at
        self._contents[number] = embedding.content

    def _grow(self) -> None:
        size = 2 * len(self._vectors)
        vectors = np.zeros((size, self.dim), np.float32)  # np.resize writes the old rows twice, and zeros over them
        vectors[: size // 2] = self._vectors
        self._vectors = vectors
        self._has_vector = np.concatenate([self._has_vector, np.zeros(size // 2, bool)])
        self._published_at = np.concatenate([self._published_at, np.full(size // 2, _UNKNOWN_TIME)])
        self._hashes = np.concatenate([self._hashes, np.zeros((size // 2, 2), np.int64)])


def vector_digest(content: str, vector: NDArray[np.float32]) -> bytes:
    """16-byte digest of a content hash and a vector."""
    return hashlib.blake2b(content.encode() + b"\0" + vector.tobytes(), digest_size=16).digest()
