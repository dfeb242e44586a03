"""The representation center as serving sees it: vectors by item id, from this process's memory or from Milvus.

Ranking needs hundreds of vectors per request in a fraction of a millisecond, which Milvus does not give; a cache may
not serve what was deleted or replaced. Both are had by following `embeddings`: what the center changes is changed here
too, and every vector handed out is known to have been the center's word no longer ago than `max_staleness_seconds`:

    either   the whole of `embeddings` up to some recent moment has been followed (proven by asking for its end),
    or       this very vector was read from Milvus since.

Where neither holds, because the broker does not answer or the follower is behind, Milvus is asked again. An
announcement alone proves nothing: it may be days old, and replaced by one further on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
import structlog
from numpy.typing import NDArray
from pydantic import ValidationError

from schemas.items import ItemEmbedding, parse_embedding_key
from streams.serving.config import RepresentationsConfig
from streams.serving.reports import CacheReport
from streams.stores.vectors.item_index import UNIT_TOLERANCE, ItemIndex
from trainer.networks.item_rows import ItemRows
from trainer.samples.id_hashes import hash_columns, id_hashes

log = structlog.get_logger()

FIRST_ROWS = 1_024


class VectorTable:
    """Vectors by id in one growing (capacity, dim) float32 matrix; the least recently used make room.

    The hashes by which models know an id lie beside them, so that a request does not make them again.
    """

    def __init__(self, dim: int, max_items: int) -> None:
        self._dim = dim
        self._max_items = max_items
        # row 0 is no item's: what is not held reads zeros there
        self._matrix = np.zeros((min(FIRST_ROWS, max_items) + 1, dim), np.float32)
        self._row_of: dict[str, int] = {}
        self._hashes = np.zeros((len(self._matrix), 2), np.int64)
        self._known_at = np.zeros(len(self._matrix))
        self._used_at = np.zeros(len(self._matrix), np.int64)
        self._asked = 0
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._row_of)

    def put(self, item_id: str, vector: NDArray[np.float32], *, at: float) -> None:
        """Hold `vector` (dim,), known to be true at time `at`."""
        row = self._row_of.get(item_id)
        if row is None:
            row = self._take_row()
            self._row_of[item_id] = row
            self._hashes[row] = id_hashes(item_id)
        self._asked += 1
        self._used_at[row] = self._asked
        self._matrix[row] = vector
        self._known_at[row] = at

    def drop(self, item_id: str) -> None:
        """Forget one item."""
        row = self._row_of.pop(item_id, None)
        if row is not None:
            self._free.append(row)

    def gather(self, item_ids: Sequence[str], *, since: float) -> ItemRows:
        """A row for each of the items, with copies of the vectors that are held and were known to be true at `since` or
        later; marks these as used.
        """
        row_U = np.fromiter(chain((0,), map(self._row_of.get, item_ids, repeat(0))), np.int64, len(item_ids) + 1)
        if since > float("-inf"):
            row_U[self._known_at[row_U] < since] = 0
        items = ItemRows(item_ids, self._matrix.take(row_U, 0), row_U > 0, self._hashes.take(row_U, 0))
        if np.count_nonzero(row_U) < len(item_ids):
            others = np.flatnonzero(row_U == 0)[1:]
            items.hashes_U2[others] = hash_columns([item_ids[number - 1] for number in others])
        self._asked += 1
        self._used_at[row_U] = self._asked
        return items

    def _take_row(self) -> int:
        if self._free:
            return self._free.pop()
        if len(self._row_of) >= self._max_items:
            self._make_room()
            return self._free.pop()
        used = len(self._row_of) + 1
        if used == len(self._matrix):
            more = min(2 * used, self._max_items + 1) - used
            self._matrix = np.concatenate([self._matrix, np.zeros((more, self._dim), np.float32)])
            self._hashes = np.concatenate([self._hashes, np.zeros((more, 2), np.int64)])
            self._known_at = np.concatenate([self._known_at, np.zeros(more)])
            self._used_at = np.concatenate([self._used_at, np.zeros(more, np.int64)])
        return used

    def _make_room(self) -> None:
        """Forget the hundredth that was not asked for longest, so that looking for it is rare."""
        item_ids, rows = list(self._row_of), np.fromiter(self._row_of.values(), np.int64, len(self._row_of))
        for number in np.argsort(self._used_at[rows], kind="stable")[: 1 + len(rows) // 100].tolist():
            self.drop(item_ids[number])


@dataclass(frozen=True, slots=True)
class Looked:
    """Answer to one look-up."""

    items: ItemRows
    """In the order asked; those that the center does not hold are without a vector."""
    report: CacheReport


class VectorCache:
    """Vectors of items for scoring. `follow` keeps them true; without it every entry lives `max_staleness_seconds`."""

    def __init__(
        self,
        index: ItemIndex,
        config: RepresentationsConfig,
        *,
        encoder_version: str,
        dim: int,
        clock: Callable[[], float],
    ) -> None:
        self._index = index
        self._config = config
        self._encoder_version = encoder_version
        self._dim = dim
        self._clock = clock
        self._table = VectorTable(dim, config.max_items)
        self._absent_until: dict[str, float] = {}
        self._gone: dict[str, None] = {}
        self._true_at = float("-inf")
        self._epoch = 0
        self._touched: list[set[str]] = []
        """One set per read of Milvus in flight: items that changed since it began, whose answer may be outdated."""

    @property
    def gone(self) -> Collection[str]:
        """Items whose delete was followed, and not seen since: not to be scored, whatever a model knows of them.

        Of deletes before the follower's start, those that `embeddings` still holds are known with `warm_up`.
        """
        return self._gone

    @property
    def behind_seconds(self) -> float:
        """How long ago the cache as a whole was known to be true."""
        return self._clock() - self._true_at

    async def look_up(self, item_ids: Sequence[str]) -> Looked:
        """Give the vectors of the items; whatever is not at hand is read from Milvus in one round trip.

        Raises `StoreUnavailable` if Milvus is needed and does not answer.
        """
        now = self._clock()
        oldest = now - self._config.max_staleness_seconds
        items = self._table.gather(item_ids, since=float("-inf") if self._true_at >= oldest else oldest)
        if items.found == len(item_ids):
            return self._looked(items, misses=0)
        missing = [one for one in items.bare() if self._absent_until.get(one, now) <= now]
        if missing:
            items.fill(await self._read(missing))
        return self._looked(items, misses=len(missing))

    def _looked(self, items: ItemRows, *, misses: int) -> Looked:
        asked = len(items.item_ids)
        report = CacheReport(asked - misses, misses, asked - items.found, len(self._table), self.behind_seconds)
        return Looked(items, report)

    async def _read(self, item_ids: list[str]) -> dict[str, NDArray[np.float32]]:
        asked_at, epoch = self._clock(), self._epoch
        touched: set[str] = set()
        self._touched.append(touched)
        try:
            rows = await self._index.fetch(item_ids)
        finally:
            self._touched = [other for other in self._touched if other is not touched]
        vectors: dict[str, NDArray[np.float32]] = {}
        for item_id in item_ids:
            row = rows.get(item_id)
            if row is not None and item_id not in touched and epoch == self._epoch:
                self._gone.pop(item_id, None)  # it came back, whether or not its announcement was followed
            if row is not None and self._acceptable(row.encoder_version, row.vector):
                vectors[item_id] = row.vector
                if item_id not in touched and epoch == self._epoch:
                    self._table.put(item_id, row.vector, at=asked_at)
                    self._absent_until.pop(item_id, None)
            elif item_id not in touched and epoch == self._epoch:
                self._table.drop(item_id)
                self._remember_absent(item_id, asked_at)
        return vectors

    def _remember_absent(self, item_id: str, at: float) -> None:
        if len(self._absent_until) >= self._config.max_items:
            self._absent_until = {name: until for name, until in self._absent_until.items() if until > at}
        if len(self._absent_until) < self._config.max_items:
            self._absent_until[item_id] = at + self._config.absent_seconds

    def _acceptable(self, encoder_version: str, vector: NDArray[np.float32]) -> bool:
        return (
            encoder_version == self._encoder_version
            and vector.shape == (self._dim,)
            and bool(abs(float(np.linalg.norm(vector)) - 1.0) <= UNIT_TOLERANCE)
        )

    def apply(self, key: bytes | None, value: bytes | None) -> None:
        """Take in one record of `embeddings`. What belongs to another encoder, or is no such record, is passed over."""
        try:
            version, item_id = parse_embedding_key(key or b"")
        except ValueError:
            log.warning("representations.unreadable", key=repr(key)[:200])
            return
        if version != self._encoder_version:
            return
        for touched in self._touched:
            touched.add(item_id)
        self._absent_until.pop(item_id, None)
        if value is None:
            self._table.drop(item_id)
            if len(self._gone) >= self._config.max_items:
                del self._gone[next(iter(self._gone))]
            self._gone[item_id] = None
            return
        self._gone.pop(item_id, None)
        try:
            announced = ItemEmbedding.model_validate_json(value)
            vector = np.frombuffer(announced.vector, dtype="<f4").astype(np.float32)
            readable = announced.item_id == item_id and self._acceptable(announced.encoder_version, vector)
        except ValidationError:
            readable = False
        if readable:
            # how long ago this was announced is not known: until `confirm` says that nothing newer follows, ask Milvus
            self._table.put(item_id, vector, at=float("-inf"))
        else:
            self._table.drop(item_id)  # something changed; Milvus knows what
            log.warning("representations.unreadable", item_id=item_id)

    def confirm(self, at: float) -> None:
        """Everything that `embeddings` held at time `at` has been applied."""
        self._true_at = max(self._true_at, at)

    def doubt(self) -> None:
        """Part of `embeddings` was passed over: trust only what is asked of Milvus from now on.

        What was deleted stays so until a read of Milvus finds it.
        """
        self._true_at = float("-inf")
        self._table = VectorTable(self._dim, self._config.max_items)
        self._absent_until.clear()
        self._epoch += 1
