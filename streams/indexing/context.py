"""What both agents of the item path work with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from schemas.errors import StoreUnavailable
from streams.dead_letters.producer import DeadLetters
from streams.indexing.announcements import Outbox
from streams.indexing.config import IndexConfig
from streams.indexing.encoding import ItemEncoding
from streams.runtime.delivery import Patience
from streams.stores.vectors.item_index import ItemIndex, ItemRow

Guard = Callable[[], Awaitable[None]]
"""Called right before a write; raises `Fenced` if this worker must not write any more."""


class Fetch(Protocol):
    """Gets a picture by its URL (`ImageFetcher.fetch`)."""

    async def __call__(self, url: str, *, timeout_seconds: float | None = None) -> bytes:
        """Raises `ContentUnavailable` or `Unprocessable`."""
        ...


@dataclass(frozen=True)
class IndexContext:
    """What both agents of the item path work with."""

    index: ItemIndex
    outbox: Outbox
    dead_letters: DeadLetters
    encoding: ItemEncoding
    fetch: Fetch
    config: IndexConfig
    max_record_bytes: int
    patience: Patience
    now: Callable[[], datetime]
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from reading a row to having announced what replaced it."""

    async def upsert(self, rows: Sequence[ItemRow], guard: Guard) -> None:
        """Write rows now, if `guard` lets us, and within the deadline. Raises `StoreUnavailable` after it."""
        await guard()
        await self._in_time(self.index.upsert(rows))

    async def delete(self, item_ids: Sequence[str], guard: Guard) -> None:
        """Delete rows, under the same conditions."""
        await guard()
        await self._in_time(self.index.delete(item_ids))

    async def _in_time(self, write: Awaitable[None]) -> None:
        deadline = self.config.write_deadline_seconds
        try:
            async with asyncio.timeout(deadline):
                await write
        except TimeoutError:
            raise StoreUnavailable(
                "Milvus", f"a write took more than {deadline:g} s, and may not take longer"
            ) from None
