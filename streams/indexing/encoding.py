"""Encoding beside the event loop: preparing in a few threads, the towers in others, and nothing twice."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import structlog
from numpy.typing import NDArray

from encoders.base import Encoder, ItemContent, Prepared, query_content
from schemas.errors import EncoderUnavailable, EncodingFailed, Misconfigured, PipelineError, Reason
from schemas.items import ItemPublished

log = structlog.get_logger()


class ItemEncoding:
    """An encoder whose work never blocks the loop: a blocked loop stalls every agent, timer and heartbeat.

    Keeps the vectors of the last `cache_items` contents, by a digest of all that the towers see. With several
    `encode_threads` each batch is shared out among them: passes side by side, of one core each, waste less than one
    pass whose operations are split over all cores.

    An encoder that raises what it should not (out of memory, an operation that its device refuses) is tried with a
    content that has always worked. If that works, the batch is at fault, and smaller parts of it may be encoded; else
    the encoder is unavailable, and after `patience_seconds` the process ends.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        prepare_threads: int,
        encode_threads: int = 1,
        cache_items: int = 0,
        patience_seconds: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._encoder = encoder
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._failing_since: float | None = None
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
        return await self._prepared(replace(ItemContent.of(item, picture), price=first_price))

    async def prepare_query(self, text: str | None, image: bytes | None) -> Prepared | EncodingFailed:
        """The same for what a user searched."""
        return await self._prepared(query_content(text, image))

    async def _prepared(self, content: ItemContent) -> Prepared | EncodingFailed:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._preparing, self._prepare, content)
        except EncodingFailed as error:
            return error
        except PipelineError:
            raise
        except Exception as error:  # one item's content must not end the process, again and again
            log.exception("encoder.prepare_failed")
            return EncodingFailed(Reason.ENCODER_FAILED, f"cannot be prepared: {error!r}")

    async def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(n, dim) unit rows.

        Raises `EncodingFailed` if the encoder fails for this batch (a part of it may work), `EncoderUnavailable` if it
        fails for everything, and `Misconfigured` if it has done so for too long.
        """
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
        shared = await asyncio.gather(*work, return_exceptions=True)
        for failure in shared:
            if isinstance(failure, BaseException):
                raise await self._judged(failure, len(items))
        for share, vectors in zip(shares, shared, strict=False):
            assert not isinstance(vectors, BaseException)
            for place, vector in zip(share, vectors, strict=True):
                found[addresses[place]] = vector.copy()  # a row of its own: a view would keep its whole batch alive
        for address, vector in found.items():
            self._vectors[address] = vector
            self._vectors.move_to_end(address)
        while len(self._vectors) > self._cache_items:
            self._vectors.popitem(last=False)
        return np.stack([found[one.address] for one in batch]) if batch else np.zeros((0, self.dim), np.float32)

    async def encode_queries(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(n, dim) unit rows, as the encoder sees what users ask with; in one pass. Raises as `encode` does."""
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._towers, self._encoder.encode_queries, list(batch)
            )
        except Exception as failure:
            raise await self._judged(failure, len(batch)) from failure

    async def _judged(self, failure: BaseException, count: int) -> BaseException:
        """What a failure to encode `count` contents means."""
        if isinstance(failure, PipelineError) or not isinstance(failure, Exception):
            return failure
        loop = asyncio.get_running_loop()
        try:
            probe = await loop.run_in_executor(self._preparing, self._prepare, ItemContent(title="probe"))
            await loop.run_in_executor(self._towers, self._encoder.encode, [probe])
        except (RuntimeError, MemoryError, OSError) as error:  # what a device raises; anything else is a bug
            now = self._clock()
            self._failing_since = now if self._failing_since is None else self._failing_since
            if now - self._failing_since < self._patience_seconds:
                return EncoderUnavailable("the encoder", f"it fails for every content: {error!r}")
            return Misconfigured(
                f"the encoder has failed for every content for {now - self._failing_since:.0f} s: {error!r}. "
                "Nothing is lost: start again when its device works (nvidia-smi shows memory and errors), or set "
                "MIM_ENCODER__DEVICE=cpu"
            )
        self._failing_since = None
        log.warning("encoder.failed", count=count, error=repr(failure))
        return EncodingFailed(Reason.ENCODER_FAILED, f"the encoder fails for it: {failure!r}")

    def close(self) -> None:
        """End the threads after what they have in hand."""
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._towers.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, content: ItemContent) -> Prepared:
        prepared = self._encoder.prepare(content)
        _ = prepared.address  # computed here, so that the event loop need not
        return prepared
