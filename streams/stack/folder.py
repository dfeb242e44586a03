"""One stack's folder: its ports, its owner, what runs, and the logs. One owner at a time, by a file lock."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import structlog

from schemas.errors import Misconfigured
from streams.stack.config import DEFAULT_STACK
from streams.stack.parts import HOST, PartName

log = structlog.get_logger()

Phase = Literal["starting", "ready", "stopping", "stopped", "failed"]

LOG_LIMIT_BYTES = 20_000_000
CLAIM_ATTEMPTS = 10
STRAY_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Ports:
    """Where the parts of one stack listen. Kept with the data, so that clients find a restarted stack again."""

    kafka: int
    kafka_controller: int
    valkey: int
    milvus: int


DEFAULT_PORTS = Ports(kafka=19092, kafka_controller=19093, valkey=16379, milvus=19530)
"""Ports of the stack named `default`: the defaults of the settings."""

# Below the range from which the kernel takes ports for outgoing connections: a client that reconnects to a dead part
# of a higher port can connect to itself and so take the port away.
_FREE_PORTS = range(20_000, 30_000)


@dataclass(frozen=True)
class ProcessId:
    """A process, told apart from a later one that was given the same number."""

    pid: int
    started_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The live process of this number, if there is one."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        state, *rest = stat.rpartition(")")[2].split()
        if state in "ZX":
            return None  # dead, merely not collected yet
        return cls(pid, int(rest[18]))

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return ProcessId.of(self.pid) == self


@dataclass(frozen=True)
class PartState:
    """What is known of one part."""

    process: ProcessId | None = None
    restarts: int = 0


@dataclass(frozen=True)
class StackState:
    """What the owner of a stack last wrote about it."""

    phase: Phase
    owner: ProcessId
    parts: dict[str, PartState] = field(default_factory=dict)
    error: str | None = None

    def alive(self) -> bool:
        """Whether the owner still runs; if not, the state is what a killed owner left behind."""
        return self.owner.alive()


class StackFolder:
    """The files of one stack."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.name = self.path.name
        self._lock: IO[str] | None = None

    def claim(self) -> None:
        """Become the owner until `release` or death. Raises `Misconfigured` if another process is."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = (self.path / "owner.lock").open("w")
        if not _lock(handle):
            handle.close()
            state = self.read_state()
            owner = f" (process {state.owner.pid})" if state else ""
            raise Misconfigured(
                f"stack {self.name!r} in {self.path} runs already{owner}: stop it with "
                f"`mimstream stack down --name {self.name}`, or take another name"
            )
        self._lock = handle

    def release(self) -> None:
        """Give the ownership back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def owned(self) -> bool:
        """Whether any process, this one too, owns the folder now."""
        try:
            with (self.path / "owner.lock").open("r") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def ports(self, *, fixed: Ports | None) -> Ports:
        """The ports to use: `fixed`, else those of the last start if they are free, else free ones; then kept.

        Raises `Misconfigured` if a fixed port is taken.
        """
        file = self.path / "ports.json"
        if fixed is not None:
            for name, port in asdict(fixed).items():
                if not _is_free(port):
                    raise Misconfigured(
                        f"port {port} ({name} of stack {self.name!r}) is taken by another program: stop that one, or "
                        "start a stack with ports of its own, `mimstream stack up --name NAME`"
                    )
            ports = fixed
        else:
            ports = Ports(**json.loads(file.read_text())) if file.exists() else _free_ports()
            if not all(_is_free(port) for port in asdict(ports).values()):
                ports = _free_ports()
        _write(file, asdict(ports))
        return ports

    def read_ports(self) -> Ports | None:
        """The ports of the last start, if there was one."""
        file = self.path / "ports.json"
        return Ports(**json.loads(file.read_text())) if file.exists() else None

    def write_state(self, state: StackState) -> None:
        """Replace what is known of the running stack."""
        _write(self.path / "state.json", asdict(state))

    def read_state(self) -> StackState | None:
        """What the last owner wrote, if anything."""
        try:
            values = json.loads((self.path / "state.json").read_text())
        except FileNotFoundError:
            return None
        parts = {
            name: PartState(
                process=ProcessId(**part["process"]) if part["process"] else None, restarts=part["restarts"]
            )
            for name, part in values["parts"].items()
        }
        return StackState(values["phase"], ProcessId(**values["owner"]), parts, values["error"])

    def end_strays(self, clock: Callable[[], float] = time.monotonic) -> None:
        """End what a killed owner may have left running. The caller owns the folder."""
        state = self.read_state()
        if state is None:
            return
        strays = [part.process for part in state.parts.values() if part.process is not None and part.process.alive()]
        for stray in strays:
            log.warning("stack.stray_ended", pid=stray.pid, stack=self.name)
            with suppress(ProcessLookupError):
                os.kill(stray.pid, signal.SIGKILL)
        deadline = clock() + STRAY_PATIENCE_SECONDS
        while any(stray.alive() for stray in strays) and clock() < deadline:
            time.sleep(0.02)

    def data(self, part: PartName) -> Path:
        """Folder of one part's data."""
        return self.path / part

    def log_file(self, part: str) -> Path:
        """Where the output of one part goes; an overlong one is put aside first."""
        folder = self.path / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{part}.log"
        if file.exists() and file.stat().st_size > LOG_LIMIT_BYTES:
            os.replace(file, file.with_suffix(".log.1"))
        return file


def fixed_ports(name: str) -> Ports | None:
    """The stack named `default` listens where the settings look by default; the others on free ports."""
    return DEFAULT_PORTS if name == DEFAULT_STACK else None


def tail(file: Path, *, since_byte: int = 0, lines: int = 15) -> str:
    """The last lines that were written to `file` after `since_byte`."""
    try:
        with file.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(since_byte if since_byte <= size else 0, size - 8_192))
            return "\n".join(handle.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def _lock(handle: IO[str]) -> bool:
    for _ in range(CLAIM_ATTEMPTS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)  # `owned`, asked by another process, holds it for a moment
        else:
            return True
    return False


def _free_ports() -> Ports:
    candidates: Iterable[int] = random.SystemRandom().sample(_FREE_PORTS, len(_FREE_PORTS))
    free = (port for port in candidates if _is_free(port))
    return Ports(kafka=next(free), kafka_controller=next(free), valkey=next(free), milvus=next(free))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # a socket in TIME_WAIT, left by a killed part, does not count; one that still listens does
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _write(file: Path, values: dict[str, Any]) -> None:
    """Replace atomically: a reader sees the old or the new file."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values, indent=2))
    os.replace(temporary, file)
