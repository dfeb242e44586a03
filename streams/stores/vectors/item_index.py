"""The representation center: a row per item with its vector. The Milvus implementation is `milvus_index`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from encoders.similarity import top_k
from schemas.attributes import Attribute, PublishedAtIs
from schemas.errors import Reason, WriteRejected

MAX_TITLE_CHARACTERS = 500
"""Length to which a title is cut in a row; it is only for people who look at neighbours."""

UNIT_TOLERANCE = 1e-3
"""Allowed deviation of a vector's length from 1."""

FOR_EVER = datetime(9999, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, eq=False)
class ItemRow:
    """The center's row of one item.

    A row without title and picture is *pending*: its only content is a picture that could not be fetched yet. It
    distinguishes an item with a late picture from a deleted one. A *mark* stands for a deleted item: it has no content
    either, and keeps the place of the deletion, so that an older publish from another partition does not bring the item
    back. Neither is found by a search.
    """

    item_id: str
    encoder_version: str
    vector: NDArray[np.float32]
    """(dim,) unit vector; zeros if pending."""
    content_hash: str
    """Empty in a mark."""
    published_at: datetime
    """Of a mark: the moment from which it may be forgotten (`FOR_EVER`: the topic holds an older publish)."""
    category: str | None
    price: float | None
    """Price now."""
    first_price: float | None
    """Price at first publish."""
    has_title: bool
    has_image: bool
    source_partition: int
    source_offset: int
    produced_at_ms: int
    """Newest timestamp of the item's records in this partition up to this one, in milliseconds since 1970."""
    title: str = ""
    year: int | None = None
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    published_at_is: PublishedAtIs = "known"
    keeps_facts: bool = True
    """Whether the collection has room for year, attributes and `published_at_is`; one of an earlier build has not."""

    @property
    def is_searchable(self) -> bool:
        """Whether it has a vector."""
        return self.has_title or self.has_image

    @property
    def is_deleted(self) -> bool:
        """Whether it is the mark of a deleted item."""
        return not self.content_hash

    @property
    def is_pending(self) -> bool:
        """Whether the item is on sale and nothing of it is encoded yet."""
        return not (self.is_searchable or self.is_deleted)

    def is_newer(self, partition: int, offset: int, time_ms: int) -> bool:
        """Whether the row comes from a newer record of its item than the one at this place.

        Within a partition offsets decide. Where a topic was deleted and created again they start over; its records are
        younger than the row then, so offset and time must agree. Across partitions time decides, and the partition if
        times are equal. `time_ms` is the newest timestamp of the item's records of that partition so far, as in the
        row: a producer whose clock steps back changes no order within a partition, and so none between three records.
        """
        if self.source_partition == partition:
            return self.source_offset > offset and self.produced_at_ms >= time_ms
        return (self.produced_at_ms, self.source_partition) > (time_ms, partition)


def deletion_mark(
    item_id: str, *, encoder_version: str, dim: int, partition: int, offset: int, time_ms: int, until: datetime
) -> ItemRow:
    """The mark of an item that was deleted by the record at this place; it may be forgotten from `until` on."""
    return ItemRow(
        item_id=item_id,
        encoder_version=encoder_version,
        vector=np.zeros(dim, np.float32),
        content_hash="",
        published_at=until,
        category=None,
        price=None,
        first_price=None,
        has_title=False,
        has_image=False,
        source_partition=partition,
        source_offset=offset,
        produced_at_ms=time_ms,
    )


