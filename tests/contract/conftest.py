"""Real servers that suites of several files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from streams.stack.valkey_part import ValkeyPart
from tests.factories.part_server import part_server


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory, unused_tcp_port_factory: Callable[[], int]) -> Iterator[str]:
    """The URL of a Valkey; every test has a prefix of its own."""
    with part_server(ValkeyPart(tmp_path_factory.mktemp("valkey"), unused_tcp_port_factory())) as server:
        yield f"redis://127.0.0.1:{server.part.port}/0"
