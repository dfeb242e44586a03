"""Child processes: awaited until they are ready, missed when they end, and ended with their parent's work."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from schemas.errors import Unavailable
from streams.runtime.child import Child, ChildDied, watch

READY = "import time; print('index.ready', flush=True); time.sleep(60)"
SILENT = "import time; print('starting', flush=True); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); " + READY
DIES = "import sys; print('no space'); sys.exit(7)"
Start = Callable[[str], Child]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a program as if it was `mimstream index`."""
    started: list[Child] = []

    def one(program: str) -> Child:
        (tmp_path / "program.py").write_text(program)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        arguments = ["--log-level=debug", "index", "--slot", "0"]
        started.append(Child(arguments, tmp_path / "log", environment, module="program"))
        return started[-1]

    yield one
    for child in started:
        child.stop(0.1)


async def test_a_child_is_waited_for_until_it_says_that_it_is_ready(start: Start) -> None:
    child = start(READY)
    await child.ready(timeout_seconds=10)
    child.check()
    assert child.role == "index" and "index.ready" in child.tail()
    child.stop()
    with pytest.raises(ChildDied, match=r"`mimstream index` .*ended with status -15"):
        child.check()
    child.stop()


async def test_a_child_that_ends_first_is_told_with_its_status_and_the_end_of_its_log(start: Start) -> None:
    child = start(DIES)
    with pytest.raises(ChildDied, match=r"status 7\n.*The end of its log, .*/log:\nno space"):
        await child.ready(timeout_seconds=10)
    with pytest.raises(ChildDied):
        await asyncio.wait_for(watch([child], every_seconds=0.01), 5)


async def test_a_child_that_never_gets_ready_is_told_after_its_time(start: Start) -> None:
    child = start(SILENT)
    with pytest.raises(Unavailable, match="it was not ready within 0 s") as caught:
        await child.ready(timeout_seconds=0.3)
    assert not isinstance(caught.value, ChildDied)


async def test_a_child_that_does_not_end_when_asked_is_killed(start: Start) -> None:
    child = start(STUBBORN)
    await child.ready(timeout_seconds=10)
    child.stop(timeout_seconds=0.2)
    with pytest.raises(ChildDied, match="status -9"):
        child.check()


async def test_one_of_several_children_that_ends_is_noticed(start: Start) -> None:
    children = [start(READY), start(READY)]
    watching = asyncio.create_task(watch(children, every_seconds=0.01))
    await asyncio.sleep(0.05)
    assert not watching.done()
    children[1].stop()
    with pytest.raises(ChildDied):
        await asyncio.wait_for(watching, 5)


def test_a_log_is_written_on_and_its_end_is_shown(start: Start, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a" * 4_000 + "\n")
    child = start(DIES)
    child._process.wait()
    shown = child.tail().partition("\n")[2]
    assert len(shown) == 3_000 and shown.startswith("a") and shown.endswith("no space\n")
    (tmp_path / "log").write_text("")
    assert child.tail().endswith("(nothing)")
