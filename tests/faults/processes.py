"""`mimstream` processes that a round starts, stops, freezes and kills."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from streams.runtime.launch import launch

log = structlog.get_logger()

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
    pid: int
    clock: Path | None = None
    """What its time follows, if that is not the machine's."""
    _status: int | None = None
    _popen: subprocess.Popen[bytes] | None = None

    @property
    def status(self) -> int | None:
        """Exit status; negative if a signal ended it."""
        return self._popen.poll() if self._popen is not None else self._status

    def output(self) -> str:
        """Everything it has said."""
        return self.log.read_text(errors="replace")

    def said(self, event: str) -> list[dict[str, Any]]:
        """Its log lines of one event."""
        found = []
        for line in self.output().splitlines():
            if f'"{event}"' in line:
                try:
                    found.append(json.loads(line))
                except ValueError:
                    continue  # half a line: it is being written
        return found

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.status is None:
            os.kill(self.pid, number)

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


class Hatchery:
    """Starts processes: forked from an interpreter that has imported everything, or, under a false clock, afresh."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._numbers = itertools.count(1)
        self._started: list[Process] = []
        self._waiting: dict[int, int] = {}
        self._statuses: dict[int, int] = {}
        self._line: socket.socket | None = None
        self._egg: subprocess.Popen[bytes] | None = None
        self._hatched = threading.Event()

    def __enter__(self) -> Hatchery:
        path = self._folder / "egg.sock"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen(1)
            listening.settimeout(START_SECONDS)
            with (self._folder / "egg.log").open("wb") as output:
                self._egg = launch(
                    [sys.executable, "-m", "tests.faults.egg", str(path)],
                    log=output,
                    cwd=Path(__file__).parents[2],
                    environment={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                )
            self._line, _ = listening.accept()
        threading.Thread(target=self._listen, daemon=True).start()
        if not self._hatched.wait(START_SECONDS):
            raise Broken(f"the processes' parent did not come up: {(self._folder / 'egg.log').read_text()[-2000:]}")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.send(signal.SIGKILL)
        assert self._line is not None and self._egg is not None
        self._line.close()
        try:
            self._egg.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._egg.kill()
            self._egg.wait()

    def _listen(self) -> None:
        assert self._line is not None
        with self._line.makefile("rb") as lines:
            for line in lines:
                answer = json.loads(line)
                if "ready" in answer:
                    self._hatched.set()
                elif "number" in answer:
                    self._waiting[answer["number"]] = answer["pid"]
                else:
                    self._statuses[answer["pid"]] = answer["status"]
                    for process in self._started:
                        if process.pid == answer["pid"]:
                            process._status = answer["status"]

    async def start(
        self,
        name: str,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        *,
        bug: str | None = None,
        clock: Path | None = None,
    ) -> Process:
        """Start `mimstream ARGUMENTS`. `bug` names one to plant in it; `clock` is the file that its time follows."""
        number = next(self._numbers)
        file = self._folder / f"{number:04d}-{name}.log"
        whole = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        if clock is not None:
            popen = launch(
                [sys.executable, "-m", "streams", *arguments],
                log=file.open("wb"),
                environment=whole | false_clock(clock),
            )
            process = Process(name, arguments, file, popen.pid, clock, _popen=popen)
        else:
            file.touch()
            order = {"number": number, "arguments": arguments, "environment": whole, "log": str(file), "bug": bug}
            assert self._line is not None
            self._line.sendall(json.dumps(order).encode() + b"\n")
            deadline = time.monotonic() + START_SECONDS
            while number not in self._waiting:
                if time.monotonic() > deadline:
                    raise Broken(f"{name} was not started")
                await asyncio.sleep(0.005)
            process = Process(name, arguments, file, self._waiting[number])
            process._status = self._statuses.get(process.pid)
        self._started.append(process)
        return process


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
