"""A click log on a real broker, and the histories that follow from it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import groupby
from operator import attrgetter
from typing import Any

from streams.broker.clients import make_producer
from streams.broker.cluster import TopicIncarnation
from streams.broker.records import read_batch
from streams.settings import Settings
from streams.stores.histories.client import make_redis
from streams.stores.histories.redis_store import RedisBehaviourStore
from streams.stores.histories.store import InMemoryBehaviourStore
from tests.factories.topics import read_all

USERS = 40


def record(user: str, event_id: str, item: str, second: float, *, kind: str = "click") -> tuple[bytes, bytes]:
    """(key, value) of a behaviour."""
    at = 1_700_000_000 + second
    event = {"event_id": event_id, "kind": kind, "user_id": user, "item_id": item, "occurred_at": at}
    return user.encode(), json.dumps(event).encode()


def click_log(seed: int, n: int) -> list[tuple[bytes, bytes]]:
    """(key, value) of n behaviours: disorder, duplicates, and one in fifty broken."""
    rng = random.Random(seed)
    rows: list[tuple[bytes, bytes]] = []
    for i in range(n):
        if rows and rng.random() < 0.05:
            rows.append(rng.choice(rows[-20:]))
            continue
        user = f"u{rng.randrange(USERS)}"
        kind = rng.choice(["exposure", "exposure", "exposure", "click", "purchase"])
        item, second = f"i{rng.randrange(500)}", i + rng.randrange(-30, 30)
        key, value = record(user, f"s{seed}-{i}", item, second, kind=kind)
        if rng.random() < 0.02:
            value = value[: rng.randrange(len(value))]
        rows.append((key, value))
    return rows


async def send(settings: Settings, rows: list[tuple[bytes, bytes]], *, pause_every: int = 0) -> None:
    topic, pending = settings.topics.full_name("behaviours"), []
    async with make_producer(settings.kafka) as producer:
        for i, (key, value) in enumerate(rows):
            pending.append(await producer.send(topic, value, key=key))
            if pause_every and i % pause_every == 0:
                await asyncio.sleep(0.02)
        await asyncio.gather(*pending)


async def expected(settings: Settings) -> dict[str, Any]:
    """The view that an uninterrupted recorder makes of what is now in the topic."""
    store = InMemoryBehaviourStore(settings.behaviours)
    await store.bind(TopicIncarnation("any", "any", "any"))
    for partition, found in groupby(await read_all(settings, "behaviours"), key=attrgetter("partition")):
        records = list(found)
        events, _ = read_batch(records, now=datetime.now(UTC), max_bytes=10**7)
        await store.record(partition, events, first_offset=0, next_offset=records[-1].offset + 1)
    return await view_of(store)


@asynccontextmanager
async def behaviour_store(settings: Settings) -> AsyncIterator[RedisBehaviourStore]:
    """The view that recorders write and serving reads."""
    store = RedisBehaviourStore(make_redis(settings.redis), settings.redis, settings.behaviours)
    try:
        yield store
    finally:
        await store.close()


async def view_of(store: Any) -> dict[str, Any]:
    return {
        "counts": await store.counts(),
        "positions": await store.positions(),
        "histories": {f"u{u}": await store.history(f"u{u}") for u in range(USERS)},
    }
