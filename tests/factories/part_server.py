"""One program of the stack by itself, for tests of what talks to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from streams.runtime.launch import launch
from streams.stack.milvus_part import MilvusPart
from streams.stack.parts import NotReady
from streams.stack.valkey_part import ValkeyPart


class PartServer:
    """A server that a test may kill and start again over the same data."""

    def __init__(self, part: MilvusPart | ValkeyPart) -> None:
        self.part = part
        self._log = part.folder / "log"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.start_only()
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.part.probe(2)
            except NotReady:
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.05)

    def start_only(self) -> None:
        self.part.prepare(self._log)
        with self._log.open("ab") as output:
            self._process = launch(self.part.command(), log=output, cwd=self.part.folder)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def part_server(part: MilvusPart | ValkeyPart) -> Iterator[PartServer]:
    server = PartServer(part)
    server.start()
    try:
        yield server
    finally:
        server.kill()
