"""Waiting until something holds."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from schemas.errors import BrokerUnavailable, StoreUnavailable


class Clock:
    """A clock that a test sets."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return self.now


async def until(
    read: Callable[[], Any], holds: Callable[[Any], Any] = bool, *, seconds: float = 60.0, every: float = 0.05
) -> None:
    """Wait until what `read` gives (awaited where it is awaitable) satisfies `holds`; what is away is read again."""
    last, started = None, time.monotonic()
    while time.monotonic() - started < seconds:
        with suppress(StoreUnavailable, BrokerUnavailable):
            last = read()
            if inspect.isawaitable(last):
                last = await last
            if holds(last):
                return
        await asyncio.sleep(every)
    raise AssertionError(f"not within {seconds} s (last: {last})")


def wait_until(condition: Callable[[], Any], what: str = "it", timeout_seconds: float = 100.0) -> Any:
    """Wait without an event loop; returns what the condition gave."""
    deadline = time.monotonic() + timeout_seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_seconds} s for {what}"
        time.sleep(0.05)
    return found
