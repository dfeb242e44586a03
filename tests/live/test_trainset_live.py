"""`mimstream trainset show` over real Kafka: whatever the portions, after an update, a delete and an erasure."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from kafka import TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType

from schemas.items import embedding_key
from streams.broker import make_admin, make_producer
from streams.commands.forget_command import forget_user
from streams.log_reading import LogReader
from streams.settings import Settings, environment_of
from streams.stores.models import FolderModelStore
from tests.live.click_world import ENCODER, SMALL, World, produce

pytestmark = pytest.mark.timeout(280)


def mimstream(values: dict[str, Any], *arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "streams", *arguments],
        env={**os.environ, **environment_of(values), **SMALL, "MIM_MODELS__KEEP_RELEASES": "50", **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.returncode, done.stdout


async def test_a_release_is_rebuilt_after_compaction_update_delete_and_erasure(
    settings: Settings, settings_values: dict[str, Any], tmp_path: Path
) -> None:
    world = World()
    await produce(settings, world=world, behaviours=world.behaviours(1500))
    mimstream(settings_values, "train", "--until-end", "--state", str(tmp_path / "state"))
    manifest = FolderModelStore(settings.models).list()[1]
    release = manifest.release_id

    status, printed = mimstream(settings_values, "trainset", "show", release, "--json")
    before = json.loads(printed)
    assert status == 0 and before["verified"] and before["rows"] == before["rebuilt"] == 512
    assert before["rows_tree_sha256"] == manifest.rows_tree_sha256
    assert any(row["negatives"] for row in before["training_rows"])

    await forget_compacted(settings, world)
    status, printed = mimstream(settings_values, "trainset", "show", release, "--json", "--fetch-max-records", "3")
    assert status == 0 and json.loads(printed) == before

    user = before["training_rows"][0]["user_id"]
    await forget_user(settings, user)
    out = tmp_path / "rows.parquet"
    status, printed = mimstream(settings_values, "trainset", "show", release, "--json", "--out", str(out))
    after, rows = json.loads(printed), pq.read_table(out).to_pylist()
    gone = [row for row in before["training_rows"] if row["user_id"] == user]
    assert status == 0 and after["verified"] and after["erased"] == len(gone) > 0
    assert [row["event_id"] for row in rows] == [
        row["event_id"] for row in before["training_rows"] if row["user_id"] != user
    ]
    assert user not in printed and user not in {row["user_id"] for row in rows}

    admin = make_admin(settings.kafka)
    try:
        topic = settings.topics.full_name("behaviours")
        admin.delete_records({TopicPartition(topic, number): 40 for number in range(settings.topics.partitions)})
    finally:
        admin.close()
    status, printed = mimstream(settings_values, "trainset", "show", release)
    assert status == 1 and "NOT verified" in printed


async def forget_compacted(settings: Settings, world: World) -> None:
    """Give an item another vector, delete one, and make Kafka forget what there was before."""
    topic = settings.topics.full_name("embeddings")
    admin = make_admin(settings.kafka)
    try:
        resource = ConfigResource(
            ConfigResourceType.TOPIC,
            topic,
            {"segment.ms": "100", "min.cleanable.dirty.ratio": "0.01", "max.compaction.lag.ms": "100"},
        )
        admin.alter_configs([resource])
    finally:
        admin.close()
    world.items["item1"] = -world.items["item1"]
    produced = len(world.items)
    async with make_producer(settings.kafka) as producer:
        for _ in range(3):
            for item in world.items:
                value = None if item == "item2" else world.embedding(item).model_dump_json().encode()
                await producer.send_and_wait(topic, value, key=embedding_key(ENCODER, item))
                produced += 1

    async def held() -> int:
        async with LogReader(settings.kafka, settings.topics) as reader:
            spans = await reader.bounds(await reader.partitions("embeddings"))
            return sum([1 async for one in _records(reader, spans)])

    async with asyncio.timeout(90):
        while await held() > produced - len(world.items):
            await asyncio.sleep(0.5)


async def _records(reader: LogReader, spans: Mapping[Any, tuple[int, int]]) -> AsyncIterator[Any]:
    for partition, (first, end) in spans.items():
        async for record in reader.read(partition, first, end):
            yield record
