"""Time from the publish of an item until a search finds it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from schemas.errors import PipelineError
from streams.demo.api import ServeApi


@dataclass
class FreshnessReport:
    """Milliseconds from the broker's acknowledgement of a publish to the first answer that holds the item."""

    found_at: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the first probe, milliseconds) per probe."""
    lost: int = 0
    """Probes that were given up."""
    resolution_ms: float = 0.0
    """The pause between two looks: no figure is finer than that."""

    @property
    def milliseconds(self) -> list[float]:
        """All measurements."""
        return [milliseconds for _, milliseconds in self.found_at]


class FreshnessProbe:
    """Follows a few items at a time from publish to searchable.

    An item is polled by its id, which costs next to nothing; once it is there, its neighbours are searched until it is
    among them. A search is expensive in the embedded store: searching all the time would slow down what is measured.
    """

    def __init__(
        self,
        api: ServeApi,
        *,
        at_once: int,
        every_seconds: float,
        spacing_seconds: float = 0.0,
        patience_seconds: float = 120.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Up to `at_once` probes are open, begun at least `spacing_seconds` apart, looked at every `every_seconds`."""
        self.report = FreshnessReport(resolution_ms=1000 * every_seconds)
        self._api = api
        self._at_once = at_once
        self._every_seconds = every_seconds
        self._spacing_seconds = spacing_seconds
        self._patience_seconds = patience_seconds
        self._monotonic = monotonic
        self._open: dict[str, float] = {}
        self._first: float | None = None
        self._newest = float("-inf")

    def published(self, item_id: str, at: float) -> None:
        """Note that the broker has the item since `at`; it is followed if there is room."""
        if len(self._open) < self._at_once and at - self._newest >= self._spacing_seconds:
            self._open[item_id] = self._newest = at
            self._first = at if self._first is None else self._first

    async def run(self, stop: asyncio.Event) -> FreshnessReport:
        """Look until `stop` is set and no probe is open any more."""
        while self._open or not stop.is_set():
            for item_id in list(self._open):
                await self._look(item_id)
            await asyncio.sleep(self._every_seconds)
        return self.report

    async def _look(self, item_id: str) -> None:
        try:
            found = await self._api.holds(item_id) and await self._is_its_own_neighbour(item_id)
        except PipelineError:
            found = False  # not ready yet, or busy: the next look counts
        now = self._monotonic()
        assert self._first is not None
        if found:
            self.report.found_at.append((now - self._first, 1000 * (now - self._open.pop(item_id))))
        elif now - self._open[item_id] > self._patience_seconds:
            del self._open[item_id]
            self.report.lost += 1

    async def _is_its_own_neighbour(self, item_id: str) -> bool:
        (result,) = await self._api.similar([item_id], k=10, include_self=True)
        return any(neighbour.item_id == item_id for neighbour in result.neighbours)


async def probe_at_rate(
    api: ServeApi,
    send: Callable[[str, bytes], Awaitable[object]],
    items: Sequence[tuple[str, bytes]],
    *,
    per_second: float,
    every_seconds: float,
    patience_seconds: float = 120.0,
) -> FreshnessReport:
    """Publish (id, payload) one by one at a steady rate and follow each until a search finds it.

    `send` returns once the broker has acknowledged the record. Where the rate is below what the index worker reaches,
    no item waits behind another, and the figures are those of a single publish.
    """
    probe = FreshnessProbe(api, at_once=len(items), every_seconds=every_seconds, patience_seconds=patience_seconds)
    sent_everything = asyncio.Event()
    probing = asyncio.create_task(probe.run(sent_everything))
    try:
        began = time.monotonic()
        for number, (item_id, payload) in enumerate(items):
            await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))
            await send(item_id, payload)
            probe.published(item_id, time.monotonic())
        sent_everything.set()
        return await probing
    finally:
        probing.cancel()
