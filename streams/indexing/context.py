"""The collaborators of the item path."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

import structlog

from schemas.attributes import Attribute, looks_like_an_outcome
from schemas.field_maps import FieldMap
from schemas.items import ItemPublished
from streams.dead_letters.producer import DeadLetters
from streams.indexing.announcements import Outbox
from streams.indexing.config import IndexConfig
from streams.indexing.encoding import ItemEncoding
from streams.runtime.delivery import Patience, retry_until_available
from streams.stores.vectors.item_index import ItemIndex, ItemRow

log = structlog.get_logger()

_MOST_REPORTED = 100

Guard = Callable[[], Awaitable[None]]
"""Called right before each write. Raises `Fenced` if this worker may no longer write, `Unavailable` if it may later."""


class Fetch(Protocol):
    """Fetches a picture by its URL (`ImageFetcher.picture`)."""

    def __call__(self, url: str, *, timeout_seconds: float | None = None) -> AbstractAsyncContextManager[bytes]:
        """The picture, held in memory while the block runs. Entering raises `ContentUnavailable` or `Unprocessable`."""
        ...


@dataclass(frozen=True)
class IndexContext:
    """The collaborators of the item path, shared by the agents and by repair."""

    index: ItemIndex
    outbox: Outbox
    dead_letters: DeadLetters
    encoding: ItemEncoding
    fetch: Fetch
    config: IndexConfig
    max_record_bytes: int
    patience: Patience
    now: Callable[[], datetime]
    deletions_kept: timedelta = timedelta(days=7)
    """How long the mark of a deleted item stays: as long as the topic keeps the deletion."""
    behaviours_map: FieldMap = field(default_factory=dict)
    """Where a platform's records of behaviours hold our fields."""
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Locked from reading a row until what replaced it was announced."""

    reported: set[str] = field(default_factory=set)
    """Attributes that were reported to look like outcomes."""

    def attributes_of(self, item: ItemPublished) -> Mapping[str, Attribute]:
        """The item's attributes, of which outcomes by setting were left out when it was read; others are reported."""
        kept = item.attributes
        for name in kept.keys() - self.reported:
            if looks_like_an_outcome(name) and len(self.reported) < _MOST_REPORTED:
                self.reported.add(name)
                log.warning(
                    "index.attribute_looks_like_an_outcome",
                    attribute=name,
                    item_id=item.item_id,
                    fix="if it tells what became of the item (ratings, sales), add it to MIM_INDEX__OUTCOMES",
                )
        return kept

    async def read_rows(self, item_ids: Sequence[str], *, what: str) -> dict[str, ItemRow]:
        """Rows of these items, pending ones included; repeated while the index is away. `what` names it in the log."""
        return await retry_until_available(
            lambda: self.index.fetch(item_ids, pending=True), what=what, patience=self.patience
        )
