"""Real Valkeys in the arrangements of a production: a primary with its replica behind one address, and a cluster."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from streams.stack.valkey_part import ValkeyPart
from tests.factories.part_server import PartServer, part_server
from tests.factories.waiting import wait_until


class Address:
    """An address that leads to one of several servers: new connections to the present one, open ones stay."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client, self.target), daemon=True).start()

    def _carry(self, client: socket.socket, target: int) -> None:
        with suppress(OSError), client, socket.create_connection(("127.0.0.1", target)) as server:
            ways = selectors.DefaultSelector()
            ways.register(client, selectors.EVENT_READ, server)
            ways.register(server, selectors.EVENT_READ, client)
            while True:
                for way, _ in ways.select():
                    source, sink = way.fileobj, way.data
                    assert isinstance(source, socket.socket)
                    if not (data := source.recv(65_536)):
                        return
                    sink.sendall(data)


class RedisPair:
    """A primary and a replica behind one address."""

    def __init__(self, primary: PartServer, replica: PartServer) -> None:
        self.primary, self.replica = primary, replica
        self.address = Address(primary.part.port)
        for server in (primary, replica):
            self.ask(server, "CONFIG", "SET", "repl-diskless-sync-delay", 0)
        self._follow()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.address.port}/0"

    def ask(self, server: PartServer, *words: Any) -> Any:
        """The answer of one of the two to a command."""
        with redis.Redis(port=server.part.port) as client:
            return client.execute_command(*words)

    def switch(self) -> None:
        """Exchange the roles as an operator does: the replica is promoted, then the primary is demoted to follow it.

        What the former primary took in between, or had not sent yet, is lost.
        """
        self.ask(self.replica, "REPLICAOF", "NO", "ONE")
        self.address.target = self.replica.part.port
        self.primary, self.replica = self.replica, self.primary
        self._follow()

    def _follow(self) -> None:
        self.ask(self.replica, "REPLICAOF", "127.0.0.1", self.primary.part.port)
        wait_until(lambda: self.ask(self.replica, "ROLE")[3] == b"connected", "the replica")


@contextmanager
def redis_pair(folder: Path, free_port: Callable[[], int]) -> Iterator[RedisPair]:
    with (
        part_server(ValkeyPart(folder / "one", free_port())) as one,
        part_server(ValkeyPart(folder / "two", free_port())) as two,
    ):
        pair = RedisPair(one, two)
        try:
            yield pair
        finally:
            pair.address.close()


@dataclass
class _ClusterPart(ValkeyPart):
    def command(self) -> list[str]:
        return [*super().command(), "--cluster-enabled", "yes"]


@contextmanager
def redis_cluster(folder: Path, free_port: Callable[[], int]) -> Iterator[str]:
    """The URL of a Redis Cluster of one node, which owns all slots."""
    port = free_port() % 50_000 + 1_024  # the cluster's own port lies 10,000 above
    with part_server(_ClusterPart(folder, port)) as server, redis.Redis(port=server.part.port) as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
        wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "the cluster")
        yield f"redis://127.0.0.1:{port}/0"
