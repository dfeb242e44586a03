"""Encoding beside the event loop: preparing in a few threads, the towers in others, and nothing twice."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from encoders.base import Encoder, ItemContent, Prepared
from schemas.errors import EncodingFailed
from schemas.items import ItemPublished


class ItemEncoding:
    """An encoder whose work never blocks the loop: a blocked loop stalls every agent, timer and heartbeat.

    Keeps the vectors of the last `cache_items` contents, by a digest of all that the towers see.
    """

    def __init__(self, encoder: Encoder, *, prepare_threads: int, cache_items: int = 0) -> None:
        self._encoder = encoder
        self._preparing = ThreadPoolExecutor(prepare_threads, thread_name_prefix="prepare")
        self._towers = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._cache_items = cache_items
        self._vectors: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()  # only the tower thread touches it

    @property
    def version(self) -> str:
        """The encoder's version."""
        return self._encoder.version

    @property
    def dim(self) -> int:
        """Width of its vectors."""
        return self._encoder.dim

    async def prepare(
        self, contents: Sequence[tuple[ItemPublished, float | None, bytes | None]]
    ) -> list[Prepared | EncodingFailed]:
        """For each (item, price at first publish, picture) what the towers need, or why it cannot be had."""
        return await asyncio.gather(*(self._prepare_one(*content) for content in contents))

    async def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(n, dim) unit rows."""
        return await asyncio.get_running_loop().run_in_executor(self._towers, self._encode_new, batch)

    def close(self) -> None:
        """End the threads after what they have in hand."""
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._towers.shutdown(wait=False, cancel_futures=True)

    async def _prepare_one(
        self, item: ItemPublished, first_price: float | None, image: bytes | None
    ) -> Prepared | EncodingFailed:
        content = replace(ItemContent.of(item, image), price=first_price)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._preparing, self._prepare, content)
        except EncodingFailed as error:
            return error

    def _prepare(self, content: ItemContent) -> Prepared:
        prepared = self._encoder.prepare(content)
        _ = prepared.address  # computed here, so that the tower thread need not
        return prepared

    def _encode_new(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        found = {one.address: vector for one in batch if (vector := self._vectors.get(one.address)) is not None}
        new = {one.address: one for one in batch if one.address not in found}
        if new:
            found |= zip(new, self._encoder.encode(list(new.values())), strict=True)
        for address, vector in found.items():
            self._vectors[address] = vector.copy()  # a row of its own: a view would keep its whole batch alive
            self._vectors.move_to_end(address)
        while len(self._vectors) > self._cache_items:
            self._vectors.popitem(last=False)
        return np.stack([found[one.address] for one in batch]) if batch else np.zeros((0, self.dim), np.float32)
