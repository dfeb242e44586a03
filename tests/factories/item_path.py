"""The item path with everything around it in memory."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from encoders.base import ItemContent, Prepared
from encoders.hashing import HashingEncoder
from schemas.errors import ContentUnavailable, Unprocessable
from schemas.items import ImageRetry
from streams.broker.records import SourceRecord
from streams.dead_letters.producer import InMemoryDeadLetters
from streams.indexing.announcements import InMemoryOutbox
from streams.indexing.config import IndexConfig, IndexReport, RetryReport
from streams.indexing.context import Guard, IndexContext
from streams.indexing.encoding import ItemEncoding
from streams.indexing.image_retries import begin, load, settle
from streams.indexing.index_batch import index_batch
from streams.runtime.delivery import BackOffConfig, Patience
from streams.stores.vectors.item_index import InMemoryItemIndex, ItemRow

DIM = 8
VERSION = HashingEncoder(DIM).version
NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
PRODUCED_MS = int(NOW.timestamp() * 1000)
PICTURE_URL = "https://pictures.test/1.png"


def picture(colour: str = "red", size: int = 16) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(out, "PNG")
    return out.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class CountingEncoder(HashingEncoder):
    """Takes notes of what it was asked."""

    def __init__(self) -> None:
        super().__init__(DIM)
        self.encoded = 0
        self.prices: list[float | None] = []

    def prepare(self, content: ItemContent) -> Prepared:
        self.prices.append(content.price)
        return super().prepare(content)

    def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        self.encoded += len(batch)
        return super().encode(batch)

    def of(self, *, title: str = "", category: str | None = None, image: bytes | None = None) -> NDArray[np.float32]:
        return super().encode([super().prepare(ItemContent(title=title, category=category, image=image))])[0]


async def allowed() -> None:
    pass


@dataclass
class ItemPath:
    """A center in memory, a clock to set, and a web of pictures."""

    config: IndexConfig = field(default_factory=IndexConfig)
    cache_items: int = 0
    now: datetime = NOW
    web: dict[str, bytes | Unprocessable | ContentUnavailable] = field(default_factory=dict)
    index: Any = field(default_factory=lambda: InMemoryItemIndex(encoder_version=VERSION, dim=DIM))
    encoder: CountingEncoder = field(default_factory=CountingEncoder)
    outbox: InMemoryOutbox = field(default_factory=InMemoryOutbox)
    dead_letters: InMemoryDeadLetters = field(default_factory=InMemoryDeadLetters)
    fetched: list[str] = field(default_factory=list)
    offsets: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.context = IndexContext(
            index=self.index,
            outbox=self.outbox,
            dead_letters=self.dead_letters,
            encoding=ItemEncoding(self.encoder, prepare_threads=2, encode_threads=2, cache_items=self.cache_items),
            fetch=self.fetch,
            config=self.config,
            max_record_bytes=100_000,
            patience=Patience(BackOffConfig(), sleep=self.pause, draw=lambda: 0.0),
            now=lambda: self.now,
        )

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(0)

    @asynccontextmanager
    async def fetch(self, url: str, *, timeout_seconds: float | None = None) -> AsyncIterator[bytes]:
        self.fetched.append(url)
        answer = self.web.get(url, ContentUnavailable(url, "nothing there yet"))
        if isinstance(answer, Exception):
            raise answer
        yield answer

    def record(
        self,
        key: str | bytes | None,
        value: dict[str, Any] | bytes | None,
        *,
        partition: int = 0,
        offset: int = -1,
        ms: int | None = None,
    ) -> SourceRecord:
        """A record, by default the next of its partition; `ms` is its timestamp, counted from `PRODUCED_MS`."""
        if offset < 0:
            offset = self.offsets.get(partition, 0)
        self.offsets[partition] = offset + 1
        return SourceRecord(
            topic="items",
            partition=partition,
            offset=offset,
            timestamp_ms=PRODUCED_MS + (offset if ms is None else ms),
            key=key.encode() if isinstance(key, str) else key,
            value=json.dumps(value).encode() if isinstance(value, dict) else value,
        )

    def publish(
        self, item_id: str, *, partition: int = 0, offset: int = -1, ms: int | None = None, **fields: Any
    ) -> SourceRecord:
        return self.record(item_id, item(item_id, **fields), partition=partition, offset=offset, ms=ms)

    def delete(self, item_id: str, *, partition: int = 0, offset: int = -1, ms: int | None = None) -> SourceRecord:
        return self.record(item_id, None, partition=partition, offset=offset, ms=ms)

    async def index_all(self, *records: SourceRecord) -> IndexReport:
        return await index_batch(self.context, records, allowed)

    async def retry(self, retry: ImageRetry | None = None) -> RetryReport:
        """The oldest retry, or the given one, when it is due."""
        due = retry or self.outbox.retries.pop(0)
        self.now = max(self.now, due.not_before)
        (report,) = await retry_images(self.context, [due])
        return report

    @property
    def rows(self) -> dict[str, ItemRow]:
        """All rows, pending ones and marks of deleted items included; to be changed too."""
        rows: dict[str, ItemRow] = self.index.rows
        return rows

    @property
    def on_sale(self) -> dict[str, ItemRow]:
        """The rows that are no marks of deleted items."""
        return {item_id: row for item_id, row in self.rows.items() if not row.is_deleted}

    @property
    def reasons(self) -> list[tuple[str, str, int]]:
        return [(letter.stage, letter.reason, letter.offset) for letter in self.dead_letters.letters]


async def retry_images(
    context: IndexContext, retries: Sequence[ImageRetry], guard: Guard = allowed
) -> list[RetryReport]:
    """One attempt at each, as the agent makes them."""
    attempts = await begin(context, [retry_record(retry, offset) for offset, retry in enumerate(retries)])
    return await settle(context, await asyncio.gather(*(load(context, one) for one in attempts)), guard)


def item(item_id: str, **fields: Any) -> dict[str, Any]:
    return {"item_id": item_id, "published_at": (NOW - timedelta(days=1)).isoformat(), **fields}


def retry_record(retry: ImageRetry, offset: int = 0) -> SourceRecord:
    return SourceRecord(
        topic="items-retry",
        partition=retry.source.partition,
        offset=offset,
        timestamp_ms=0,
        key=retry.item.item_id.encode(),
        value=retry.model_dump_json().encode(),
    )
