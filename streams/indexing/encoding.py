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

    Keeps the vectors of the last `cache_items` contents, by a digest of all that the towers see. With several
    `encode_threads` each batch is shared out among them: passes side by side, of one core each, waste less than one
    pass whose operations are split over all cores.
    """

    def __init__(
        self, encoder: Encoder, *, prepare_threads: int, encode_threads: int = 1, cache_items: int = 0
    ) -> None:
        self._encoder = encoder
        self._preparing = ThreadPoolExecutor(prepare_threads, thread_name_prefix="prepare")
        self._encode_threads = encode_threads
        self._towers = ThreadPoolExecutor(encode_threads, thread_name_prefix="encode")
        self._cache_items = cache_items
        self._vectors: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    @property
    def version(self) -> str:
        """The encoder's version."""
        return self._encoder.version

    @property
    def dim(self) -> int:
        """Width of its vectors."""
        return self._encoder.dim

    async def prepare(
        self, item: ItemPublished, first_price: float | None, picture: bytes | None
    ) -> Prepared | EncodingFailed:
        """What the towers need of an item, or why it cannot be had."""
        content = replace(ItemContent.of(item, picture), price=first_price)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._preparing, self._prepare, content)
        except EncodingFailed as error:
            return error

    async def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(n, dim) unit rows."""
        found = {one.address: vector for one in batch if (vector := self._vectors.get(one.address)) is not None}
        new = {one.address: one for one in batch if one.address not in found}
        addresses, items = list(new), list(new.values())
        loop = asyncio.get_running_loop()
        shares = [range(start, len(items), self._encode_threads) for start in range(self._encode_threads)]
        work = [
            loop.run_in_executor(self._towers, self._encoder.encode, [items[place] for place in share])
            for share in shares
            if share
        ]
        for share, vectors in zip(shares, await asyncio.gather(*work), strict=False):
            for place, vector in zip(share, vectors, strict=True):
                found[addresses[place]] = vector.copy()  # a row of its own: a view would keep its whole batch alive
        for address, vector in found.items():
            self._vectors[address] = vector
            self._vectors.move_to_end(address)
        while len(self._vectors) > self._cache_items:
            self._vectors.popitem(last=False)
        return np.stack([found[one.address] for one in batch]) if batch else np.zeros((0, self.dim), np.float32)

    def close(self) -> None:
        """End the threads after what they have in hand."""
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._towers.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, content: ItemContent) -> Prepared:
        prepared = self._encoder.prepare(content)
        _ = prepared.address  # computed here, so that the event loop need not
        return prepared
