"""Wiring of `mimstream record`."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from contextlib import AsyncExitStack
from functools import partial

import structlog

from streams.broker.clients import broker_errors, make_consumer, make_producer
from streams.broker.cluster import TopicIncarnation, describe_topics, read_incarnation
from streams.broker.log_reader import read_beginnings
from streams.broker.topics import DEAD_LETTER_HEADROOM_BYTES
from streams.dead_letters.producer import KafkaDeadLetters
from streams.monitoring.metrics import Metrics, metrics_server
from streams.recording.deleted_items import DeletedItemFollower
from streams.recording.forgotten_users import ErasureFollower
from streams.recording.recorder import Recorder
from streams.runtime.process import run_until_stopped
from streams.settings import Settings
from streams.stores.histories.client import make_redis
from streams.stores.histories.deleted_items import RedisDeletedItems
from streams.stores.histories.redis_store import RedisBehaviourStore
from streams.wiring.rights import RIGHTS

log = structlog.get_logger()

_DAY_MS = 86_400_000


async def record(settings: Settings, *, rebuild: bool, metrics_port: int | None) -> None:
    """Record until stopped; `rebuild` clears the behaviour store first."""
    metrics = Metrics("record")
    topic = settings.topics.full_name("behaviours")

    async def identify() -> TopicIncarnation:
        return await asyncio.to_thread(read_incarnation, settings.kafka, settings.topics, "behaviours")

    await asyncio.to_thread(describe_topics, settings.kafka, settings.topics, RIGHTS["record"].topics)
    async with AsyncExitStack() as opened:
        await opened.enter_async_context(metrics_server(metrics, settings.metrics.host, metrics_port))
        redis = make_redis(settings.redis)
        store = RedisBehaviourStore(redis, settings.redis, settings.behaviours)
        opened.push_async_callback(store.close)
        await store.ping()
        producer = make_producer(
            settings.kafka,
            max_request_size=settings.kafka.max_record_bytes + DEAD_LETTER_HEADROOM_BYTES,
        )
        consumer = make_consumer(
            settings.kafka,
            group_id=settings.topics.group("record"),
            session_timeout_ms=settings.record.session_timeout_ms,
            heartbeat_interval_ms=max(300, settings.record.session_timeout_ms // 6),
            max_poll_interval_ms=_DAY_MS,  # keeps its partitions while it waits for a store that is away
        )
        for client in (producer, consumer):
            opened.push_async_callback(client.stop)
            with broker_errors(settings.kafka):
                await client.start()
        identity = await identify()
        log_replaced = False
        if rebuild:
            log.warning("record.rebuilding", topic=topic)
            log_replaced = await store.bound_log() not in (None, identity)
            await store.clear()
        await store.bind(identity)
        erasures = ErasureFollower(
            store,
            settings.kafka,
            settings.topics,
            beginnings=partial(read_beginnings, settings.kafka, settings.topics, "behaviours"),
        )
        opened.push_async_callback(erasures.close)
        await erasures.open()  # before anything is recorded
        deleted = DeletedItemFollower(
            RedisDeletedItems(redis, settings.redis),
            settings.kafka,
            settings.topics,
            settings.record,
            member=f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}",
            on_report=metrics.record,
        )
        opened.push_async_callback(deleted.close)
        recorder = Recorder(
            consumer,
            store,
            KafkaDeadLetters(producer, settings.kafka, settings.topics),
            topic=topic,
            broker=settings.kafka,
            identify=identify,
            config=settings.record,
            clock=time.time,
            log_replaced=log_replaced,
            on_report=metrics.record,
            on_ready=lambda: log.info("record.ready", topic=topic),
        )

        async def work(stop: asyncio.Event) -> None:
            tasks = {asyncio.create_task(part.run(stop)) for part in (recorder, erasures, deleted)}
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        await run_until_stopped(work)
