"""The trainer's copy of the representation center: item ids as small integers, vectors as rows of one matrix."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from schemas.items import ItemEmbedding
from trainer.changed_rows import ChangedRows
from trainer.samples.id_hashes import id_hashes
from trainer.samples.item_facts import FactRows, FactsConfig, facts_of
from trainer.samples.searches import is_query
from trainer.state import State, Table, whole_numbers

_UNKNOWN_TIME = np.nan
ITEM_BYTES = 720
"""What an item takes beside its vector, with its count of takes."""


class Catalogue:
    """Items numbered in the order in which behaviours named them, and a row of one matrix for each.

    An item has a row while it has a vector or a number; behaviours alone give numbers. Were items numbered on arrival
    of their vectors, the order of a batch's items, and with it the last digit of every sum, would depend on how the
    topics' fetches interleave. Number 0 and row 0 are padding and belong to no item.

    Numbers rise, and none is given twice. From `most_items` on (or twice as many as are in use) the catalogue is
    `crowded`, and `retire` takes the numbers that nothing uses: an item that is named again has a new one. Which
    numbers are taken must follow from the log alone. What a retired number stands for stays known until `release`,
    whose moment changes no result.
    """

    def __init__(self, dim: int, facts: FactsConfig | None = None, *, most_items: int = 1 << 40) -> None:
        self.dim = dim
        self._facts_config = facts or FactsConfig()
        self.named = 0
        """Items that have a number."""
        self._most = self._crowded_at = most_items
        self._next = 1
        self._row_of: dict[int, int] = {0: 0}
        self._rows: dict[str, int] = {}
        self._retired: dict[int, list[int]] = {}
        self._free: list[int] = []
        self._released = True
        self._digests: dict[int, bytes] = {}
        self._queries: dict[str, None] = {}
        """Queries with a vector, in the order of their announcements."""
        self._changed = ChangedRows()
        self._ids, self._contents, self._numbers = [""], [""], [0]
        self._vectors = np.zeros((1024, dim), np.float32)
        self._has_vector = np.zeros(1024, bool)
        self._published_at = np.full(1024, _UNKNOWN_TIME)
        self._hashes = np.zeros((1024, 2), np.int64)
        self._facts = FactRows.empty(self._facts_config, 1024)

    def __len__(self) -> int:
        """Items that have a row."""
        return len(self._rows)

    # ---- numbers -------------------------------------------------------------------------------------------------

    def number(self, item_id: str) -> int:
        """The item's number; a new one for an item without."""
        row = self._row(item_id)
        number = self._numbers[row]
        if not number:
            number = self._numbers[row] = self._next
            self._changed.touch(row)
            self._row_of[number] = row
            self._next += 1
            self.named += 1
        return number

    def find(self, item_id: str) -> int | None:
        """The item's number, None if it has none."""
        row = self._rows.get(item_id)
        return None if row is None else self._numbers[row] or None

    def item_id(self, number: int) -> str:
        """The item that was given this number."""
        return self._ids[self._row_of[number]]

    @property
    def crowded(self) -> bool:
        """Whether so many items have a number that those without use should lose it."""
        return self.named >= self._crowded_at

    def retire(self, in_use: Iterable[int]) -> None:
        """Take the numbers of all items but these."""
        kept = set(in_use)
        for number, row in self._row_of.items():
            if number and number not in kept and self._numbers[row] == number:
                self._numbers[row] = 0
                self._changed.touch(row)
                self._retired.setdefault(row, []).append(number)
                self.named -= 1
        self._crowded_at = max(self._most, 2 * self.named)
        self._released = False

    @property
    def releases(self) -> bool:
        """Whether numbers were retired since the last `release`."""
        return not self._released

    def release(self, held: Iterable[int]) -> None:
        """Forget what retired numbers stand for, but for those that something still holds."""
        kept = set(held)
        for row, numbers in list(self._retired.items()):
            self._retired[row] = [number for number in numbers if number in kept]
            for number in numbers:
                if number not in kept:
                    del self._row_of[number]
            if not self._retired[row]:
                del self._retired[row]
                self._free_unused(row)
        self._released = True

    def numbers_of(self, item_id: str) -> list[int]:
        """The item's number, and retired ones that still stand for it."""
        row = self._rows.get(item_id, 0)
        return [number for number in (self._numbers[row], *self._retired.get(row, ())) if number]

    # ---- vectors -------------------------------------------------------------------------------------------------

    def put_embedding(self, embedding: ItemEmbedding) -> None:
        """Store the item's newest vector. Raises `ValueError` on another width."""
        if embedding.dim != self.dim:
            raise ValueError(f"item {embedding.item_id} has a {embedding.dim}-d vector, expected {self.dim}-d")
        row = self._row(embedding.item_id)
        self._changed.touch(row)
        self._digests.pop(row, None)
        self._vectors[row] = np.frombuffer(embedding.vector, "<f4")
        self._has_vector[row] = True
        self._published_at[row] = embedding.published_at.timestamp()
        self._contents[row] = embedding.content_hash
        facts = facts_of(
            self._facts_config,
            category=embedding.category,
            price=embedding.price,
            year=embedding.year,
            attributes=embedding.attributes,
            published_at=embedding.published_at.timestamp(),
            published_at_is=embedding.published_at_is,
            title=embedding.title,
        )
        self._facts.put(row, facts)

    def put_query(self, item_id: str, vector: NDArray[np.float32]) -> None:
        """Store the vector of a query, which is named as `query_item` does. Raises `ValueError` on another width."""
        if vector.shape != (self.dim,):
            raise ValueError(f"a query has a vector of shape {vector.shape}, expected ({self.dim},)")
        row = self._row(item_id)
        self._changed.touch(row)
        self._digests.pop(row, None)
        self._vectors[row], self._has_vector[row] = vector, True
        self._contents[row] = item_id
        self._queries.pop(item_id, None)
        self._queries[item_id] = None
        if len(self._queries) > self._most:
            self._drop_queries()

    def _drop_queries(self) -> None:
        """Remove those announced longest ago that nothing names; what is still searched is announced again."""
        for item_id in list(islice(self._queries, 1 + len(self._queries) // 16)):
            row = self._rows[item_id]
            if self._numbers[row] or row in self._retired:
                self._queries[item_id] = self._queries.pop(item_id)
            else:
                self.delete_item(item_id)

    def delete_item(self, item_id: str) -> None:
        """Remove the vector of a deleted item; its numbers stay."""
        row = self._rows.get(item_id)
        if row is None:
            return
        self._queries.pop(item_id, None)
        self._changed.touch(row)
        self._vectors[row] = 0
        self._has_vector[row] = False
        self._contents[row] = ""
        self._digests.pop(row, None)
        self._free_unused(row)

    def holds(self, item_id: str) -> bool:
        """Whether the item has a vector, with or without a number."""
        return bool(self._has_vector[self._rows.get(item_id, 0)])

    def has_vector(self, number: int) -> bool:
        """Whether the item has a vector now."""
        return bool(self._has_vector[self._row_of[number]])

    def content(self, number: int) -> str:
        """Content hash of the item's vector; empty if it has none."""
        return self._contents[self._row_of[number]]

    def digest(self, number: int) -> bytes:
        """16-byte digest of the item's content hash and vector; empty if it has none."""
        row = self._row_of[number]
        digest = self._digests.get(row)
        if digest is None:
            if not self._has_vector[row]:
                return b""
            digest = self._digests[row] = vector_digest(self._contents[row], self._vectors[row])
        return digest

    def published_at(self, number: int) -> float:
        """Time of publication, seconds since 1970; NaN if unknown."""
        return float(self._published_at[self._row_of[number]])

    def vectors(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of these items, shape (len(numbers), dim); zero rows where there is none."""
        return self._vectors[self._at(numbers)]

    def vector_mask(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these items have a vector."""
        return self._has_vector[self._at(numbers)]

    def hashes(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Two stable hashes of each item's id, shape (len(numbers), 2)."""
        return self._hashes[self._at(numbers)]

    @property
    def items_with_vector(self) -> list[str]:
        """Ids of all items that have a vector now, numbered or not."""
        return [item_id for item_id, has in zip(self._ids, self._has_vector[: len(self._ids)], strict=True) if has]

    def facts(self, numbers: NDArray[np.int64]) -> FactRows:
        """What is known of these items beside their takes; of a deleted item what was known last."""
        return self._facts.rows(self._at(numbers))

    def facts_by_id(self, item_ids: Sequence[str]) -> FactRows:
        """The same, of items with a number or without; an empty row first."""
        return self._facts.rows(np.array([0, *(self._rows.get(item_id, 0) for item_id in item_ids)], np.int64))

    # ---- snapshots -----------------------------------------------------------------------------------------------

    def snapshot(self) -> State:
        """The rows as they lie, and the retired numbers that still stand for one."""
        retired = [(number, row) for row, numbers in self._retired.items() for number in numbers]
        state = State(values={"next": self._next, "crowded_at": self._crowded_at, "released": self._released})
        state.arrays["retired"] = np.array(retired, np.int64).reshape(-1, 2)
        state.put_table("", Table(len(self._ids), self._changed, self._copied))
        return state

    def _copied(self, rows: NDArray[np.int64]) -> Callable[[slice], State]:
        chosen = rows.tolist()
        ids, contents = [self._ids[row] for row in chosen], [self._contents[row] for row in chosen]
        columns = {
            "vectors": self._vectors[rows],
            "has_vector": self._has_vector[rows],
            "published_at": self._published_at[rows],
            "hashes": self._hashes[rows],
            "numbers": whole_numbers(self._numbers[row] for row in chosen),
            **{f"facts.{name}": column for name, column in self._facts.rows(rows).snapshot().arrays.items()},
        }

        def packed(part: slice) -> State:
            state = State({name: column[part] for name, column in columns.items()})
            state.put_texts("ids", ids[part])
            state.put_texts("contents", contents[part])
            return state

        return packed

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`. Raises `ValueError` if its vectors have another width."""
        arrays = state.arrays
        if arrays["vectors"].shape[1] != self.dim:
            raise ValueError(f"vectors are {arrays['vectors'].shape[1]}-d, expected {self.dim}-d")
        self._ids, self._contents = state.texts("ids"), state.texts("contents")
        count = len(self._ids)
        self._grow_to(count)
        for own, kept, unset in (
            (self._vectors, arrays["vectors"], 0),
            (self._has_vector, arrays["has_vector"], False),
            (self._published_at, arrays["published_at"], _UNKNOWN_TIME),
            (self._hashes, arrays["hashes"], 0),
        ):
            if len(kept) != count:
                raise ValueError(f"{count} items have {len(kept)} rows")
            own[:count], own[count:] = kept, unset
        self._restore_facts(state, count)
        self._rows = {item_id: row for row, item_id in enumerate(self._ids) if item_id}
        self._free = [row for row in range(1, count) if not self._ids[row]]
        self._queries = {one: None for one, row in self._rows.items() if is_query(one) and self._has_vector[row]}
        self._digests.clear()
        self._retired = {}
        if "numbers" in arrays:
            self._numbers = arrays["numbers"].tolist()
            retired = arrays["retired"].tolist()
        else:  # an earlier build gave each number the row of the same place, and kept items without a number apart
            self._numbers, retired = list(range(count)), []
            self._restore_unnamed(state)
        if len(self._numbers) != len(self._ids) or any(row >= count for _, row in retired):
            raise ValueError(f"{len(self._ids)} items do not fit their numbers")
        self._row_of = {number: row for row, number in enumerate(self._numbers) if number or not row}
        for number, row in retired:
            self._row_of[number] = row
            self._retired.setdefault(row, []).append(number)
        self._next = state.values.get("next", count)
        self._crowded_at = state.values.get("crowded_at", self._most)
        self._released = state.values.get("released", True)
        self.named = sum(1 for number in self._numbers if number)
        self._changed = ChangedRows()

    def _restore_facts(self, state: State, count: int) -> None:
        """What an earlier build did not keep comes with the items' next embeddings."""
        kept = {name.removeprefix("facts."): one for name, one in state.arrays.items() if name.startswith("facts.")}
        facts = FactRows.restored(State(kept)) if kept else FactRows.empty(self._facts_config, count)
        for name, column in vars(self._facts).items():
            if getattr(facts, name).shape[1:] != column.shape[1:]:
                raise ValueError("facts of items were kept for other features")
        self._facts = facts.grown(self._facts_config, len(self._vectors))

    def _restore_unnamed(self, state: State) -> None:
        vectors, published = state.arrays["unmet.vectors"], state.arrays["unmet.published_at"].tolist()
        unnamed = zip(state.texts("unmet.ids"), vectors, published, state.texts("unmet.contents"), strict=True)
        for item_id, vector, published_at, content in unnamed:
            row = self._row(item_id)
            self._vectors[row], self._has_vector[row] = vector, True
            self._published_at[row], self._contents[row] = published_at, content

    # ---- rows ----------------------------------------------------------------------------------------------------

    def _at(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        row_of = self._row_of
        return np.array([row_of[number] for number in numbers.tolist()], np.int64)

    def _row(self, item_id: str) -> int:
        row = self._rows.get(item_id)
        if row is not None:
            return row
        if self._free:
            row = heapq.heappop(self._free)  # the lowest, so that rows lie as they would without a restart
            self._ids[row] = item_id
        else:
            row = len(self._ids)
            self._ids.append(item_id)
            self._contents.append("")
            self._numbers.append(0)
            self._grow_to(row + 1)
        self._changed.touch(row)
        self._rows[item_id] = row
        self._hashes[row] = id_hashes(item_id)
        return row

    def _free_unused(self, row: int) -> None:
        """Give the row of an item that has neither vector nor number to the next one that needs one."""
        if self._has_vector[row] or self._numbers[row] or row in self._retired:
            return
        self._changed.touch(row)
        del self._rows[self._ids[row]]
        self._ids[row], self._hashes[row], self._published_at[row] = "", 0, _UNKNOWN_TIME
        self._facts.put(row, FactRows.empty(self._facts_config, 1))
        heapq.heappush(self._free, row)

    def _grow_to(self, count: int) -> None:
        while len(self._vectors) < count:
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
