"""The vector cache of serving over stores in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.items import embedding_key
from streams.indexing.announcements import as_embedding
from streams.serving.config import VectorCacheConfig
from streams.serving.vector_cache import VectorCache
from streams.stores.vectors.item_index import InMemoryItemIndex, ItemRow
from tests.factories.samples import unit_vector
from tests.factories.waiting import Clock
from trainer.samples.item_facts import FactsConfig

VERSION = "test-1"


DIM = 4


def unit(seed: int, dim: int = DIM) -> NDArray[np.float32]:
    return unit_vector(seed, dim)


def row(item_id: str, seed: int, *, version: str = VERSION, dim: int = DIM, **changes: Any) -> ItemRow:
    """A row that was published as `seed`-th record."""
    published, vector = datetime(2025, 1, 1, tzinfo=UTC), unit(seed, dim)
    plain = ItemRow(item_id, version, vector, f"{seed}", published, None, 1.0, 1.0, True, False, 0, seed, 0)
    return replace(plain, **changes)


def announced(item_id: str, vector: NDArray[np.float32], version: str = VERSION) -> tuple[bytes, bytes]:
    """Key and value of an announcement."""
    message = as_embedding(row(item_id, 0, version=version, vector=vector))
    return embedding_key(version, item_id), message.model_dump_json().encode()


class CountingIndex(InMemoryItemIndex):
    """Counts reads, and can be made to hold one back."""

    def __init__(self) -> None:
        super().__init__(encoder_version=VERSION, dim=DIM)
        self.reads: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self, item_ids: Sequence[str], *, pending: bool = False, fresh: bool = True) -> dict[str, ItemRow]:
        self.reads.append(list(item_ids))
        answer = await super().fetch(item_ids, pending=pending)
        await self.gate.wait()
        return answer


class Bench:
    def __init__(self, **config: object) -> None:
        self.index = CountingIndex()
        self.clock = Clock(1_000.0)
        self.cache = VectorCache(
            self.index,
            VectorCacheConfig.model_validate({"max_staleness_seconds": 5, "absent_seconds": 1} | config),
            encoder_version=VERSION,
            dim=DIM,
            facts=FactsConfig(),
            clock=self.clock,
        )

    async def ask(self, *item_ids: str) -> dict[str, NDArray[np.float32]]:
        return (await self.cache.look_up(item_ids)).items.by_item()

    async def ask_slowly(self, item_id: str) -> asyncio.Task[dict[str, NDArray[np.float32]]]:
        """Ask for an item that the index holds; it reads, and does not answer before its gate is opened."""
        await self.index.upsert([row(item_id, 1)])
        self.index.gate.clear()
        asking = asyncio.create_task(self.ask(item_id))
        await asyncio.sleep(0)
        return asking
