"""Long-running commands: run until told to stop, finish what is in hand, leave with status 0."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger()

GRACE_SECONDS = 10.0


async def run_until_stopped(
    work: Callable[[asyncio.Event], Awaitable[None]], *, grace_seconds: float = GRACE_SECONDS
) -> None:
    """Run `work`, which ends soon after its event is set; SIGTERM and SIGINT set it.

    Work that waits for something that is down cannot end by itself: it is cancelled after `grace_seconds`. Nothing
    that was not written has been acknowledged by then. What `work` raises passes through.
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
