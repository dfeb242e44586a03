"""Long-running commands: run until a signal, finish the work in progress, exit with status 0."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger()

GRACE_SECONDS = 10.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of `mallopt` in malloc.h."""


async def run_until_stopped(
    work: Callable[[asyncio.Event], Awaitable[None]], *, grace_seconds: float = GRACE_SECONDS
) -> None:
    """Run `work`, which ends soon after its event is set; SIGTERM and SIGINT set it.

    Work that waits for an unavailable service cannot end by itself: it is cancelled after `grace_seconds`. Unwritten
    records are not acknowledged by then. What `work` raises passes through.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        working = asyncio.ensure_future(work(stop))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            log.info("process.stopping")
            await asyncio.wait({working}, timeout=grace_seconds)
        stopping.cancel()
        if not working.done():
            log.warning("process.stopped_while_waiting", grace_seconds=grace_seconds)
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working
            return
        await working
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def keep_freed_memory() -> None:
    """Let the C library (glibc) keep freed memory for the next allocation.

    A forward pass allocates and frees megabytes within milliseconds. By default that memory returns to the kernel each
    time and comes back page by page, which can double the time of a pass.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)
