"""Where the network runs: on the loop for a request that is alone, in threads while there are others.

A pass in a thread lets go of the interpreter for as long as it computes, so the loop prepares the next request
meanwhile. Alone there is nothing to prepare, and the way to a thread and back would only take time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Batch = TypeVar("Batch")


class ForwardPasses:
    """Runs the passes of all requests; `threads` bounds how many go on at a time."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._turn = asyncio.Lock()
        self._under_way = 0

    async def run(
        self, prepare: Callable[[], Batch], forward: Callable[[Batch], NDArray[np.float64]]
    ) -> tuple[Batch, NDArray[np.float64]]:
        """What the request is as tensors, and its probabilities."""
        self._under_way += 1
        try:
            async with self._turn:
                await asyncio.sleep(0)  # answers of the stores are read in between, else their time limits pass unheard
                batch = prepare()
                if self._under_way == 1:
                    return batch, forward(batch)
            return batch, await asyncio.get_running_loop().run_in_executor(self._threads, forward, batch)
        finally:
            self._under_way -= 1
