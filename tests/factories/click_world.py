"""Clicks of users with a taste on items with vectors, over real Kafka, and what a trainer says of them."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import time
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from aiokafka import TopicPartition

from schemas.behaviours import Behaviour, BehaviourKind
from schemas.items import ItemEmbedding, SourceOffset, embedding_key
from schemas.manifests import ReleaseNotice
from streams.broker.clients import make_admin, make_consumer, make_producer
from streams.settings import Settings

Run = Callable[..., subprocess.CompletedProcess[str]]

DIM = 16
ENCODER = "test-encoder.1"
START = datetime(2025, 3, 1, tzinfo=UTC)
SMALL = {
    "OMP_NUM_THREADS": "1",
    "MIM_TRAINER__BATCH_ROWS": "64",
    "MIM_TRAINER__RELEASE_EVERY_ROWS": "500",
    "MIM_TRAINER__SPACE_NEGATIVES": "32",
    "MIM_TRAINER__TIME_NEGATIVES": "32",
    "MIM_TRAIN__IDLE_SECONDS": "1",
    "MIM_TRAIN__COMMIT_INTERVAL_SECONDS": "0.5",
}


class World:
    """Items with unit vectors, users with a taste: what is close to a user's taste is clicked more often."""

    def __init__(self, *, items: int = 60, users: int = 40, seed: int = 1) -> None:
        numbers = np.random.default_rng(seed)
        self.rng = random.Random(seed)
        vectors = numbers.normal(size=(items, DIM))
        self.items = {f"item{i}": v / np.linalg.norm(v) for i, v in enumerate(vectors)}
        tastes = numbers.normal(size=(users, DIM))
        self.users = {f"user{i}": v / np.linalg.norm(v) for i, v in enumerate(tastes)}
        self.second = 0
        self.number = 0

    def behaviours(self, exposures: int) -> list[Behaviour]:
        """Exposures a second apart, each followed by its click where there is one."""
        events = []
        for _ in range(exposures):
            user, item = self.rng.choice(list(self.users)), self.rng.choice(list(self.items))
            self.second += 1
            self.number += 1
            exposure = Behaviour(
                event_id=f"x{self.number}",
                kind=BehaviourKind.EXPOSURE,
                user_id=user,
                item_id=item,
                occurred_at=START + timedelta(seconds=self.second),
            )
            events.append(exposure)
            if self.rng.random() < 1 / (1 + np.exp(-8 * float(self.users[user] @ self.items[item]))):
                took: dict[str, object] = {
                    "event_id": f"c{self.number}",
                    "kind": BehaviourKind.CLICK,
                    "exposure_id": exposure.event_id,
                }
                took["occurred_at"] = exposure.occurred_at + timedelta(seconds=2)
                events.append(exposure.model_copy(update=took))
        return events

    def embedding(self, item_id: str, *, encoder: str = ENCODER) -> ItemEmbedding:
        return ItemEmbedding(
            item_id=item_id,
            encoder_version=encoder,
            vector=b64encode(self.items[item_id].astype("<f4").tobytes()),
            dim=DIM,
            content_hash=f"hash-{item_id}",
            published_at=START,
            source=SourceOffset(partition=0, offset=0),
        )


async def produce(
    settings: Settings,
    *,
    world: World | None = None,
    vectors_of: list[str] | None = None,
    behaviours: list[Behaviour] | None = None,
    raw: list[tuple[bytes | None, bytes]] | None = None,
    encoder: str = ENCODER,
) -> None:
    topics = settings.topics
    async with make_producer(settings.kafka) as producer:
        sends = []
        if world is not None:
            for item_id in world.items if vectors_of is None else vectors_of:
                value = world.embedding(item_id, encoder=encoder).model_dump_json().encode()
                sends.append(
                    await producer.send(topics.full_name("embeddings"), value, key=embedding_key(encoder, item_id))
                )
        for event in behaviours or []:
            value = event.model_dump_json().encode()
            sends.append(await producer.send(topics.full_name("behaviours"), value, key=event.user_id.encode()))
        for key, value in raw or []:
            sends.append(await producer.send(topics.full_name("behaviours"), value, key=key))
        await asyncio.gather(*sends)


def train_to_the_end(run_command: Run, *arguments: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    done = run_command("train", "--until-end", "--no-release", "--json", *arguments, env=SMALL | (env or {}))
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def wait_until(condition: Callable[[], Any], what: str, timeout_seconds: float = 100.0) -> Any:
    deadline = time.monotonic() + timeout_seconds
    while True:
        if found := condition():
            return found
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.1)


def accounts(state: Path) -> dict[str, Any]:
    path = state / "accounts.json"
    return json.loads(path.read_text()) if path.exists() else {"accounts": {"received": 0, "trained": 0}, "steps": 0}


async def read_notices(settings: Settings) -> list[ReleaseNotice]:
    partition = TopicPartition(settings.topics.full_name("models"), 0)
    consumer = make_consumer(settings.kafka)
    await consumer.start()
    try:
        consumer.assign([partition])
        consumer.seek(partition, 0)
        found: list[ReleaseNotice] = []
        end = (await consumer.end_offsets([partition]))[partition]
        while await consumer.position(partition) < end:
            for record in (await consumer.getmany(timeout_ms=200)).get(partition, []):
                found.append(ReleaseNotice.model_validate_json(record.value))
        return found
    finally:
        await consumer.stop()


def group_offsets(settings: Settings) -> dict[tuple[str, int], int]:
    admin = make_admin(settings.kafka)
    try:
        found = admin.list_group_offsets(settings.topics.group("train"))[settings.topics.group("train")]
        return {(partition.topic, partition.partition): value.offset for partition, value in found.items()}
    finally:
        admin.close()
