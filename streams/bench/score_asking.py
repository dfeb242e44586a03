"""Clients that ask a server over HTTP and take the time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import aiohttp

from schemas.errors import Unavailable

Seconds = dict[tuple[int, str], list[float]]
"""Of each request, by number of clients and what was asked."""


async def ask(
    session: aiohttp.ClientSession, url: str, bodies: Sequence[bytes], clients: int, *, holds: bytes = b""
) -> list[float]:
    """Seconds that each question took, in order of answers, with so many clients that each ask one at a time.

    Raises `Unavailable` for an answer that is no 200 or does not hold `holds`.
    """
    waiting = iter(bodies)
    took: list[float] = []

    async def client() -> None:
        for body in waiting:
            started = time.perf_counter()
            async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                answer = await response.read()
            took.append(time.perf_counter() - started)
            if response.status != 200 or holds not in answer:
                raise Unavailable(url, f"it answers {response.status}: {answer[-300:]!r}")

    await asyncio.gather(*(client() for _ in range(clients)))
    return took
