"""The index app in this process, on real parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from encoders.hashing import HashingEncoder
from schemas.errors import ContentUnavailable
from streams.dead_letters.producer import InMemoryDeadLetters
from streams.indexing.announcements import InMemoryOutbox
from streams.indexing.app import create_index_app, run_app
from streams.indexing.config import IndexConfig
from streams.indexing.context import IndexContext
from streams.indexing.encoding import ItemEncoding
from streams.indexing.flow import Flow
from streams.runtime.delivery import Patience
from streams.settings import Settings
from streams.stores.vectors.item_index import InMemoryItemIndex, ItemIndex


class Worker:
    """An index worker whose application can be made to crash."""

    def __init__(
        self, settings: Settings, folder: Path, name: str = "0", index: ItemIndex | None = None, **config: Any
    ) -> None:
        self.apps: list[Any] = []
        self.ready = 0
        encoder = HashingEncoder(16)
        self.index = InMemoryItemIndex(encoder_version=encoder.version, dim=16)
        self.context = IndexContext(
            index=index or self.index,
            outbox=InMemoryOutbox(),
            dead_letters=InMemoryDeadLetters(),
            encoding=ItemEncoding(encoder, prepare_threads=1),
            fetch=self._fetch,
            config=IndexConfig(commit_interval_seconds=0.2, **config),
            max_record_bytes=settings.kafka.max_record_bytes,
            patience=Patience(),
            now=lambda: datetime.now(UTC),
        )
        self.flow = Flow(check_role=self._held)
        self.stop = asyncio.Event()

        def make() -> Any:
            app = create_index_app(
                self.context,
                self.flow,
                broker=settings.kafka,
                topics=settings.topics,
                instance_id=f"index-{name}",
                folder=folder,
                on_report=lambda report: None,
                on_ready=self._on_ready,
            )
            self.apps.append(app)
            return app

        self.running = asyncio.create_task(run_app(make, self.flow, self.stop, drain_seconds=5, patience=Patience()))

    @asynccontextmanager
    async def _fetch(self, url: str, *, timeout_seconds: float | None = None) -> AsyncIterator[bytes]:
        raise ContentUnavailable(url, "no pictures here")
        yield b""

    async def _held(self) -> None:
        pass

    def _on_ready(self) -> None:
        self.ready += 1

    @property
    def titles(self) -> dict[str, str]:
        return {item_id: row.title for item_id, row in self.index.rows.items()}
