"""A click log on a real broker, and the histories that follow from it."""

from __future__ import annotations

import asyncio
import json
import random
from datetime import UTC, datetime
from typing import Any

from aiokafka import TopicPartition

from streams.broker.clients import make_consumer, make_producer
from streams.broker.cluster import TopicIncarnation
from streams.broker.records import read_batch
from streams.settings import Settings
from streams.stores.histories.store import InMemoryBehaviourStore

USERS = 40


def click_log(seed: int, n: int) -> list[tuple[bytes, bytes]]:
    """(key, value) of n behaviours: disorder, duplicates, and one in fifty broken."""
    rng = random.Random(seed)
    rows: list[tuple[bytes, bytes]] = []
    for i in range(n):
        if rows and rng.random() < 0.05:
            rows.append(rng.choice(rows[-20:]))
            continue
        user = f"u{rng.randrange(USERS)}"
        event = {
            "event_id": f"s{seed}-{i}",
            "kind": rng.choice(["exposure", "exposure", "exposure", "click", "purchase"]),
            "user_id": user,
            "item_id": f"i{rng.randrange(500)}",
            "occurred_at": 1_700_000_000 + i + rng.randrange(-30, 30),
        }
        value = json.dumps(event).encode()
        if rng.random() < 0.02:
            value = value[: rng.randrange(len(value))]
        rows.append((user.encode(), value))
    return rows


async def send(settings: Settings, rows: list[tuple[bytes, bytes]], *, pause_every: int = 0) -> None:
    producer = make_producer(settings.kafka)
    await producer.start()
    try:
        topic = settings.topics.full_name("behaviours")
        pending = []
        for i, (key, value) in enumerate(rows):
            pending.append(await producer.send(topic, value, key=key))
            if pause_every and i % pause_every == 0:
                await asyncio.sleep(0.02)
        await asyncio.gather(*pending)
    finally:
        await producer.stop()


async def read_all(settings: Settings, topic: str) -> dict[int, list[Any]]:
    consumer = make_consumer(settings.kafka)
    await consumer.start()
    try:
        partitions = [TopicPartition(topic, p) for p in range(settings.topics.partitions)]
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        ends = await consumer.end_offsets(partitions)
        found: dict[int, list[Any]] = {p.partition: [] for p in partitions}
        while any([await consumer.position(p) < ends[p] for p in partitions]):
            for partition, records in (await consumer.getmany(timeout_ms=500)).items():
                found[partition.partition] += records
        return found
    finally:
        await consumer.stop()


async def expected(settings: Settings) -> dict[str, Any]:
    """The view that an uninterrupted recorder makes of what is now in the topic."""
    store = InMemoryBehaviourStore(settings.behaviours)
    await store.bind(TopicIncarnation("any", "any", "any"))
    for partition, records in (await read_all(settings, settings.topics.full_name("behaviours"))).items():
        if records:
            events, _ = read_batch(records, now=datetime.now(UTC), max_bytes=10**7)
            await store.record(partition, events, first_offset=0, next_offset=records[-1].offset + 1)
    return await view_of(store)


async def view_of(store: Any) -> dict[str, Any]:
    return {
        "counts": await store.counts(),
        "positions": await store.positions(),
        "histories": {f"u{u}": await store.history(f"u{u}") for u in range(USERS)},
    }
