"""Clicks of users with a taste on items with vectors, over real Kafka, and what a trainer says of them."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from schemas.behaviours import Behaviour, BehaviourKind
from schemas.items import ItemEmbedding, embedding_key
from schemas.manifests import ReleaseNotice
from streams.broker.clients import make_admin, make_producer
from streams.settings import Settings
from tests.factories.samples import DAY0, behaviour, embedding
from tests.factories.topics import read_all

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
    "MIM_GATE__TRIAL_ROWS": "64",
    "MIM_GATE__GAUC_MARGIN": "1",
    "MIM_GATE__LOG_LOSS_MARGIN": "9",
    "MIM_TRAIN__IDLE_SECONDS": "1",
    "MIM_TRAIN__ALL_IDLE_SECONDS": "1",
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
            second = START.timestamp() - DAY0 + self.second
            exposure = behaviour(f"x{self.number}", user=user, item=item, second=second)
            events.append(exposure)
            if self.rng.random() < 1 / (1 + np.exp(-8 * float(self.users[user] @ self.items[item]))):
                click = {"kind": BehaviourKind.CLICK, "occurred_at": exposure.occurred_at + timedelta(seconds=2)}
                ids = {"event_id": f"c{self.number}", "exposure_id": exposure.event_id}
                events.append(exposure.model_copy(update=click | ids))
        return events

    def embedding(self, item_id: str, *, encoder: str = ENCODER) -> ItemEmbedding:
        published = START.timestamp() - DAY0
        return embedding(item_id, self.items[item_id], version=encoder, published=published)


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
                key, message = embedding_key(encoder, item_id), world.embedding(item_id, encoder=encoder)
                value = message.model_dump_json().encode()
                sends.append(await producer.send(topics.full_name("embeddings"), value, key=key))
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


def accounts(state: Path) -> dict[str, Any]:
    path = state / "accounts.json"
    return json.loads(path.read_text()) if path.exists() else {"accounts": {"received": 0, "trained": 0}, "steps": 0}


async def read_notices(settings: Settings) -> list[ReleaseNotice]:
    return [ReleaseNotice.model_validate_json(record.value) for record in await read_all(settings, "models")]


def group_offsets(settings: Settings) -> dict[tuple[str, int], int]:
    group = settings.topics.group("train")
    with closing(make_admin(settings.kafka)) as admin:
        found = admin.list_group_offsets(group)[group]
    return {(partition.topic, partition.partition): value.offset for partition, value in found.items()}
