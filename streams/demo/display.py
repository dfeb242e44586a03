"""The display of a running demo: bars on a terminal, else a log line now and then."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog
from rich.console import Console

from streams.runtime.progress import progress_bars

log = structlog.get_logger()


@dataclass
class DemoProgress:
    """The counts that are shown."""

    items_total: int = 0
    behaviours_total: int = 0
    items_sent: int = 0
    behaviours_sent: int = 0
    items_indexed: int = 0
    behaviours_recorded: int = 0
    behaviours_trained: int = 0
    requests: int = 0
    releases: int = 0
    second: int | None = None
    """Event time of the newest record sent."""
    doing: str = "starting"
    started: float = field(default_factory=time.monotonic)


_ROWS = (
    ("items sent", "items_sent", "items_total"),
    ("items indexed", "items_indexed", "items_total"),
    ("behaviours sent", "behaviours_sent", "behaviours_total"),
    ("behaviours recorded", "behaviours_recorded", "behaviours_total"),
    ("behaviours trained", "behaviours_trained", "behaviours_total"),
)


async def show(progress: DemoProgress, console: Console, *, log_every_seconds: float = 15.0) -> None:
    """Draw until cancelled."""
    if not console.is_terminal:
        while True:
            await asyncio.sleep(log_every_seconds)
            counts = {name: getattr(progress, name) for _, name, _ in _ROWS}
            log.info("demo.progress", doing=progress.doing, releases=progress.releases, **counts)
    with progress_bars(console) as add_bar:
        bars = {name: add_bar(label, None) for label, name, _ in _ROWS}
        status = add_bar("", None)
        while True:
            for _, name, total in _ROWS:
                bars[name].set(getattr(progress, name), getattr(progress, total) or None)
            summary = f"{progress.releases} releases, {progress.requests} scores: {progress.doing}"
            if progress.second is not None:
                summary = f"{datetime.fromtimestamp(progress.second, UTC):%Y-%m-%d %H:%M}, {summary}"
            status.set(progress.releases, what=summary)
            await asyncio.sleep(0.25)
