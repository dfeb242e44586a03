"""Real servers that suites of several files share."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from streams.runtime.launch import launch
from streams.stack.parts import NotReady
from streams.stack.valkey_part import ValkeyPart


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Valkey; every test has a prefix of its own."""
    folder = tmp_path_factory.mktemp("valkey")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    part = ValkeyPart(folder / "data", port)
    part.prepare(folder / "log")
    with (folder / "log").open("ab") as output:
        server = launch(part.command(), log=output, cwd=folder / "data")
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                part.probe(1.0)
                break
            except NotReady:
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
        yield f"redis://127.0.0.1:{part.port}/0"
    finally:
        server.kill()
        server.wait()
