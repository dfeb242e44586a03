"""The keeper restarts what dies, ever more slowly, and stops all."""

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from schemas.errors import Unavailable
from streams.stack.folder import PartState, Ports, ProcessId, StackFolder, StackState
from streams.stack.parts import NotReady, PartName
from streams.stack.run import RunningStack
from tests.factories.waiting import wait_until

PROGRAM = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
if (here / "broken").exists():
    sys.exit("this part is broken")
def stop(number, frame):
    (here / "stopped").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(here / "ready").touch()
time.sleep(60)
"""


class ManualClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class SmallPart:
    """A real child process with next to nothing to do."""

    folder: Path
    port: int = 1
    name: PartName = "valkey"
    stop_signal: signal.Signals = signal.SIGTERM
    stop_patience_seconds: float = 5.0
    ended_with: int | None = None

    def prepare(self, log_file: Path) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "ready").unlink(missing_ok=True)

    def command(self) -> list[str]:
        return [sys.executable, "-c", PROGRAM, str(self.folder)]

    def probe(self, timeout_seconds: float) -> None:
        if not (self.folder / "ready").exists():
            raise NotReady("not yet")

    def stopped(self, status: int) -> None:
        self.ended_with = status


@pytest.fixture
def part(tmp_path: Path) -> SmallPart:
    return SmallPart(tmp_path / "valkey")


def make_stack(tmp_path: Path, part: SmallPart, clock: Callable[[], float] = time.monotonic) -> RunningStack:
    return RunningStack(StackFolder(tmp_path), Ports(1, 2, 3, 4), [part], start_timeout_seconds=10, clock=clock)


def state_of(stack: RunningStack) -> StackState:
    state = stack.folder.read_state()
    assert state is not None
    return state


def test_a_part_that_keeps_dying_is_restarted_ever_more_slowly(tmp_path: Path, part: SmallPart) -> None:
    clock = ManualClock()
    stack = make_stack(tmp_path, part, clock)
    stack.open()
    try:
        clock.now += 60
        (part.folder / "broken").touch()
        stack.kill("valkey")  # ran steadily: again at once, dies, once more at once
        for restarts, waits in enumerate((0.0, 0.5, 1.0, 2.0), start=2):
            if waits:
                clock.now += waits - 0.1
                time.sleep(0.5)  # several looks of the keeper
                assert stack.restarts("valkey") == restarts - 1
                clock.now += 0.1
            dead = PartState(None, restarts)
            wait_until(lambda dead=dead: state_of(stack).parts["valkey"] == dead)  # type: ignore[misc]
        (part.folder / "broken").unlink()
        clock.now += 30
        stack.wait_ready("valkey")
    finally:
        stack.close()


def test_close_stops_cleanly_and_writes_it_down(tmp_path: Path, part: SmallPart) -> None:
    stack = make_stack(tmp_path, part)
    stack.open()
    pid = stack.pid("valkey")
    state = state_of(stack)
    assert state.phase == "ready" and state.parts["valkey"].process == ProcessId.of(pid)
    stack.close()
    assert part.ended_with == 0 and (part.folder / "stopped").exists()
    state = state_of(stack)
    assert state.phase == "stopped" and state.parts["valkey"].process is None
    with pytest.raises(Unavailable, match="was stopped"):
        stack.start("valkey")
    stack.close()  # twice does no harm


def test_a_part_that_dies_at_its_first_start_fails_the_start(tmp_path: Path, part: SmallPart) -> None:
    part.folder.mkdir()
    (part.folder / "broken").touch()
    stack = make_stack(tmp_path, part)
    try:
        with pytest.raises(Unavailable, match=r"its process ended[\s\S]*valkey\.log[\s\S]*this part is broken"):
            stack.open()
    finally:
        stack.close(error="x")
    assert (state_of(stack).phase, state_of(stack).error) == ("failed", "x")


def test_a_part_that_ignores_its_stop_signal_is_killed(tmp_path: Path, part: SmallPart) -> None:
    part.stop_signal, part.stop_patience_seconds = signal.SIGURG, 0.2  # the default action of SIGURG is nothing
    stack = make_stack(tmp_path, part)
    stack.open()
    stack.close()
    assert part.ended_with == -signal.SIGKILL
