"""Waiting until something holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


async def until(condition: Callable[[], Any], what: str) -> None:
    print(f"waiting for {what}")
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.05)
