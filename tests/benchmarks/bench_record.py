"""Throughput of `record` on an embedded stack of its own. `mimstream bench score` measures the latency of `serve`.

    python -m tests.benchmarks.bench_record [EVENTS]

Prints one JSON object: events recorded per second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from schemas.letters import DeadLetter
from streams.broker.clients import make_consumer, make_producer
from streams.broker.cluster import read_incarnation
from streams.broker.topics import create_topics
from streams.recording.recorder import Recorder
from streams.settings import Settings, load_settings
from streams.stack.run import running_stack
from streams.stores.histories.client import make_redis
from streams.stores.histories.redis_store import RedisBehaviourStore

USERS, ITEMS = 5_000, 20_000


class NoLetters:
    async def publish(self, letters: Sequence[DeadLetter]) -> None:
        raise AssertionError("nothing here is broken")


async def produce(settings: Settings, n: int) -> None:
    rng = random.Random(0)
    producer = make_producer(settings.kafka)
    await producer.start()
    topic = settings.topics.full_name("behaviours")
    pending: list[Any] = []
    for i in range(n):
        user = f"user-{rng.randrange(USERS)}"
        kind = rng.choices(["exposure", "click", "purchase"], [80, 15, 5])[0]
        event = {"event_id": f"event-{i}", "kind": kind, "user_id": user, "item_id": f"item-{rng.randrange(ITEMS)}"}
        value = json.dumps(event | {"occurred_at": 1_700_000_000 + i / 100}).encode()
        pending.append(await producer.send(topic, value, key=user.encode()))
    await asyncio.gather(*pending)
    await producer.stop()


async def record(settings: Settings, n: int) -> float:
    topic = settings.topics.full_name("behaviours")
    store = RedisBehaviourStore(make_redis(settings.redis), settings.redis, settings.behaviours)
    consumer = make_consumer(settings.kafka, group_id=settings.topics.group("record"))
    await consumer.start()
    stop = asyncio.Event()
    seen = 0
    started = 0.0

    def on_report(report: Any) -> None:
        nonlocal seen
        seen += report.stored
        if seen >= n:
            stop.set()

    def on_ready() -> None:
        nonlocal started
        started = time.perf_counter()

    recorder = Recorder(
        consumer,
        store,
        NoLetters(),
        topic=topic,
        broker=settings.kafka,
        identify=partial(asyncio.to_thread, read_incarnation, settings.kafka, settings.topics, "behaviours"),
        config=settings.record,
        clock=time.time,
        on_report=on_report,
        on_ready=on_ready,
    )
    await recorder.run(stop)
    seconds = time.perf_counter() - started
    await consumer.stop()
    assert (await store.counts())["stored"] == n
    await store.close()
    return n / seconds


async def main(settings: Settings, n: int) -> float:
    create_topics(settings.kafka, settings.topics)
    await produce(settings, n)
    return await record(settings, n)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("events", nargs="?", type=int, default=200_000)
    events = parser.parse_args().events
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    with running_stack(Path(tempfile.mkdtemp(prefix="mim-bench-")), load_settings().stack) as stack:
        made = Settings(**stack.endpoints)
        print(json.dumps({"record_events_per_second": round(asyncio.run(main(made, events)), 2)}))
