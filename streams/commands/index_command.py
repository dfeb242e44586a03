"""`mimstream index`."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import socket
import tempfile
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import structlog

from encoders.base import Encoder
from encoders.loading import load_encoder
from schemas.errors import Misconfigured
from streams.agents.center import Center
from streams.agents.flow import Flow
from streams.agents.item_encoding import ItemEncoding
from streams.app import create_index_app, run_app
from streams.broker import broker_errors, make_producer
from streams.delivery import Patience
from streams.images import ImageFetcher
from streams.metrics import Metrics, metrics_server
from streams.processes import run_until_stopped
from streams.settings import Settings
from streams.slots import Slot
from streams.stores.center import read_center
from streams.stores.dead_letters import KafkaDeadLetters
from streams.stores.item_index import MilvusItemIndex
from streams.stores.outbox import KafkaOutbox
from streams.stores.redis_client import make_redis
from streams.topics import DEAD_LETTER_HEADROOM_BYTES, describe_topics

log = structlog.get_logger()

_NEEDED_TOPICS = ("items", "items-retry", "embeddings", "dead-letters")
_LEAVING_SECONDS = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--slot", default="0", help="this worker's slot; each worker of a cluster has its own, and keeps it"
    )
    parser.add_argument("--metrics-port", type=int, default=None, help="serve Prometheus metrics on this port")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Index until stopped."""
    if not options.slot.replace("-", "").replace("_", "").isalnum():
        raise Misconfigured(f"--slot {options.slot!r}: use letters, digits, - and _")
    asyncio.run(_index(settings, slot_name=options.slot, metrics_port=options.metrics_port))
    return 0


async def _index(settings: Settings, *, slot_name: str, metrics_port: int | None) -> None:
    metrics = Metrics()
    config = settings.index
    await asyncio.to_thread(_check_topics, settings)
    await read_center(settings.milvus)  # a Milvus that is down is said now, not after the encoder was loaded
    async with AsyncExitStack() as opened:
        await opened.enter_async_context(metrics_server(metrics, settings.metrics.host, metrics_port))
        redis = make_redis(settings.redis)
        opened.push_async_callback(redis.aclose)
        slot = Slot(
            redis,
            settings.redis,
            config.lease,
            role="index",
            name=slot_name,
            token=f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}",
        )
        # loading the encoder takes seconds, and so does waiting for the lease of a worker that was killed
        loading = asyncio.ensure_future(asyncio.to_thread(_load_encoder, settings))
        opened.callback(loading.cancel)
        await slot.claim()
        opened.push_async_callback(slot.release)
        keeping = asyncio.ensure_future(slot.keep())
        opened.callback(keeping.cancel)
        encoder = await loading

        index = MilvusItemIndex(settings.milvus, encoder_version=encoder.version, dim=encoder.dim)
        opened.push_async_callback(index.close)
        await index.open()
        producer = make_producer(
            settings.kafka, max_request_size=settings.kafka.max_record_bytes + DEAD_LETTER_HEADROOM_BYTES
        )
        opened.push_async_callback(producer.stop)
        with broker_errors(settings.kafka):
            await producer.start()
        encoding = ItemEncoding(encoder, prepare_threads=config.prepare_threads, cache_items=config.cache_items)
        opened.callback(encoding.close)
        fetcher = await opened.enter_async_context(ImageFetcher(settings.images))
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="mimstream-index-")))
        patience = Patience(config.back_off)
        center = Center(
            index=index,
            outbox=KafkaOutbox(producer, settings.kafka, settings.topics, encoder_version=encoder.version),
            dead_letters=KafkaDeadLetters(producer, settings.kafka, settings.topics),
            encoding=encoding,
            fetch=fetcher.fetch,
            config=config,
            max_record_bytes=settings.kafka.max_record_bytes,
            patience=patience,
            now=lambda: datetime.now(UTC),
        )
        flow = Flow(check_role=slot.assert_held)
        said_ready = False

        def say_ready() -> None:
            nonlocal said_ready
            if not said_ready:
                log.info("index.ready", slot=slot.instance_id, encoder=encoder.version)
            said_ready = True

        keeping.add_done_callback(lambda ended: _fail_with_it(ended, flow))

        async def work(stop: asyncio.Event) -> None:
            await run_app(
                lambda: create_index_app(
                    center,
                    flow,
                    broker=settings.kafka,
                    topics=settings.topics,
                    instance_id=slot.instance_id,
                    folder=folder,
                    on_report=metrics.record,
                    on_ready=say_ready,
                ),
                flow,
                stop,
                drain_seconds=config.drain_seconds,
                patience=patience,
            )

        await run_until_stopped(work, grace_seconds=config.drain_seconds + _LEAVING_SECONDS)


def _share_cores(settings: Settings) -> int:
    """How many passes run side by side. Torch is told to use as many cores for each as that leaves."""
    import torch  # loaded with the encoder

    cores = torch.get_num_threads()
    wanted = settings.index.encode_threads or (cores if settings.encoder.device == "cpu" else 1)
    torch.set_num_threads(max(1, cores // wanted))
    return wanted


def _load_encoder(settings: Settings) -> Encoder:
    return load_encoder(settings.encoder)


def _fail_with_it(keeping: asyncio.Future[None], flow: Flow) -> None:
    if not keeping.cancelled() and isinstance(error := keeping.exception(), Exception):
        flow.fail(error)


def _check_topics(settings: Settings) -> None:
    """Find out early what Faust would wait for without a word. Blocking. Raises `Misconfigured`."""
    rows = {settings.topics.short_name(row["topic"]): row for row in describe_topics(settings.kafka, settings.topics)}
    missing = [rows[name]["topic"] for name in _NEEDED_TOPICS if not rows[name]["exists"]]
    if missing:
        raise Misconfigured(f"topics {', '.join(missing)} do not exist: run 'mimstream topics create'")
    items, later = rows["items"], rows["items-retry"]
    if items["partitions"] != later["partitions"]:
        raise Misconfigured(
            f"{items['topic']} has {items['partitions']} partitions and {later['topic']} has {later['partitions']}: "
            "they must have the same number, so that one worker reads an item and its retries"
        )
