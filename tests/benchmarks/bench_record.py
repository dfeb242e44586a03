"""How fast `record` writes and `score` answers, on an embedded stack of its own.

    python tests/benchmarks/bench_record_and_score.py [EVENTS]

Prints one JSON object: events recorded per second, latencies of look-up and of a whole request at 200 candidates.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import structlog
import torch
from aiohttp import web

from encoders.base import Encoder
from schemas.letters import DeadLetter
from schemas.manifests import ModelManifest
from streams.broker.clients import make_consumer, make_producer
from streams.broker.cluster import read_incarnation
from streams.broker.topics import create_topics
from streams.monitoring.metrics import Metrics
from streams.recording.recorder import Recorder
from streams.serving.api import ScoringService, make_app
from streams.serving.config import ServeConfig
from streams.serving.model_watcher import ModelWatcher
from streams.serving.vector_cache import VectorCache
from streams.settings import Settings, load_settings
from streams.stack.run import running_stack
from streams.stores.artifacts.registry import in_memory_registry, pack_weights, weights_checksum
from streams.stores.histories.client import make_redis
from streams.stores.histories.redis_store import RedisBehaviourStore
from streams.stores.vectors.item_index import InMemoryItemIndex, ItemRow
from trainer.networks.scorer import Scorer
from trainer.online.config import TrainerConfig
from trainer.online.trainer import OnlineTrainer

DIM, USERS, ITEMS, CANDIDATES = 128, 5_000, 20_000, 200


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

    async def identify() -> Any:
        return await asyncio.to_thread(read_incarnation, settings.kafka, settings.topics, "behaviours")

    recorder = Recorder(
        consumer,
        store,
        NoLetters(),
        topic=topic,
        broker=settings.kafka,
        identify=identify,
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


class NoEncoder:
    async def get(self) -> Encoder:
        raise AssertionError


async def score(settings: Settings) -> dict[str, float]:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(ITEMS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = InMemoryItemIndex(encoder_version="bench-1", dim=DIM)
    epoch = datetime(2025, 1, 1, tzinfo=UTC)
    for n, vector in enumerate(vectors):
        index.rows[f"item-{n}"] = ItemRow(
            f"item-{n}", "bench-1", vector, "", epoch, None, None, None, True, True, 0, n, 0
        )
    store = RedisBehaviourStore(make_redis(settings.redis), settings.redis, settings.behaviours)
    models = in_memory_registry()
    candidate = OnlineTrainer(TrainerConfig(), encoder_version="bench-1", dim=DIM, partitions=[0]).candidate()
    checksum = weights_checksum(pack_weights(candidate.weights))
    manifest = ModelManifest(
        release_id=f"r000001-{checksum[:12]}",
        weights_sha256=checksum,
        encoder_version="bench-1",
        dim=DIM,
        created_at=epoch,
        rows_trained=0,
        steps=0,
        rows_sha256="",
        offsets={},
        config=candidate.config,
    )
    models.publish(candidate.weights, manifest)
    models.promote(manifest.release_id, None)
    watcher = ModelWatcher(models, Scorer.from_release, encoder_version="bench-1", poll_seconds=2)
    await watcher.refresh()
    vector_cache = VectorCache(index, settings.serve.cache, encoder_version="bench-1", dim=DIM, clock=time.monotonic)
    pool = ThreadPoolExecutor(2)
    metrics = Metrics()
    service = ScoringService(
        ServeConfig(), vector_cache, index, store, watcher, NoEncoder(), "bench-1", pool, metrics.record, metrics.page
    )
    runner = web.AppRunner(make_app(service), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    await vector_cache.look_up(list(index.rows))
    names = list(index.rows)
    look_up: list[float] = []
    whole: list[float] = []
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        for n in range(300):
            vector_cache.confirm(time.monotonic())
            wanted = [names[i] for i in rng.integers(0, ITEMS, CANDIDATES)]
            started = time.perf_counter()
            await vector_cache.look_up(wanted)
            look_up.append(time.perf_counter() - started)
            body = {"user_id": f"user-{n % USERS}", "item_ids": wanted}
            started = time.perf_counter()
            async with session.post("/v1/score", json=body) as answer:
                assert answer.status == 200
                await answer.read()
            whole.append(time.perf_counter() - started)
    await runner.cleanup()
    pool.shutdown()
    await store.close()
    cuts = statistics.quantiles(whole, n=100)
    return {
        "look_up_200_ms_p50": statistics.median(look_up) * 1e3,
        "score_200_ms_p50": cuts[49] * 1e3,
        "score_200_ms_p99": cuts[98] * 1e3,
    }


async def main(settings: Settings, n: int) -> dict[str, float]:
    create_topics(settings.kafka, settings.topics)
    await produce(settings, n)
    rate = await record(settings, n)
    return {"record_events_per_second": rate, **await score(settings)}


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    torch.set_num_threads(1)
    with running_stack(Path(tempfile.mkdtemp(prefix="mim-bench-")), load_settings().stack) as stack:
        made = Settings(**stack.endpoints)
        events = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
        print(json.dumps({k: round(v, 2) for k, v in asyncio.run(main(made, events)).items()}))
