"""Every write of the item path: guarded, within its deadline, and repeated while its store is away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from schemas.errors import StoreUnavailable
from schemas.items import ImageRetry
from schemas.letters import DeadLetter
from streams.indexing.context import Guard, IndexContext
from streams.runtime.delivery import retry_until_available
from streams.stores.vectors.item_index import ItemRow


@dataclass(frozen=True)
class GuardedWriter:
    """The writes of one worker. `guard` is called before each attempt, and what it raises for good passes through.

    All repeat until what they need is available, except those that end in `_once`, which raise `Unavailable`.
    """

    context: IndexContext
    guard: Guard

    async def upsert_once(self, rows: Sequence[ItemRow]) -> None:
        """Write rows. `StoreUnavailable` after the deadline."""
        await self.guard()
        await self._within_deadline(self.context.index.upsert(rows))

    async def delete_once(self, item_ids: Sequence[str]) -> None:
        """Delete rows. `StoreUnavailable` after the deadline."""
        await self.guard()
        await self._within_deadline(self.context.index.delete(item_ids))

    async def bury_once(self, marks: Sequence[ItemRow]) -> None:
        """Put marks of deleted items in place of their rows, those of other encoders included."""
        await self.delete_once([mark.item_id for mark in marks])
        await self.upsert_once(marks)

    async def announce(self, rows: Sequence[ItemRow], gone: Sequence[str]) -> None:
        """Announce rows, and items that have none.

        The guard matters here too: a replaced worker could announce older content after its successor's newer one.
        """
        await self._repeat("embeddings.announce", partial(self._send, self.context.outbox.announce, rows, gone))

    async def retry_later(self, retries: Sequence[ImageRetry]) -> None:
        """Send pictures to `items-retry`."""
        await self._repeat("items-retry.send", partial(self._send, self.context.outbox.retry_later, retries))

    async def publish_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Send dead letters."""
        await self._repeat("dead-letters.send", partial(self._send, self.context.dead_letters.publish, letters))

    async def check_guard(self, *, what: str) -> None:
        """Wait until the guard lets a write through, without writing."""
        await self._repeat(what, self.guard)

    async def _repeat(self, what: str, write: Callable[[], Awaitable[None]]) -> None:
        await retry_until_available(write, what=what, patience=self.context.patience)

    async def _send(self, send: Callable[..., Awaitable[None]], *messages: object) -> None:
        await self.guard()
        await send(*messages)

    async def _within_deadline(self, write: Awaitable[None]) -> None:
        deadline = self.context.config.write_deadline_seconds
        try:
            async with asyncio.timeout(deadline):
                await write
        except TimeoutError:
            raise StoreUnavailable(
                "Milvus", f"a write took more than {deadline:g} s, and may not take longer"
            ) from None
