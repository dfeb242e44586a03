"""Publishing items to a real broker, and comparing the center with what was published."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aiokafka import AIOKafkaProducer

from schemas.errors import BrokerUnavailable
from schemas.items import ItemEmbedding, parse_embedding_key
from schemas.letters import DeadLetter
from streams.broker.clients import broker_errors, make_producer
from streams.settings import Settings
from streams.stores.vectors.item_index import ItemRow
from streams.stores.vectors.milvus_index import MilvusItemIndex
from tests.factories.topics import read_all
from tests.factories.waiting import until


@dataclass
class Feed:
    """A producer of items that remembers the last word on each."""

    settings: Settings
    producer: AIOKafkaProducer
    expected: dict[str, str] = field(default_factory=dict)
    """Item id to newest title; deleted items are not in it."""
    ever: set[str] = field(default_factory=set)

    async def send(self, key: bytes | None, value: bytes | None) -> tuple[int, int]:
        """Send until the broker has it; returns (partition, offset)."""
        while True:
            with suppress(BrokerUnavailable):
                with broker_errors(self.settings.kafka):
                    topic = self.settings.topics.full_name("items")
                    done = await self.producer.send_and_wait(topic, key=key, value=value)
                return done.partition, done.offset
            await asyncio.sleep(0.2)

    async def publish(self, item_id: str, title: str, **fields: Any) -> tuple[int, int]:
        self.expected[item_id] = title
        self.ever.add(item_id)
        item = {"item_id": item_id, "title": title, "published_at": datetime.now(UTC).isoformat(), **fields}
        return await self.send(item_id.encode(), json.dumps(item).encode())

    async def delete(self, item_id: str) -> tuple[int, int]:
        self.expected.pop(item_id, None)
        self.ever.add(item_id)
        return await self.send(item_id.encode(), None)


@asynccontextmanager
async def feeding(settings: Settings) -> AsyncIterator[Feed]:
    async with make_producer(settings.kafka, linger_ms=0) as producer:
        yield Feed(settings, producer)


@asynccontextmanager
async def center(settings: Settings) -> AsyncIterator[MilvusItemIndex]:
    """The center as the workers fill it: reading needs no more than the alias."""
    index = MilvusItemIndex(settings.milvus, encoder_version="reader", dim=1)
    try:
        yield index
    finally:
        await index.close()


async def held(index: MilvusItemIndex, ids: set[str]) -> dict[str, ItemRow]:
    ordered = sorted(ids)
    rows: dict[str, ItemRow] = {}
    for start in range(0, len(ordered), 500):
        rows |= await index.fetch(ordered[start : start + 500])
    return rows


async def assert_ends_with_the_last_word(feed: Feed, index: MilvusItemIndex, within_seconds: float = 90.0) -> None:
    """Every published item once, with its newest content; deleted ones absent."""

    async def titles_held() -> dict[str, str]:
        return {item_id: row.title for item_id, row in (await held(index, feed.ever)).items()}

    try:
        await until(titles_held, lambda titles: titles == feed.expected, seconds=within_seconds, every=0.3)
    except AssertionError:
        titles = await titles_held()
        missing = sorted(set(feed.expected) - set(titles))
        alive = sorted(set(titles) - set(feed.expected))
        outdated = sorted(i for i in set(titles) & set(feed.expected) if titles[i] != feed.expected[i])
        raise AssertionError(
            f"missing {missing[:5]} ({len(missing)}), deleted but there {alive[:5]} ({len(alive)}), "
            f"outdated {outdated[:5]} ({len(outdated)})"
        ) from None
    assert await index.count() == len(feed.expected)


async def letters(settings: Settings) -> list[DeadLetter]:
    return [DeadLetter.from_record(r.value, r.headers) for r in await read_all(settings, "dead-letters")]


async def announced(settings: Settings) -> dict[str, ItemEmbedding | None]:
    """The last announcement of each item."""
    last: dict[str, ItemEmbedding | None] = {}
    for record in await read_all(settings, "embeddings"):
        _, item_id = parse_embedding_key(record.key)
        last[item_id] = ItemEmbedding.model_validate_json(record.value) if record.value is not None else None
    return last


async def stream_items(feed: Feed, stop: asyncio.Event, *, at_least: int) -> None:
    """Publish, update and delete without pause until told to stop."""
    draw = random.Random(11)
    n = 0
    while n < at_least or not stop.is_set():
        await feed.publish(f"i{n}", f"item {n} as published")
        if n > 20 and draw.random() < 0.3:
            await feed.publish(f"i{draw.randrange(n)}", f"updated at {n}")
        if n > 20 and draw.random() < 0.2:
            await feed.delete(f"i{draw.randrange(n)}")
        n += 1
        await asyncio.sleep(0.03)


@asynccontextmanager
async def streaming_items(
    feed: Feed, index: MilvusItemIndex, *, at_least: int, until_held: int = 40
) -> AsyncIterator[None]:
    """Stream items all the while; entered when the center holds some of them."""
    stop = asyncio.Event()
    streaming = asyncio.create_task(stream_items(feed, stop, at_least=at_least))
    try:
        await until(index.count, lambda count: count > until_held)
        yield
    finally:
        stop.set()
        await streaming
