"""Replaying into a real broker."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from aiokafka import TopicPartition

from streams.broker.clients import make_consumer
from streams.broker.lag import GroupPositions
from streams.settings import Settings
from tests.factories.topics import read_all


def write_set(folder: Path, items: int = 40, rows: int = 300) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    publish = 1_700_000_000 + np.sort(rng.integers(0, 600, items))
    item = rng.integers(0, items, rows)
    ts = np.maximum(1_700_000_000 + np.sort(rng.integers(0, 900, rows)), publish[item])
    pq.write_table(
        pa.table({"item_id": np.arange(items), "title": [f"item {i}" for i in range(items)], "publish_ts": publish}),
        folder / "items.parquet",
    )
    pq.write_table(
        pa.table({"user_id": rng.integers(0, 30, rows), "item_id": item, "ts": ts, "label": [1] * rows}),
        folder / "interactions.parquet",
    )
    return folder


async def test_a_replay_fills_both_topics_in_order_and_stamps_records_with_the_time_of_sending(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    before = time.time()
    child = process("replay", str(write_set(tmp_path / "set")), "--seed", "3", "--broken", "0.01", "--json", cold=True)
    assert child.wait() == 0, child.output()
    items, events = await read_all(settings, "items"), await read_all(settings, "behaviours")
    summary = json.loads(child.output().splitlines()[-1])
    assert summary["items_published"] == len(items) == 40 + 8
    assert summary["behaviours_sent"] == len(events) > 300 * 5
    assert summary["broken"] > 8
    assert all(before - 1 < record.timestamp / 1000 < time.time() + 1 for record in events)
    for _, records in groupby(events, key=attrgetter("partition")):
        times = [json.loads(r.value)["occurred_at"] for r in records if not r.key.startswith(b"broken-")]
        assert times == sorted(times)


async def test_import_publishes_the_items_alone(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    folder = write_set(tmp_path / "set")
    (folder / "interactions.parquet").unlink()
    child = process("import", str(folder), cold=True)
    assert child.wait() == 0, child.output()
    assert (len(await read_all(settings, "items")), await read_all(settings, "behaviours")) == (40, [])


async def test_a_replay_that_follows_a_group_waits_for_its_commits(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    folder = write_set(tmp_path / "set")
    child = process("replay", str(folder), "--follow", "index", "--json", env={"MIM_REPLAY__MAX_ITEMS_IN_FLIGHT": "10"})
    topic = settings.topics.full_name("items")
    partitions = [TopicPartition(topic, p) for p in range(settings.topics.partitions)]
    async with make_consumer(settings.kafka, group_id=settings.topics.group("index")) as reader:
        reader.assign(partitions)
        sizes = []
        async with GroupPositions(settings.kafka, settings.topics, {"items": ["index"]}) as positions:
            opened = sum((await reader.end_offsets(partitions)).values())
            committed = 0
            deadline = time.monotonic() + 60
            while committed < 40:
                assert time.monotonic() < deadline, child.output()
                ends = await reader.end_offsets(partitions)
                sizes.append(sum(ends.values()) - committed)
                if sizes[-1] == 10 or sum(ends.values()) == 40:  # nothing more comes by itself
                    await reader.commit(ends)
                    committed = sum(ends.values())
                await asyncio.sleep(0.05)
            consumed = (await positions.consumed())["items"]["index"]
    assert child.wait() == 0, child.output()
    assert max(sizes) == 10
    assert consumed == 40 - opened
