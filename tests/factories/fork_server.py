"""Start `mimstream` processes by forking an interpreter that has imported everything, a few milliseconds each.

To its broker, its stores and the kernel such a process is like any other: it has its own environment, output, session
and memory, and is killed like one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from multiprocessing.connection import wait
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
PRELOADED = "tests.factories.fork_child"


class Forked:
    """A forked process, with the methods of `subprocess.Popen` that tests use."""

    _lock = threading.Lock()  # whoever reads an exit status takes it out of a pipe

    def __init__(
        self,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        output: Path,
        errors: Path | None,
        bug: str | None,
    ) -> None:
        self.args = arguments
        target = multiprocessing.get_context("forkserver").Process
        self._process = target(target=_run, args=(arguments, dict(environment), output, errors, bug))
        with self._lock:
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Exit status; negative if a signal ended it, None while it runs."""
        with self._lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Exit status, once it has ended. Raises `subprocess.TimeoutExpired`."""
        wait([self._process.sentinel], timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill -9."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The interpreter that forks; there is one per process. What it started and still runs dies when the block ends."""

    def __init__(self) -> None:
        self._started: list[Forked] = []

    def __enter__(self) -> ForkServer:
        multiprocessing.get_context("forkserver").set_forkserver_preload([PRELOADED])
        own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
        with patch.dict(os.environ, own):  # read when torch is imported
            ensure_running()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.kill()
            process.wait()

    def start(
        self,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        output: Path,
        *,
        errors: Path | None = None,
        bug: str | None = None,
    ) -> Forked:
        """Start `mimstream ARGUMENTS`. Standard error goes to `output` too, or to `errors`; `bug` is planted in it."""
        self._started.append(Forked(arguments, dict(environment), output, errors, bug))
        return self._started[-1]

    def run(
        self, arguments: tuple[str, ...], environment: Mapping[str, str], timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """`mimstream ARGUMENTS` to its end, as `subprocess.run` does it."""
        with tempfile.TemporaryDirectory() as folder:
            output, errors = Path(folder) / "output", Path(folder) / "errors"
            status = self.start(arguments, environment, output, errors=errors).wait(timeout)
            return subprocess.CompletedProcess(arguments, status, output.read_text(), errors.read_text())


def _run(*order: Any) -> None:
    from tests.factories import fork_child  # in the server and its children alone: it imports nearly everything

    fork_child.run(*order)