class ItemIndex(Protocol):
    """Rows by item id, and nearest neighbours by inner product of unit vectors (which is their cosine)."""

    async def open(self) -> None:
        """Connect and make sure that the collection exists. Raises `Misconfigured` if it belongs to another encoder."""

    async def close(self) -> None:
        """Close connections."""

    async def upsert(self, rows: Sequence[ItemRow]) -> None:
        """Write whole rows; of several with one id the last counts.

        Raises `WriteRejected` (nothing of the call is written) for a vector that is not finite, not of unit length or
        not of the encoder; `StoreUnavailable` if it is unknown what was written.
        """

    async def delete(self, item_ids: Sequence[str]) -> None:
        """Remove rows; ids that are not there are no error."""

    async def fetch(self, item_ids: Sequence[str], *, pending: bool = False, fresh: bool = True) -> dict[str, ItemRow]:
        """Read existing rows, by id; pending rows and marks only if `pending`.

        As of the last acknowledged write, which takes its time; without `fresh`, as a search would see them.
        """

    async def forget_deleted(self, before: datetime) -> None:
        """Remove marks that may be forgotten from a moment before `before` on."""

    async def search(self, vectors: NDArray[np.float32], k: int) -> list[list[tuple[str, float]]]:
        """For each of the (n, dim) unit vectors, up to `k` (item id, cosine), nearest first."""

    async def count(self) -> int:
        """Number of rows that a search can find."""


def last_of_each(rows: Sequence[ItemRow]) -> list[ItemRow]:
    """The last row of each id."""
    return list({row.item_id: row for row in rows}.values())


def check_rows(rows: Sequence[ItemRow], *, encoder_version: str, dim: int) -> None:
    """Check vectors before a write, since some servers accept NaN. Raises `WriteRejected`."""
    for row in rows:
        if row.encoder_version != encoder_version:
            raise WriteRejected(
                Reason.BAD_VECTOR,
                f"item {row.item_id!r}: a vector of encoder {row.encoder_version}, the index holds {encoder_version}",
            )
        if row.vector.shape != (dim,):
            raise WriteRejected(
                Reason.BAD_VECTOR, f"item {row.item_id!r} has a vector of shape {row.vector.shape}, not ({dim},)"
            )
        if not row.is_searchable:
            continue
        length = float(np.linalg.norm(row.vector.astype(np.float64)))
        if not abs(length - 1.0) <= UNIT_TOLERANCE:  # also true for NaN
            raise WriteRejected(Reason.BAD_VECTOR, f"item {row.item_id!r} has a vector of length {length}, not 1")


class InMemoryItemIndex(ItemIndex):
    """The index as a dictionary, with exact cosine search."""

    def __init__(self, *, encoder_version: str, dim: int) -> None:
        self._encoder_version = encoder_version
        self._dim = dim
        self.rows: dict[str, ItemRow] = {}

    @override
    async def open(self) -> None:
        pass

    @override
    async def close(self) -> None:
        pass

    @override
    async def upsert(self, rows: Sequence[ItemRow]) -> None:
        check_rows(rows, encoder_version=self._encoder_version, dim=self._dim)
        for row in rows:
            fits = len(row.title) <= MAX_TITLE_CHARACTERS
            self.rows[row.item_id] = row if fits else replace(row, title=row.title[:MAX_TITLE_CHARACTERS])

    @override
    async def delete(self, item_ids: Sequence[str]) -> None:
        for item_id in item_ids:
            self.rows.pop(item_id, None)

    @override
    async def fetch(self, item_ids: Sequence[str], *, pending: bool = False, fresh: bool = True) -> dict[str, ItemRow]:
        found = {item_id: self.rows[item_id] for item_id in item_ids if item_id in self.rows}
        return {item_id: row for item_id, row in found.items() if pending or row.is_searchable}

    @override
    async def forget_deleted(self, before: datetime) -> None:
        self.rows = {
            item_id: row for item_id, row in self.rows.items() if not (row.is_deleted and row.published_at < before)
        }

    @override
    async def search(self, vectors: NDArray[np.float32], k: int) -> list[list[tuple[str, float]]]:
        rows = [row for row in self.rows.values() if row.is_searchable]
        if not rows:
            return [[] for _ in vectors]
        nearest, cosines = top_k(vectors, np.stack([row.vector for row in rows]), k)
        return [
            [(rows[index].item_id, float(cosine)) for index, cosine in zip(line, its, strict=True)]
            for line, its in zip(nearest, cosines, strict=True)
        ]

    @override
    async def count(self) -> int:
        return sum(row.is_searchable for row in self.rows.values())
