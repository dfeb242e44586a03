"""A small data set as a timeline, and a sender that keeps what it is given."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicsConfig
from streams.replay.config import ReplayConfig
from streams.replay.sender import Replay, Sent
from streams.replay.timeline import Outgoing, Timeline
from tests.factories.offline_folders import START, write
from trainer.datasets.exposures import behaviours_of
from trainer.datasets.folder import DataSet, open_data_set

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def make_set(folder: Path, items: int = 30, rows: int = 120, **more_columns: Any) -> DataSet:
    rng = np.random.default_rng(0)
    publish = np.sort(rng.integers(0, 60, items)) + START
    item = rng.integers(0, items, rows)
    ts = np.maximum(np.sort(rng.integers(0, 90, rows)) + START, publish[item])
    names = [f"i{number}" for number in range(items)]
    write(folder, "items", item_id=names, title=names, publish_ts=publish, price=[1.5] * items)
    columns = {"user_id": rng.integers(0, 9, rows), "item_id": [names[i] for i in item], "ts": ts, "label": [1] * rows}
    write(folder, "interactions", **columns | more_columns)
    write(folder, "images", item_id=names[:5], image=[b"\xff\xd8picture"] * 5)
    return open_data_set(folder)


def timeline_of(data: DataSet, broken: float = 0.0) -> Timeline:
    return Timeline(data, behaviours_of(data, seed=1), seed=1, now=NOW, broken_share=broken)


class Metadata(NamedTuple):
    partition: int
    offset: int


@dataclass
class RecordingSender:
    """Keeps what it is given, and acknowledges when flushed or after `lag` further records."""

    lag: int = 3
    records: list[tuple[str, bytes, bytes]] = field(default_factory=list)
    flushes: int = 0
    _waiting: list[tuple[asyncio.Future[Any], Metadata]] = field(default_factory=list)

    async def send(self, topic: str, value: bytes | None = None, key: bytes | None = None) -> asyncio.Future[Any]:
        assert value is not None and key is not None
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, Metadata(0, sum(one[0] == topic for one in self.records))))
        self.records.append((topic, key, value))
        while len(self._waiting) > self.lag:
            self._acknowledge_one()
        return future

    async def flush(self) -> None:
        self.flushes += 1
        while self._waiting:
            self._acknowledge_one()

    def _acknowledge_one(self) -> None:
        future, metadata = self._waiting.pop(0)
        future.set_result(metadata)


class BoundedReplay(Replay):
    """Fails where it would never end."""

    async def run(self, timeline: Iterable[Outgoing]) -> Sent:
        return await asyncio.wait_for(super().run(timeline), 5)


def replay_to(sender: RecordingSender, config: ReplayConfig | None = None, **options: Any) -> Replay:
    return BoundedReplay(sender, BrokerConfig(), TopicsConfig(), config or ReplayConfig(), **options)
