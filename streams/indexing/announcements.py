"""What the indexer sends: announcements of what the center holds now, and pictures to fetch again."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from aiokafka import AIOKafkaProducer
from typing_extensions import override

from schemas.items import ImageRetry, ItemEmbedding, SourceOffset, embedding_key
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


class InMemoryOutbox(Outbox):
    """Messages in lists."""

    def __init__(self) -> None:
        self.announced: list[ItemRow | str] = []
        """Rows, and the ids of items that are gone, in order."""
        self.retries: list[ImageRetry] = []

    @override
    async def announce(self, held: Sequence[ItemRow], gone: Sequence[str]) -> None:
        self.announced += [*held, *gone]

    @override
    async def retry_later(self, retries: Sequence[ImageRetry]) -> None:
        self.retries += retries


class KafkaOutbox(Outbox):
    """Messages in the topics `embeddings` and `items-retry`."""

    def __init__(
        self, producer: AIOKafkaProducer, broker: BrokerConfig, topics: TopicsConfig, *, encoder_version: str
    ) -> None:
        self._producer = producer
        self._broker = broker
        self._embeddings = topics.full_name("embeddings")
        self._retries = topics.full_name("items-retry")
        self._encoder_version = encoder_version

    @override
    async def announce(self, held: Sequence[ItemRow], gone: Sequence[str]) -> None:
        with broker_errors(self._broker):
            pending = [
                await self._producer.send(
                    self._embeddings,
                    key=embedding_key(row.encoder_version, row.item_id),
                    value=as_embedding(row).model_dump_json().encode(),
                )
                for row in held
            ]
            pending += [
                await self._producer.send(
                    self._embeddings, key=embedding_key(self._encoder_version, item_id), value=None
                )
                for item_id in gone
            ]
            await asyncio.gather(*pending)

    @override
    async def retry_later(self, retries: Sequence[ImageRetry]) -> None:
        with broker_errors(self._broker):
            pending = [
                await self._producer.send(
                    self._retries,
                    key=retry.item.item_id.encode(),
                    value=retry.model_dump_json().encode(),
                    partition=retry.source.partition,  # so that the worker of an item reads its retry
                )
                for retry in retries
            ]
            await asyncio.gather(*pending)


def as_embedding(row: ItemRow) -> ItemEmbedding:
    """The message that announces a row."""
    return ItemEmbedding(
        item_id=row.item_id,
        encoder_version=row.encoder_version,
        vector=base64.b64encode(np.ascontiguousarray(row.vector, dtype="<f4").tobytes()),
        dim=len(row.vector),
        content_hash=row.content_hash,
        published_at=row.published_at,
        category=row.category,
        price=row.first_price,
        has_title=row.has_title,
        has_image=row.has_image,
        source=SourceOffset(partition=row.source_partition, offset=row.source_offset),
    )
