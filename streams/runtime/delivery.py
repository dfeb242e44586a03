"""Delivery: retry while something is unavailable, quarantine what is unprocessable, lose nothing.

Two functions for everything that reads a topic and writes a store. Neither acknowledges; the caller does, after they
return.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import structlog
from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import Unavailable, Unprocessable

log = structlog.get_logger()

T = TypeVar("T")
R = TypeVar("R")


class BackOffConfig(BaseModel):
    """How long to wait between attempts while something outside is down."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    initial_seconds: float = Field(default=0.2, gt=0)
    """First wait."""
    factor: float = Field(default=2.0, ge=1)
    """Each wait is this many times the one before."""
    max_seconds: float = Field(default=2.0, gt=0)
    """Longest wait."""
    jitter: float = Field(default=0.3, ge=0, le=1)
    """Share of a wait that is drawn at random, so that many workers do not come back at once."""

    def wait_seconds(self, attempt: int, draw: float) -> float:
        """Wait after `attempt` failures (from 1); `draw` is uniform in [0, 1)."""
        whole = min(self.max_seconds, self.initial_seconds * self.factor ** min(attempt - 1, 64))
        return whole * (1.0 - self.jitter * draw)


@dataclass(frozen=True, slots=True)
class Patience:
    """How to wait: the configuration with sleep and random source, so that tests need not sleep."""

    config: BackOffConfig = field(default_factory=BackOffConfig)
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    draw: Callable[[], float] = random.random


@dataclass(frozen=True, slots=True)
class DeliveryReport(Generic[T]):
    """Result of delivering a batch."""

    delivered: tuple[T, ...]
    """Written, in order."""
    quarantined: tuple[T, ...]
    """Passed to `quarantine`, in order."""
    retries: int
    """Number of waits for something unavailable."""
    waited_seconds: float
    """Total duration of these waits."""


async def retry_until_available(
    operation: Callable[[], Awaitable[R]], *, what: str, patience: Patience, waits: list[float] | None = None
) -> R:
    """Repeat `operation` until everything it needs is available. The caller's partition waits meanwhile.

    Appends the seconds of each wait to `waits`. Everything but `Unavailable` passes through, cancellation included.
    """
    attempt = 0
    while True:
        try:
            return await operation()
        except Unavailable as error:
            attempt += 1
            wait = patience.config.wait_seconds(attempt, patience.draw())
            if error.retry_after_seconds is not None:
                wait = max(wait, error.retry_after_seconds)
            if waits is not None:
                waits.append(wait)
            log.warning("delivery.held", what=what, error=str(error), attempt=attempt, wait_seconds=round(wait, 3))
            await patience.sleep(wait)


async def deliver(
    items: Sequence[T],
    *,
    write: Callable[[Sequence[T]], Awaitable[object]],
    quarantine: Callable[[T, Unprocessable], Awaitable[object]],
    what: str,
    patience: Patience,
) -> DeliveryReport[T]:
    """Write a batch; if it is refused, bisect it to find the unprocessable items and quarantine only those.

    `write` must be idempotent: a batch whose result is unknown is written again, and so are the halves of a refused
    batch. Items keep their order. Both `write` and `quarantine` are retried while something is unavailable.
    """
    waits: list[float] = []
    delivered: list[T] = []
    quarantined: list[T] = []
    unwritten: list[Sequence[T]] = [items] if items else []
    while unwritten:
        part = unwritten.pop()
        try:
            await retry_until_available(partial(write, part), what=what, patience=patience, waits=waits)
        except Unprocessable as error:
            if len(part) > 1:
                middle = len(part) // 2
                unwritten += [part[middle:], part[:middle]]
                continue
            await retry_until_available(partial(quarantine, part[0], error), what=what, patience=patience, waits=waits)
            quarantined.append(part[0])
        else:
            delivered.extend(part)
    return DeliveryReport(tuple(delivered), tuple(quarantined), len(waits), sum(waits))
