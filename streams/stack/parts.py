"""A part of the stack: how to prepare its data, start it, probe it and stop it."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Literal, Protocol

PartName = Literal["kafka", "valkey", "milvus"]

HOST = "127.0.0.1"
"""All parts listen here and nowhere else: they have no passwords."""


class NotReady(Exception):
    """The part is not ready; the message says what it answered."""


class Part(Protocol):
    """One program of the stack."""

    name: PartName
    port: int
    stop_signal: signal.Signals
    """What makes it stop cleanly."""
    stop_patience_seconds: float
    """How long a clean stop may take before it is killed."""

    def prepare(self, log_file: Path) -> None:
        """Put the data into a state that the program starts from; called before each start, also after a crash."""

    def command(self) -> list[str]:
        """The program and its arguments; the first word is an absolute path."""

    def probe(self, timeout_seconds: float) -> None:
        """Use the service as a client would. Raises `NotReady`."""

    def stopped(self, status: int) -> None:
        """Take note of how the program ended after it was asked to; `status` is negative if a signal ended it."""


def probe_port(port: int, timeout_seconds: float) -> None:
    """Cheap first question: does anything listen? Raises `NotReady`."""
    try:
        with socket.create_connection((HOST, port), timeout=timeout_seconds):
            return
    except OSError as error:
        raise NotReady(f"nothing answers at {HOST}:{port} ({error})") from None
