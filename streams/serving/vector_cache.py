"""Vectors and facts by item id for scoring: from this process's memory, or else from Milvus.

Ranking needs hundreds of vectors per request in a fraction of a millisecond, which Milvus does not give; a cache may
not serve what was deleted or replaced. Following `embeddings` gives both: each change of the center is applied here
too, and every vector returned was current in the center at most `max_staleness_seconds` ago:

    either   all of `embeddings` up to some recent moment has been applied (confirmed by asking for its end),
    or       this vector was read from Milvus since.

Where neither holds, because the broker does not answer or the follower is behind, Milvus is read again. An
announcement alone confirms nothing: it may be days old, and replaced by a later one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat

import numpy as np
import structlog
from numpy.typing import NDArray
from pydantic import ValidationError

from schemas.items import ItemEmbedding, parse_embedding_key
from streams.serving.config import VectorCacheConfig
from streams.serving.reports import CacheReport
from streams.stores.vectors.item_index import UNIT_TOLERANCE, ItemIndex, ItemRow
from trainer.networks.item_rows import ItemRows
from trainer.samples.id_hashes import hash_columns, id_hashes
from trainer.samples.item_facts import FactRows, FactsConfig, facts_of

log = structlog.get_logger()


class VectorTable:
    """Vectors by id in one (max_items, dim) float32 matrix; the least recently used make room.

    The matrix has its full size from the start, of which the system provides only the pages that are written to:
    growing it would copy it, and stop the event loop for seconds. The hashes that models look ids up by and the facts
    that features read lie beside it, so that no request computes them again.
    """

    def __init__(self, dim: int, max_items: int, facts: FactsConfig) -> None:
        rows = max_items + 1  # row 0 belongs to no item: an id without a vector reads zeros there
        self._max_items = max_items
        self._matrix = np.zeros((rows, dim), np.float32)
        self._hashes = np.zeros((rows, 2), np.int64)
        self._facts = FactRows.empty(facts, rows)
        self._known_at = np.zeros(rows)
        self._used_at = np.zeros(rows, np.int64)
        self._row_of: dict[str, int] = {}
        self._ids = [""]
        """The item of each row that was ever used."""
        self._uses = 0
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._row_of)

    def put(self, item_id: str, vector: NDArray[np.float32], facts: FactRows, *, at: float) -> None:
        """Store `vector` (dim,) and the one row of `facts`, current at time `at`."""
        row = self._row_of.get(item_id)
        if row is None:
            row = self._free_row()
            self._row_of[item_id], self._ids[row] = row, item_id
            self._hashes[row] = id_hashes(item_id)
        self._uses += 1
        self._used_at[row] = self._uses
        self._matrix[row] = vector
        self._facts.put(row, facts)
        self._known_at[row] = at

    def delete(self, item_id: str) -> None:
        """Delete one item."""
        row = self._row_of.pop(item_id, None)
        if row is not None:
            self._free.append(row)

    def gather(self, item_ids: Sequence[str], *, since: float) -> tuple[ItemRows, FactRows]:
        """A row for each of the items, with copies of the vectors and facts that were current at `since` or later;
        marks these as used.
        """
        row_U = np.fromiter(chain((0,), map(self._row_of.get, item_ids, repeat(0))), np.int64, len(item_ids) + 1)
        if since > float("-inf"):
            row_U[self._known_at[row_U] < since] = 0
        items = ItemRows(item_ids, self._matrix.take(row_U, 0), row_U > 0, self._hashes.take(row_U, 0))
        if np.count_nonzero(row_U) < len(item_ids):
            others = np.flatnonzero(row_U == 0)[1:]
            items.hashes_U2[others] = hash_columns([item_ids[number - 1] for number in others])
        self._uses += 1
        self._used_at[row_U] = self._uses
        return items, self._facts.rows(row_U)

    def _free_row(self) -> int:
        if not self._free and len(self._row_of) >= self._max_items:
            self._make_room()
        if self._free:
            return self._free.pop()
        self._ids.append("")
        return len(self._ids) - 1

    def _make_room(self) -> None:
        """Delete the least recently used hundredth, so that the search for them is rare. All rows are in use."""
        oldest = self._max_items // 100
        for row in np.argpartition(self._used_at[1:], oldest)[: oldest + 1].tolist():
            self.delete(self._ids[row + 1])


@dataclass(frozen=True, slots=True)
class Lookup:
    """Result of one look-up."""

    items: ItemRows
    """In the order asked; items that the center does not hold have no vector."""
    facts: FactRows
    """Of each row of `items`."""
    report: CacheReport


class VectorCache:
    """Vectors of items for scoring. `EmbeddingsFollower` keeps it current; without it an entry is used for
    `max_staleness_seconds`.
    """

    def __init__(
        self,
        index: ItemIndex,
        config: VectorCacheConfig,
        *,
        encoder_version: str,
        dim: int,
        facts: FactsConfig,
        clock: Callable[[], float],
    ) -> None:
        """`facts` says which attributes of items features look at."""
        self._index = index
        self._config = config
        self._encoder_version = encoder_version
        self._dim = dim
        self._clock = clock
        self._facts_config = facts
        self._table = VectorTable(dim, config.max_items, facts)
        self._absent_until: dict[str, float] = {}
        self._deleted: dict[str, None] = {}
        self._confirmed_at = float("-inf")
        self._epoch = 0
        self._touched: list[set[str]] = []
        """One set per read of Milvus in flight: items that changed since it began, so its rows of them may be stale."""

    @property
    def deleted(self) -> Collection[str]:
        """Items whose delete was applied and that did not return since: never scored, even if a model has learned them.

        Deletes before the follower's start are included with `warm_up`, as far as `embeddings` still holds them.
        """
        return self._deleted

    @property
    def behind_seconds(self) -> float:
        """Time since the cache as a whole was last confirmed to be current."""
        return self._clock() - self._confirmed_at

    async def look_up(self, item_ids: Sequence[str]) -> Lookup:
        """The vectors of the items; those that are not cached, or too old, are read from Milvus in one round trip.

        Raises `StoreUnavailable` if Milvus is needed and does not answer.
        """
        now = self._clock()
        oldest = now - self._config.max_staleness_seconds
        items, facts = self._table.gather(item_ids, since=float("-inf") if self._confirmed_at >= oldest else oldest)
        if items.found == len(item_ids):
            return self._lookup(items, facts, misses=0)
        missing = [one for one in items.without_vector() if self._absent_until.get(one, now) <= now]
        if missing:
            read = await self._read(missing)
            items.fill({item_id: vector for item_id, (vector, _) in read.items()})
            for number, item_id in enumerate(item_ids, start=1):
                if item_id in read:
                    facts.put(number, read[item_id][1])
        return self._lookup(items, facts, misses=len(missing))

    def _lookup(self, items: ItemRows, facts: FactRows, *, misses: int) -> Lookup:
        asked = len(items.item_ids)
        report = CacheReport(asked - misses, misses, asked - items.found, len(self._table), self.behind_seconds)
        return Lookup(items, facts, report)

    async def _read(self, item_ids: list[str]) -> dict[str, tuple[NDArray[np.float32], FactRows]]:
        asked_at, epoch = self._clock(), self._epoch
        touched: set[str] = set()
        self._touched.append(touched)
        try:
            rows = await self._index.fetch(item_ids)
        finally:
            self._touched = [other for other in self._touched if other is not touched]
        read: dict[str, tuple[NDArray[np.float32], FactRows]] = {}
        for item_id in item_ids:
            row = rows.get(item_id)
            unchanged = item_id not in touched and epoch == self._epoch
            if row is not None and unchanged:
                self._deleted.pop(item_id, None)  # it came back, whether or not its announcement was applied
            if row is not None and self._is_usable(row.encoder_version, row.vector):
                read[item_id] = row.vector, self._facts_of(row, row.first_price)
                if unchanged:
                    self._table.put(item_id, *read[item_id], at=asked_at)
                    self._absent_until.pop(item_id, None)
            elif unchanged:
                self._table.delete(item_id)
                self._remember_absent(item_id, asked_at)
        return read

    def _facts_of(self, item: ItemRow | ItemEmbedding, first_price: float | None) -> FactRows:
        """What the trainer knows of the item, from the announcement of the same row."""
        return facts_of(
            self._facts_config,
            category=item.category,
            price=first_price,
            year=item.year,
            attributes=item.attributes,
            published_at=item.published_at.timestamp(),
            published_at_is=item.published_at_is,
            title=item.title,
        )

    def _remember_absent(self, item_id: str, at: float) -> None:
        absent = self._absent_until  # in the order in which they end
        absent.pop(item_id, None)
        absent[item_id] = at + self._config.absent_seconds
        for oldest, until in list(islice(absent.items(), 2)):
            if until <= at or len(absent) > self._config.max_items:
                del absent[oldest]

    def _is_usable(self, encoder_version: str, vector: NDArray[np.float32]) -> bool:
        return (
            encoder_version == self._encoder_version
            and vector.shape == (self._dim,)
            and bool(abs(float(np.linalg.norm(vector.astype(np.float64))) - 1.0) <= UNIT_TOLERANCE)
        )

    def apply(self, key: bytes | None, value: bytes | None) -> None:
        """Apply one record of `embeddings`. Records of another encoder and unreadable ones are passed over."""
        try:
            version, item_id = parse_embedding_key(key)
        except ValueError:
            log.warning("representations.unreadable", key=repr(key)[:200])
            return
        if version != self._encoder_version:
            return
        for touched in self._touched:
            touched.add(item_id)
        self._absent_until.pop(item_id, None)
        if value is None:
            self._table.delete(item_id)
            if len(self._deleted) >= self._config.max_items:
                del self._deleted[next(iter(self._deleted))]
            self._deleted[item_id] = None
            return
        self._deleted.pop(item_id, None)
        try:
            announced = ItemEmbedding.model_validate_json(value)
            vector = np.frombuffer(announced.vector, dtype="<f4").astype(np.float32)
            readable = announced.item_id == item_id and self._is_usable(announced.encoder_version, vector)
        except ValidationError:
            readable = False
        if readable:
            # its age is unknown: until `confirm` tells that nothing newer follows, the vector is read from Milvus
            self._table.put(item_id, vector, self._facts_of(announced, announced.price), at=float("-inf"))
        else:
            self._table.delete(item_id)  # it changed; Milvus holds the new row
            log.warning("representations.unreadable", item_id=item_id)

    def confirm(self, at: float) -> None:
        """Note that everything `embeddings` held at time `at` has been applied."""
        self._confirmed_at = max(self._confirmed_at, at)

    def invalidate(self) -> None:
        """Drop all vectors, because part of `embeddings` was passed over.

        Deleted items stay deleted until a read of Milvus finds them.
        """
        self._confirmed_at = float("-inf")
        self._table = VectorTable(self._dim, self._config.max_items, self._facts_config)
        self._absent_until.clear()
        self._epoch += 1
