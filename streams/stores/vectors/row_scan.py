"""Scan over all rows of the center by their source record, without vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pymilvus import MilvusClient
from typing_extensions import override

from streams.stores.vectors.client import MilvusConnection
from streams.stores.vectors.config import MilvusConfig
from streams.stores.vectors.item_index import InMemoryItemIndex, ItemRow

_BATCH_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class RowSource:
    """A row, and the record of `items` that it was written from."""

    item_id: str
    partition: int
    offset: int
    is_deleted: bool = False
    """Whether it is the mark of a deleted item."""


def source_of(row: ItemRow) -> RowSource:
    """The record of `items` that a row comes from."""
    return RowSource(row.item_id, row.source_partition, row.source_offset, row.is_deleted)


Choose = Callable[[RowSource], bool]


class RowScan(Protocol):
    """All rows, pending ones and marks of deleted items included."""

    async def choose(self, choose: Choose) -> list[RowSource]:
        """Rows for which `choose` is true.

        `choose` may run in another thread, one row at a time. Raises `StoreUnavailable`.
        """


class InMemoryRowScan(RowScan):
    """The rows of a dictionary."""

    def __init__(self, index: InMemoryItemIndex) -> None:
        self._index = index

    @override
    async def choose(self, choose: Choose) -> list[RowSource]:
        rows = (source_of(row) for row in list(self._index.rows.values()))
        return [row for row in rows if choose(row)]


class MilvusRowScan(RowScan):
    """The rows of a collection, a thousand at a time."""

    def __init__(self, config: MilvusConfig) -> None:
        self._config = config
        self._milvus = MilvusConnection(config)

    @override
    async def choose(self, choose: Choose) -> list[RowSource]:
        def go_through(client: MilvusClient) -> list[RowSource]:
            found: list[RowSource] = []
            iterator = client.query_iterator(
                self._config.alias,
                batch_size=_BATCH_ROWS,
                filter='item_id != ""',
                output_fields=["item_id", "source_partition", "source_offset", "content_hash"],
                consistency_level="Strong",
                timeout=self._config.timeout_seconds,
            )
            try:
                while batch := iterator.next():
                    for row in batch:
                        place = int(row["source_partition"]), int(row["source_offset"])
                        one = RowSource(str(row["item_id"]), *place, is_deleted=not row["content_hash"])
                        if choose(one):
                            found.append(one)
            finally:
                iterator.close()
            return found

        return await self._milvus.call_blocking("going through the rows", go_through)
