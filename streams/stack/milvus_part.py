"""Milvus Lite: the vector store, in a process of its own."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from streams.stack.parts import HOST, NotReady, PartName, probe_port

log = structlog.get_logger()

_SHOW_COLLECTIONS = "/milvus.proto.milvus.MilvusService/ShowCollections"


@dataclass
class MilvusPart:
    """The vector store of a stack; its data lies in `folder`."""

    folder: Path
    port: int
    name: PartName = "milvus"
    stop_signal: signal.Signals = signal.SIGINT  # SIGTERM is abrupt
    stop_patience_seconds: float = 15.0

    def prepare(self, log_file: Path) -> None:
        """After an unclean stop drop the saved indexes: a half-written one keeps its collection from loading.

        The rows are in other files; Milvus Lite builds a missing index again when it loads the collection.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._clean.exists():
            self._clean.unlink()
            return
        dropped = [path for pattern in ("*.idx", "*.sidx") for path in self._data.rglob(f"indexes/{pattern}")]
        for path in dropped:
            path.unlink()
        if dropped:
            log.info("stack.indexes_dropped", count=len(dropped), folder=str(self._data))

    def command(self) -> list[str]:
        """One worker: with more than one write in flight a kill loses acknowledged rows."""
        return [
            sys.executable,
            "-m",
            "milvus_lite",
            "server",
            "--data-dir",
            str(self._data),
            "--host",
            HOST,  # its own default is all interfaces
            "--port",
            str(self.port),
            "--max-workers",
            "1",
        ]

    def probe(self, timeout_seconds: float) -> None:
        """List the collections. Without pymilvus, which would treble the memory of a small supervisor."""
        probe_port(self.port, timeout_seconds)
        with grpc.insecure_channel(f"{HOST}:{self.port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            ask = channel.unary_unary(_SHOW_COLLECTIONS)  # an empty message is the default request
            try:
                ask(b"", timeout=timeout_seconds)
            except grpc.RpcError as error:
                raise NotReady(f"Milvus Lite at {HOST}:{self.port}: {error}") from error

    def stopped(self, status: int) -> None:
        """Remember a clean stop, so that the indexes are kept."""
        if status == 0:
            self._clean.touch()

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _clean(self) -> Path:
        return self.folder / "stopped-cleanly"
