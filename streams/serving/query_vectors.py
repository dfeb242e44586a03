"""Vectors of searches: cached by what was searched, else encoded in threads, equal searches at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from encoders.base import Encoder, query_content
from schemas.errors import EncodingFailed, Misconfigured, Reason
from schemas.queries import query_id
from streams.serving.reports import SearchReport

log = structlog.get_logger()

Vector = NDArray[np.float32]


class QueryEncoder(Protocol):
    """The encoder of queries, loaded at the first use."""

    async def get(self) -> Encoder:
        """The encoder. Raises `Misconfigured` if it cannot be loaded or is not the center's."""
        ...


def is_refused(error: BaseException) -> bool:
    """Whether an encoding failed because of what was sent, and not because of the encoder."""
    return isinstance(error, EncodingFailed) and error.reason is not Reason.BAD_VECTOR


class QueryVectors:
    """Vectors of searches by words, by a photo or by both; used from one event loop.

    The searches not asked for longest leave the cache first. What could not be encoded is not kept: the next request
    tries again. An encoding goes on for others, and for the cache, when whoever asked for it waits no longer.
    """

    def __init__(
        self,
        encoder: QueryEncoder,
        compute: ThreadPoolExecutor,
        *,
        most_cached: int,
        most_waiting: int,
        on_report: Callable[[object], None],
    ) -> None:
        """`most_waiting` bounds the encodings under way at which `begin` still adds one."""
        self.encoder = encoder
        self._compute = compute
        self._most_cached = most_cached
        self._most_waiting = most_waiting
        self._on_report = on_report
        self._cached: dict[str | None, Vector] = {}
        """The least recently used first."""
        self._under_way: dict[str | None, asyncio.Task[Vector]] = {}

    def __len__(self) -> int:
        return len(self._cached)

    def begin(self, text: str | None, image: bytes | None) -> Vector | asyncio.Task[Vector] | None:
        """The vector, shape (dim,), if it is known; else the task that makes it; None where too many are under way.

        The task raises as `get` does. It is shared: wait for it, and do not cancel it.
        """
        return self._find(query_id(text, image), text, image, self._most_waiting)

    async def get(self, text: str | None, image: bytes | None) -> Vector:
        """The vector, however long it takes, shape (dim,).

        Raises `Misconfigured` without an encoder, and `EncodingFailed` for what cannot be encoded.
        """
        found = self._find(query_id(text, image), text, image, None)
        assert found is not None
        return await asyncio.shield(found) if isinstance(found, asyncio.Task) else found

    def report(self, outcome: str, seconds: float | None = None) -> None:
        """Report what became of a search."""
        self._on_report(SearchReport(outcome, len(self._cached), seconds))

    def _find(
        self, query: str | None, text: str | None, image: bytes | None, most_waiting: int | None
    ) -> Vector | asyncio.Task[Vector] | None:
        vector = self._cached.pop(query, None)
        if vector is not None:
            self._cached[query] = vector
            self.report("hit")
            return vector
        task = self._under_way.get(query)
        if task is not None:
            self.report("shared")
            return task
        if most_waiting is not None and len(self._under_way) >= most_waiting:
            return None
        task = asyncio.get_running_loop().create_task(self._encode(query, text, image))
        self._under_way[query] = task
        task.add_done_callback(lambda done: self._ended(query, done))
        return task

    async def _encode(self, query: str | None, text: str | None, image: bytes | None) -> Vector:
        encoder = await self.encoder.get()
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        vector = await loop.run_in_executor(self._compute, _encoded, encoder, text, image)
        self._cached[query] = vector
        if len(self._cached) > self._most_cached:
            del self._cached[next(iter(self._cached))]
        self.report("encoded", time.perf_counter() - started)
        return vector

    def _ended(self, query: str | None, task: asyncio.Task[Vector]) -> None:
        del self._under_way[query]
        error = None if task.cancelled() else task.exception()  # looked at, as nobody may wait any more
        if error is None or isinstance(error, Misconfigured):
            return
        if is_refused(error):
            self.report("refused")
        else:
            self.report("failed")
            log.error("serve.query_not_encoded", error=repr(error)[:500])


def _encoded(encoder: Encoder, text: str | None, image: bytes | None) -> Vector:
    prepared = encoder.prepare(query_content(text, image or None))
    return np.array(encoder.encode_queries([prepared])[0])  # a copy: no view of a larger array is kept
