"""A long-running command ends at a signal, after its work or without it; logs are for people or machines."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator

import pytest
import structlog

from streams.runtime.interval import IntervalTimer
from streams.runtime.logs import configure_logging
from streams.runtime.process import run_until_stopped
from streams.runtime.terminal import escaped, say


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_work_in_progress_is_finished_after_a_signal(number: signal.Signals) -> None:
    done: list[str] = []

    async def work(stop: asyncio.Event) -> None:
        os.kill(os.getpid(), number)
        await stop.wait()
        await asyncio.sleep(0.01)
        done.append("written")

    await run_until_stopped(work)
    assert done == ["written"] and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


async def test_work_that_waits_for_ever_is_cancelled_after_its_grace() -> None:
    ended: list[str] = []

    async def work(stop: asyncio.Event) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async with asyncio.timeout(5) as limit:
        await run_until_stopped(work, grace_seconds=0.05)
    assert ended == ["cancelled"] and not limit.expired()  # by its grace, and not by the test


@pytest.mark.parametrize("stopped", [True, False])
async def test_what_work_raises_comes_out_before_and_after_a_signal(stopped: bool) -> None:
    async def work(stop: asyncio.Event) -> None:
        if stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            await stop.wait()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run_until_stopped(work)


async def test_work_that_ends_by_itself_ends_the_command() -> None:
    async def work(stop: asyncio.Event) -> None:
        assert not stop.is_set()

    async with asyncio.timeout(5):
        await run_until_stopped(work)


def test_an_interval_is_over_after_its_seconds_and_whenever_the_clock_is_set_back() -> None:
    now = [100.0]
    timer = IntervalTimer(5, lambda: now[0])
    assert timer.passed
    timer.begin()
    for at, passed in ((100, False), (104.9, False), (105, True), (99.9, True), (101, False)):
        now[0] = at
        assert timer.passed is passed, at
    timer.cut_short()
    assert timer.passed


@pytest.mark.parametrize(
    ("text", "lines", "shown"),
    [
        ("plain é 商品", False, "plain é 商品"),
        ("a\x1b[31mb", False, r"a\x1b[31mb"),
        ("a\nb\tc", False, r"a\nb\tc"),
        ("a\nb\tc\r", True, "a\nb\tc\\r"),
        ("\u202eabc", True, r"\u202eabc"),
        ("a\u2028b\u2029c", True, r"a\u2028b\u2029c"),
        ("\ud800", True, r"\ud800"),
        ("a\u00a0b", True, "a\u00a0b"),  # not printable, and acts on nothing
    ],
)
def test_no_text_acts_on_a_terminal(text: str, lines: bool, shown: str) -> None:
    assert escaped(text, lines=lines) == shown


def test_what_is_said_goes_to_the_output_and_failures_to_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    say("one\ntwo\x1b")
    say("three", error=True)
    told = capsys.readouterr()
    assert (told.out, told.err) == ("one\ntwo\\x1b\n", "three\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def _restored() -> Iterator[None]:
    root, names = logging.getLogger(), ("kafka", "aiokafka", "pymilvus")
    before, levels = (list(root.handlers), root.level), [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.NOTSET)
    yield
    root.handlers, root.level = before
    for name, level in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(level)
    structlog.reset_defaults()


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(("level", "shown"), [("debug", 3), ("info", 2), ("error", 0)])
def test_logs_are_json_where_there_is_no_terminal_and_begin_at_their_level(
    level: str, shown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    configure_logging(level)
    log = structlog.get_logger()
    log.debug("a")
    log.info("b", id="\x1b")
    log.warning("c")
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["a", "b", "c"][3 - shown :]
    assert all({"level", "timestamp"} <= line.keys() for line in lines)
    assert logging.getLogger("aiokafka").isEnabledFor(logging.ERROR) is (level == "debug")


@pytest.mark.usefixtures("_restored")
def test_values_in_logs_do_not_act_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    configure_logging()
    structlog.get_logger().info("read", id="x\x1b]0;y")
    assert r"x\x1b]0;y" in out.getvalue()
