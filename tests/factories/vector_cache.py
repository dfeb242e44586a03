"""The vector cache of serving over stores in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from schemas.items import ItemEmbedding, SourceOffset, embedding_key
from streams.serving.config import VectorCacheConfig
from streams.serving.vector_cache import VectorCache
from streams.stores.vectors.item_index import InMemoryItemIndex, ItemRow

VERSION = "test-1"


DIM = 4


def unit(seed: int) -> NDArray[np.float32]:
    vector = np.random.default_rng(seed).normal(size=DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def row(item_id: str, seed: int) -> ItemRow:
    return ItemRow(
        item_id=item_id,
        encoder_version=VERSION,
        vector=unit(seed),
        content_hash="h",
        published_at=datetime(2025, 1, 1, tzinfo=UTC),
        category=None,
        price=None,
        first_price=None,
        has_title=True,
        has_image=False,
        source_partition=0,
        source_offset=seed,
        produced_at_ms=0,
    )


def announced(item_id: str, vector: NDArray[np.float32], version: str = VERSION) -> tuple[bytes, bytes]:
    import base64

    message = ItemEmbedding(
        item_id=item_id,
        encoder_version=version,
        vector=base64.b64encode(vector.astype("<f4").tobytes()),
        dim=len(vector),
        content_hash="h",
        published_at=datetime(2025, 1, 1, tzinfo=UTC),
        source=SourceOffset(partition=0, offset=0),
    )
    return embedding_key(version, item_id), message.model_dump_json().encode()


class CountingIndex(InMemoryItemIndex):
    """Counts reads, and can be made to hold one back."""

    def __init__(self) -> None:
        super().__init__(encoder_version=VERSION, dim=DIM)
        self.reads: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self, item_ids: Sequence[str], *, pending: bool = False) -> dict[str, ItemRow]:
        self.reads.append(list(item_ids))
        answer = await super().fetch(item_ids, pending=pending)
        await self.gate.wait()
        return answer


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    def __init__(self, **config: object) -> None:
        self.index = CountingIndex()
        self.clock = Clock()
        self.cache = VectorCache(
            self.index,
            VectorCacheConfig.model_validate({"max_staleness_seconds": 5, "absent_seconds": 1} | config),
            encoder_version=VERSION,
            dim=DIM,
            clock=self.clock,
        )

    async def ask(self, *item_ids: str) -> dict[str, NDArray[np.float32]]:
        return (await self.cache.look_up(item_ids)).items.by_item()
