"""Progress bars of long work: the one display of all commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


@dataclass(frozen=True)
class ProgressBar:
    """One bar of a display."""

    _progress: Progress
    _task: TaskID

    def advance(self, by: float = 1, what: str | None = None) -> None:
        """Add `by`; `what` replaces the description."""
        self._progress.update(self._task, advance=by, description=what)

    def set(self, done: float, total: float | None = None, what: str | None = None) -> None:
        """Show `done` of `total` (None: unchanged); `what` replaces the description."""
        self._progress.update(self._task, completed=done, total=total, description=what)


@contextmanager
def progress_bars(
    console: Console | None = None, *, keep: bool = False
) -> Iterator[Callable[[str, float | None], ProgressBar]]:
    """Bars on `console` (default: standard error) where that is a terminal; yields a function that adds one by its
    description and total. With `keep` the last state stays on the console, also where it is no terminal.
    """
    console = console or Console(stderr=True)
    text = TextColumn("{task.description:<20}", markup=False)
    columns = (text, BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = keep or console.is_terminal
    with Progress(*columns, console=console, transient=not keep, disable=not shown) as progress:
        yield lambda what, total: ProgressBar(progress, progress.add_task(what, total=total))


@contextmanager
def progress_bar(
    what: str, total: float | None = None, console: Console | None = None, *, keep: bool = False
) -> Iterator[ProgressBar]:
    """A single bar; see `progress_bars`."""
    with progress_bars(console, keep=keep) as add_bar:
        yield add_bar(what, total)
