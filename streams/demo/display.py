"""What moves on the screen while the demo runs; a log line now and then where there is no screen."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

log = structlog.get_logger()


@dataclass
class Progressing:
    """The counts that are shown; whoever knows one sets it."""

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


async def show(progressing: Progressing, console: Console, *, log_every_seconds: float = 15.0) -> None:
    """Draw until cancelled."""
    if not console.is_terminal:
        while True:
            await asyncio.sleep(log_every_seconds)
            counts = {name: getattr(progressing, name) for _, name, _ in _ROWS}
            log.info("demo.progress", doing=progressing.doing, releases=progressing.releases, **counts)
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {name: progress.add_task(label, total=None) for label, name, _ in _ROWS}
        status = progress.add_task("", total=None)
        while True:
            for _, name, total in _ROWS:
                progress.update(
                    tasks[name], completed=getattr(progressing, name), total=getattr(progressing, total) or None
                )
            said = f"{progressing.releases} releases, {progressing.requests} scores: {progressing.doing}"
            if progressing.second is not None:
                said = f"{datetime.fromtimestamp(progressing.second, UTC):%Y-%m-%d %H:%M}, {said}"
            progress.update(status, description=said, completed=progressing.releases)
            await asyncio.sleep(0.25)
