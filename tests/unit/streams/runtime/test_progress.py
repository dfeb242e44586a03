"""Long work tells how far it is, on a terminal and in a log."""

from __future__ import annotations

import io

from rich.console import Console
from structlog.testing import capture_logs

from streams.runtime.progress import LOG_EVERY_SECONDS, progress_bars


def test_where_there_is_no_terminal_a_line_is_logged_now_and_then() -> None:
    now = [0.0]
    out = io.StringIO()
    console = Console(file=out, force_terminal=False)
    with capture_logs() as lines, progress_bars(console, clock=lambda: now[0]) as add_bar:
        bar = add_bar("reading", None)
        for _ in range(100):
            bar.advance(2)
        assert lines == []  # work of moments says nothing
        now[0] = LOG_EVERY_SECONDS
        bar.set(300, 1_000, "writing")
        bar.advance()
        now[0] += LOG_EVERY_SECONDS
        bar.advance()
    assert [(line["doing"], line["done"], line["total"]) for line in lines] == [
        ("writing", 300, 1_000),
        ("writing", 302, 1_000),
    ]
    assert out.getvalue() == ""


def test_on_a_terminal_bars_are_drawn_and_nothing_is_logged() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with capture_logs() as lines, progress_bars(console, keep=True) as add_bar:
        bar = add_bar("reading", 10)
        bar.set(4)
        bar.advance(1, "writing")
    assert "writing" in out.getvalue() and "5/10" in out.getvalue() and lines == []
