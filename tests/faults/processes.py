"""`mimstream` processes that a round starts, stops, freezes and kills."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streams.runtime.launch import launch
from tests.factories.fork_server import Forked, ForkServer

START_SECONDS = 400.0
END_SECONDS = 180.0


class Broken(Exception):
    """A process did not do what every round needs of it (start, say something, end); the message says which."""


@dataclass
class Process:
    """One `mimstream` command. `status` is None while it runs."""

    name: str
    arguments: tuple[str, ...]
    log: Path
    handle: subprocess.Popen[bytes] | Forked
    clock: Path | None = None
    """What its time follows, if that is not the machine's."""

    @property
    def pid(self) -> int:
        return self.handle.pid

    @property
    def status(self) -> int | None:
        """Exit status; negative if a signal ended it."""
        return self.handle.poll()

    def output(self) -> str:
        """Everything it has said."""
        return self.log.read_text(errors="replace")

    def said(self, event: str) -> list[dict[str, Any]]:
        """Its log lines of one event."""
        found = []
        for line in self.output().splitlines():
            if f'"{event}"' in line:
                with suppress(ValueError):  # half a line: it is being written
                    found.append(json.loads(line))
        return found

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        self.handle.send_signal(number)

    async def kill(self) -> None:
        """Kill -9, and wait until it is dead."""
        self.send(signal.SIGKILL)
        await self.ended()

    async def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.send(signal.SIGTERM)
        return await self.ended()

    async def ended(self, within_seconds: float = END_SECONDS) -> int:
        """Wait until it ends; its exit status."""
        deadline = time.monotonic() + within_seconds
        while (status := self.status) is None:
            if time.monotonic() > deadline:
                raise Broken(f"{self.name} did not end within {within_seconds:.0f} s:\n{self.output()[-3000:]}")
            await asyncio.sleep(0.02)
        return status

    async def says(self, event: str, within_seconds: float = START_SECONDS) -> None:
        """Wait until it has logged `event`."""
        deadline = time.monotonic() + within_seconds
        while not self.said(event):
            if self.status is not None and not self.said(event):
                raise Broken(f"{self.name} ended with {self.status} before {event!r}:\n{self.output()[-3000:]}")
            if time.monotonic() > deadline:
                raise Broken(f"{self.name} did not say {event!r}:\n{self.output()[-3000:]}")
            await asyncio.sleep(0.05)


class Starter:
    """Starts processes: forked from an interpreter that has imported everything, or, under a false clock, afresh."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._numbers = itertools.count(1)
        self._started: list[Process] = []
        self._server = ForkServer()

    def __enter__(self) -> Starter:
        self._server.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.send(signal.SIGKILL)
        self._server.__exit__()

    def start(
        self,
        name: str,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        *,
        bug: str | None = None,
        clock: Path | None = None,
    ) -> Process:
        """Start `mimstream ARGUMENTS`. `bug` names one to plant in it; `clock` is the file that its time follows."""
        file = self._folder / f"{next(self._numbers):04d}-{name}.log"
        file.touch()
        whole = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        handle: subprocess.Popen[bytes] | Forked
        if clock is not None:
            command = [sys.executable, "-m", "streams", *arguments]
            handle = launch(command, log=file.open("wb"), environment=whole | false_clock(clock))
        else:
            handle = self._server.start(arguments, whole, file, bug=bug)
        self._started.append(Process(name, arguments, file, handle, clock))
        return self._started[-1]


def false_clock(file: Path) -> dict[str, str]:
    """Environment under which a new process sees the real time plus what `file` says (`+3600`), read every second."""
    import libfaketime

    library = Path(libfaketime.__file__).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
