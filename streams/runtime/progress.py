"""Progress of long work: bars on a terminal, else a log line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = structlog.get_logger()

LOG_EVERY_SECONDS = 15.0


class ProgressBar(Protocol):
    """How far one piece of work is."""

    def advance(self, by: float = 1, what: str | None = None) -> None:
        """Add `by`; `what` replaces the description."""

    def set(self, done: float, total: float | None = None, what: str | None = None) -> None:
        """Show `done` of `total` (None: unchanged); `what` replaces the description."""


@dataclass(frozen=True)
class _DrawnBar:
    """One bar of a display."""

    _progress: Progress
    _task: TaskID

    def advance(self, by: float = 1, what: str | None = None) -> None:
        self._progress.update(self._task, advance=by, description=what)

    def set(self, done: float, total: float | None = None, what: str | None = None) -> None:
        self._progress.update(self._task, completed=done, total=total, description=what)


@dataclass
class _LoggedBar:
    """Log lines, at most one in `LOG_EVERY_SECONDS`, and none about work that is over sooner."""

    what: str
    total: float | None
    clock: Callable[[], float]
    done: float = 0.0
    _next: float = field(init=False)

    def __post_init__(self) -> None:
        self._next = self.clock() + LOG_EVERY_SECONDS

    def advance(self, by: float = 1, what: str | None = None) -> None:
        self.set(self.done + by, what=what)

    def set(self, done: float, total: float | None = None, what: str | None = None) -> None:
        self.done, self.total, self.what = done, self.total if total is None else total, what or self.what
        if self.clock() >= self._next:
            self._next = self.clock() + LOG_EVERY_SECONDS
            log.info("progress", doing=self.what, done=round(self.done, 1), total=self.total)


@contextmanager
def progress_bars(
    console: Console | None = None, *, keep: bool = False, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str, float | None], ProgressBar]]:
    """Bars on `console` (default: standard error) where that is a terminal, else log lines; yields a function that adds
    one by its description and total. With `keep` the last state stays on the terminal.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, total: _LoggedBar(what, total, clock)
        return
    text = TextColumn("{task.description:<20}", markup=False)
    columns = (text, BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=not keep) as progress:
        yield lambda what, total: _DrawnBar(progress, progress.add_task(what, total=total))


@contextmanager
def progress_bar(
    what: str, total: float | None = None, console: Console | None = None, *, keep: bool = False
) -> Iterator[ProgressBar]:
    """A single bar; see `progress_bars`."""
    with progress_bars(console, keep=keep) as add_bar:
        yield add_bar(what, total)
