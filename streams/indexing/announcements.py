"""What the indexer sends: announcements of what the center holds now, and pictures to fetch again."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from aiokafka import AIOKafkaProducer
from pydantic import BaseModel
from typing_extensions import override

from schemas.items import ImageRetry, ItemEmbedding, SourceOffset, embedding_key
from schemas.queries import QueryEmbedding, query_key
from streams.broker.clients import BrokerConfig, broker_errors
from streams.broker.topics import TopicsConfig
from streams.stores.vectors.item_index import ItemRow


class Outbox(Protocol):
    """Messages that follow a write. They are stored when a call returns; `BrokerUnavailable` if that is unknown."""

    async def announce(self, held: Sequence[ItemRow], gone: Sequence[str]) -> None:
        """Announce rows that the center holds now, and items that it holds no longer."""
        ...

    async def retry_later(self, retries: Sequence[ImageRetry]) -> None:
        """Send pictures to where they are fetched again."""
        ...

    async def announce_queries(self, queries: Sequence[QueryEmbedding]) -> None:
        """Announce what users searched for."""
        ...


class InMemoryOutbox(Outbox):
    """Messages in lists."""

    def __init__(self) -> None:
        self.announced: list[ItemRow | str] = []
        """Rows, and the ids of items that are gone, in order."""
        self.queries: list[QueryEmbedding] = []
        self.retries: list[ImageRetry] = []

    @override
    async def announce(self, held: Sequence[ItemRow], gone: Sequence[str]) -> None:
        self.announced += [*held, *gone]

    @override
    async def retry_later(self, retries: Sequence[ImageRetry]) -> None:
        self.retries += retries

    @override
    async def announce_queries(self, queries: Sequence[QueryEmbedding]) -> None:
        self.queries += queries


class KafkaOutbox(Outbox):
    """Messages in the topics `embeddings`, `items-retry` and `queries`."""

    def __init__(
        self, producer: AIOKafkaProducer, broker: BrokerConfig, topics: TopicsConfig, *, encoder_version: str
    ) -> None:
        self._producer = producer
        self._broker = broker
        self._embeddings = topics.full_name("embeddings")
        self._retries = topics.full_name("items-retry")
        self._queries = topics.full_name("queries")
        self._encoder_version = encoder_version

    @override
    async def announce(self, held: Sequence[ItemRow], gone: Sequence[str]) -> None:
        await self._send(
            self._embeddings,
            [(embedding_key(row.encoder_version, row.item_id), _as_json(as_embedding(row)), None) for row in held]
            + [(embedding_key(self._encoder_version, item_id), None, None) for item_id in gone],
        )

    @override
    async def retry_later(self, retries: Sequence[ImageRetry]) -> None:
        # to the partition of the source, so that one worker reads an item and its retries
        await self._send(
            self._retries,
            [(retry.item.item_id.encode(), _as_json(retry), retry.source.partition) for retry in retries],
        )

    @override
    async def announce_queries(self, queries: Sequence[QueryEmbedding]) -> None:
        await self._send(
            self._queries, [(query_key(one.encoder_version, one.query), _as_json(one), None) for one in queries]
        )

    async def _send(self, topic: str, messages: Sequence[tuple[bytes, bytes | None, int | None]]) -> None:
        """Send (key, value, partition) each, then wait until the broker has all."""
        with broker_errors(self._broker):
            pending = [
                await self._producer.send(topic, key=key, value=value, partition=partition)
                for key, value, partition in messages
            ]
            await asyncio.gather(*pending)


def _as_json(message: BaseModel) -> bytes:
    return message.model_dump_json().encode()


def as_embedding(row: ItemRow) -> ItemEmbedding:
    """The message that announces a row."""
    return ItemEmbedding(
        item_id=row.item_id,
        encoder_version=row.encoder_version,
        vector=base64.b64encode(np.ascontiguousarray(row.vector, dtype="<f4").tobytes()),
        dim=len(row.vector),
        content_hash=row.content_hash,
        published_at=row.published_at,
        title=row.title,
        category=row.category,
        price=row.first_price,
        year=row.year,
        attributes=dict(row.attributes),
        published_at_is=row.published_at_is,
        has_title=row.has_title,
        has_image=row.has_image,
        source=SourceOffset(partition=row.source_partition, offset=row.source_offset),
    )
