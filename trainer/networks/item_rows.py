"""The items of one request as rows of arrays, without torch: caches of vectors return them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from trainer.features.config import FeatureConfig
from trainer.features.states import ItemStates, SharedCounts, TakeRows, item_hash
from trainer.samples.id_hashes import hash_columns, id_hashes
from trainer.samples.item_facts import FactRows


@dataclass(frozen=True, eq=False)
class ItemRows:
    """Vectors of items as rows of one matrix, with the network's other inputs of an item.

    Item n of `item_ids` has row n + 1. An item that is named twice has two rows: a search for duplicates would cost a
    request more than a row does. Row 0 is padding.
    """

    item_ids: Sequence[str]
    vectors_UV: NDArray[np.float32]
    """Zero rows where there is no vector."""
    has_vector_U: NDArray[np.bool_]
    hashes_U2: NDArray[np.int64]

    @classmethod
    def of(cls, item_ids: Sequence[str], vectors: Mapping[str, NDArray[np.float32]], dim: int) -> ItemRows:
        """Rows of these items from a mapping. `dim` is the width of the vectors."""
        count = len(item_ids) + 1
        hashes_U2 = np.zeros((count, 2), np.int64)
        hashes_U2[1:] = hash_columns(item_ids)
        rows = cls(item_ids, np.zeros((count, dim), np.float32), np.zeros(count, bool), hashes_U2)
        rows.fill(vectors)
        return rows

    def fill(self, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        """Write the vectors of those items that are among these, before the rows are shared."""
        for number, item_id in enumerate(self.item_ids, start=1):
            vector = vectors.get(item_id)
            if vector is not None:
                self.vectors_UV[number], self.has_vector_U[number] = vector, True

    def with_row(self, item_id: str, vector: NDArray[np.float32]) -> ItemRows:
        """These rows and one more, the last."""
        return ItemRows(
            [*self.item_ids, item_id],
            np.concatenate((self.vectors_UV, vector[None])),
            np.append(self.has_vector_U, True),
            np.concatenate((self.hashes_U2, np.array([id_hashes(item_id)]))),
        )

    @property
    def found(self) -> int:
        """How many rows have a vector."""
        return int(np.count_nonzero(self.has_vector_U))

    def without_vector(self) -> list[str]:
        """The items without a vector, each once."""
        return list(dict.fromkeys(compress(self.item_ids, (~self.has_vector_U[1:]).tolist())))

    def by_item(self) -> dict[str, NDArray[np.float32]]:
        """The known vectors, by item."""
        rows = zip(self.item_ids, self.has_vector_U[1:].tolist(), self.vectors_UV[1:], strict=True)
        return {item_id: vector for item_id, has_vector, vector in rows if has_vector}


@dataclass(frozen=True, eq=False)
class RequestMoment:
    """What features read beside the items of a request."""

    states: ItemStates
    """Of each row of `ItemRows`."""
    history_seconds: Sequence[int]
    """Seconds of the history's takes, oldest first; a trigger item, which comes last, has the request's own."""
    now: int
    """Second of the request."""
    has_query: bool = False
    """Whether the last of the items is what was searched."""
    query_text: str | None = None
    """Its words."""

    @classmethod
    def unknown(cls, config: FeatureConfig, items: ItemRows, history: int) -> RequestMoment:
        """Nothing is known but which items were taken."""
        size = len(items.hashes_U2)
        facts, takes = FactRows.empty(config, size), TakeRows.empty(config, size)
        states = ItemStates(item_hash(items.hashes_U2), facts, takes, SharedCounts.empty(), triggered=takes)
        return cls(states, [0] * history, 0)
