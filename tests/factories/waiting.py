"""Waiting until something holds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any


def wait_for(condition: Callable[[], object], timeout_seconds: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def until(condition: Callable[[], Any], what: str) -> None:
    print(f"waiting for {what}")
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.05)
