"""`mimstream` child processes: they end with this one, and an earlier end is a failure."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from schemas.errors import Unavailable
from streams.runtime.launch import launch

_LOG_TAIL_CHARACTERS = 3_000


class ChildDied(Unavailable):
    """A child process ended by itself."""


class Child:
    """One `mimstream` command; its output goes to a file."""

    def __init__(
        self, arguments: Sequence[str], log_file: Path, environment: Mapping[str, str], *, module: str = "streams"
    ) -> None:
        """Start it. Call from the main thread: the child ends with the thread that starts it."""
        self.role = next(word for word in arguments if not word.startswith("-"))
        self.log_file = log_file
        with log_file.open("ab") as output:
            self._process: subprocess.Popen[bytes] = launch(
                [sys.executable, "-m", module, *arguments], log=output, environment=environment
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def check(self) -> None:
        """Raise `ChildDied` with the end of its log if it has ended."""
        status = self._process.poll()
        if status is not None:
            raise ChildDied(f"`mimstream {self.role}`", f"it ended with status {status}\n{self.tail()}")

    async def ready(self, timeout_seconds: float = 120.0) -> None:
        """Wait until it logs `<role>.ready`. Raises `ChildDied` or `Unavailable` with the end of its log."""
        deadline = time.monotonic() + timeout_seconds
        while f"{self.role}.ready" not in self.log_file.read_text(errors="replace"):
            self.check()
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"`mimstream {self.role}`", f"it was not ready within {timeout_seconds:.0f} s\n{self.tail()}"
                )
            await asyncio.sleep(0.1)

    def tail(self) -> str:
        """The end of its log."""
        text = self.log_file.read_text(errors="replace")
        return f"The end of its log, {self.log_file}:\n{text[-_LOG_TAIL_CHARACTERS:] or '(nothing)'}"

    def stop(self, timeout_seconds: float = 20.0) -> None:
        """Ask it to drain and end; kill it if it does not."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=timeout_seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


async def watch(children: Sequence[Child], every_seconds: float = 0.5) -> None:
    """Run until cancelled; raises `ChildDied` as soon as one of them has ended."""
    while True:
        for child in children:
            child.check()
        await asyncio.sleep(every_seconds)
