"""The trainer's copy of the representation center: item ids as small integers, vectors as rows of one matrix."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.items import ItemEmbedding
from trainer.samples.id_hashes import id_hashes
from trainer.samples.item_facts import FactRows, FactsConfig, facts_of
from trainer.state import State

_UNKNOWN_TIME = np.nan


@dataclass(frozen=True, slots=True)
class _Embedding:
    vector: NDArray[np.float32]
    published_at: float
    content: str
    facts: FactRows


class Catalogue:
    """Items numbered in the order in which behaviours first named them.

    Vectors of items that no behaviour has named yet are stored apart: were they numbered on arrival, the order of a
    batch's items, and with it the last digit of every sum, would depend on how the topics' fetches interleave.

    Row 0 is padding and belongs to no item. A number is never reused, so histories may contain numbers of items that
    were deleted since and have no vector (`has_vector` false).
    """

    def __init__(self, dim: int, facts: FactsConfig | None = None) -> None:
        self.dim = dim
        self._facts_config = facts or FactsConfig()
        self._numbers: dict[str, int] = {}
        self._unnamed: dict[str, _Embedding] = {}
        self._ids: list[str] = [""]
        self._contents: list[str] = [""]
        self._digests: dict[int, bytes] = {}
        self._vectors = np.zeros((1024, dim), np.float32)
        self._has_vector = np.zeros(1024, bool)
        self._published_at = np.full(1024, _UNKNOWN_TIME)
        self._hashes = np.zeros((1024, 2), np.int64)
        self._facts = FactRows.empty(self._facts_config, 1024)

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
            embedding = self._unnamed.pop(item_id, None)
            if embedding is not None:
                self._write(number, embedding)
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
        stored = _Embedding(
            np.frombuffer(embedding.vector, "<f4"),
            embedding.published_at.timestamp(),
            embedding.content_hash,
            facts_of(
                self._facts_config,
                category=embedding.category,
                price=embedding.price,
                year=embedding.year,
                attributes=embedding.attributes,
                published_at=embedding.published_at.timestamp(),
                published_at_is=embedding.published_at_is,
            ),
        )
        number = self.find(embedding.item_id)
        if number is None:
            self._unnamed[embedding.item_id] = stored
        else:
            self._write(number, stored)

    def delete_item(self, item_id: str) -> None:
        """Remove the vector of a deleted item; its number stays."""
        self._unnamed.pop(item_id, None)
        number = self.find(item_id)
        if number is None:
            return
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

    def facts(self, numbers: NDArray[np.int64]) -> FactRows:
        """What is known of these items beside their takes; of a deleted item what was known last."""
        return self._facts.rows(numbers)

    def snapshot(self) -> State:
        """Numbers, the newest vectors, and those of items without a number."""
        count = len(self._ids)
        unnamed = self._unnamed
        state = State(values={})
        state.put_texts("ids", self._ids)
        state.put_texts("contents", self._contents)
        state.put_texts("unmet.ids", unnamed)
        state.put_texts("unmet.contents", (one.content for one in unnamed.values()))
        state.arrays.update(
            {
                "vectors": self._vectors[:count].copy(),
                "has_vector": self._has_vector[:count].copy(),
                "published_at": self._published_at[:count].copy(),
                "hashes": self._hashes[:count].copy(),
                "unmet.vectors": np.array([one.vector for one in unnamed.values()], np.float32).reshape(-1, self.dim),
                "unmet.published_at": np.array([one.published_at for one in unnamed.values()], np.float64),
            }
        )
        state.put("facts", self._facts.rows(np.arange(count)).snapshot())
        unmet = [FactRows.empty(self._facts_config, 0), *(one.facts for one in unnamed.values())]
        state.put("unmet.facts", FactRows.joined(unmet).snapshot())
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
        nothing = len(arrays["unmet.vectors"])
        if "facts" in state.values:
            facts, unmet = (FactRows.restored(state.part(name)) for name in ("facts", "unmet.facts"))
            if facts.words_IW.shape[1:] != self._facts.words_IW.shape[1:] or (
                facts.numbers_IN.shape[1:] != self._facts.numbers_IN.shape[1:]
            ):
                raise ValueError("facts of items were kept for other features")
        else:  # an earlier build kept none: they come with the items' next embeddings
            facts, unmet = (FactRows.empty(self._facts_config, size) for size in (count, nothing))
        self._facts = facts.grown(self._facts_config, len(self._vectors))
        unnamed = zip(
            state.texts("unmet.ids"),
            arrays["unmet.vectors"],
            arrays["unmet.published_at"].tolist(),
            state.texts("unmet.contents"),
            (unmet.rows(np.array([row])) for row in range(nothing)),
            strict=True,
        )
        self._unnamed = {item_id: _Embedding(*about) for item_id, *about in unnamed}

    @property
    def items_with_vector(self) -> list[str]:
        """Ids of all items that have a vector now, numbered or not."""
        numbered = [item_id for item_id, has in zip(self._ids, self._has_vector[: len(self._ids)], strict=True) if has]
        return numbered + list(self._unnamed)

    def _write(self, number: int, embedding: _Embedding) -> None:
        self._digests.pop(number, None)
        self._vectors[number] = embedding.vector
        self._has_vector[number] = True
        self._published_at[number] = embedding.published_at
        self._contents[number] = embedding.content
        self._facts.put(number, embedding.facts)

    def _grow(self) -> None:
        size = 2 * len(self._vectors)
        vectors = np.zeros((size, self.dim), np.float32)  # np.resize writes the old rows twice, and zeros over them
        vectors[: size // 2] = self._vectors
        self._vectors = vectors
        self._has_vector = np.concatenate([self._has_vector, np.zeros(size // 2, bool)])
        self._published_at = np.concatenate([self._published_at, np.full(size // 2, _UNKNOWN_TIME)])
        self._hashes = np.concatenate([self._hashes, np.zeros((size // 2, 2), np.int64)])
        self._facts = self._facts.grown(self._facts_config, size)


def vector_digest(content: str, vector: NDArray[np.float32]) -> bytes:
    """16-byte digest of a content hash and a vector."""
    return hashlib.blake2b(content.encode() + b"\0" + vector.tobytes(), digest_size=16).digest()
