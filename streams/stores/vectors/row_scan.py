"""Scan over all rows of the center by their source record, without vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pymilvus import MilvusClient
from typing_extensions import override

from streams.stores.vectors.client import MilvusConnection
from streams.stores.vectors.config import MilvusConfig
from streams.stores.vectors.item_index import InMemoryItemIndex

_BATCH_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class RowSource:
    """A row, and the record of `items` that it was written from."""

    item_id: str
    partition: int
    offset: int


Choose = Callable[[RowSource], bool]


class RowScan(Protocol):
    """All rows of a span of source partitions, pending ones included."""

    async def choose(self, first: int, last: int | None, choose: Choose) -> list[RowSource]:
        """Rows whose source partition is in `first` to `last` (None: no upper end) and for which `choose` is true.

        `choose` may run in another thread, one row at a time. Raises `StoreUnavailable`.
        """


class InMemoryRowScan(RowScan):
    """The rows of a dictionary."""

    def __init__(self, index: InMemoryItemIndex) -> None:
        self._index = index

    @override
    async def choose(self, first: int, last: int | None, choose: Choose) -> list[RowSource]:
        rows = (
            RowSource(row.item_id, row.source_partition, row.source_offset) for row in list(self._index.rows.values())
        )
        return [
            row for row in rows if first <= row.partition and (last is None or row.partition <= last) and choose(row)
        ]


class MilvusRowScan(RowScan):
    """The rows of a collection, a thousand at a time."""

    def __init__(self, config: MilvusConfig) -> None:
        self._config = config
        self._milvus = MilvusConnection(config)

    @override
    async def choose(self, first: int, last: int | None, choose: Choose) -> list[RowSource]:
        above = f"source_partition >= {first}"
        wanted = above if last is None else f"{above} and source_partition <= {last}"

        def go_through(client: MilvusClient) -> list[RowSource]:
            found: list[RowSource] = []
            iterator = client.query_iterator(
                self._config.alias,
                batch_size=_BATCH_ROWS,
                filter=wanted,
                output_fields=["item_id", "source_partition", "source_offset"],
                consistency_level="Strong",
                timeout=self._config.timeout_seconds,
            )
            try:
                while batch := iterator.next():
                    for row in batch:
                        one = RowSource(str(row["item_id"]), int(row["source_partition"]), int(row["source_offset"]))
                        if choose(one):
                            found.append(one)
            finally:
                iterator.close()
            return found

        return await self._milvus.call_blocking("going through the rows", go_through)
