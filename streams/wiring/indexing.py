"""Wiring of `mimstream index`."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import tempfile
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import structlog

from encoders.base import Encoder
from encoders.loading import load_encoder
from schemas.errors import Misconfigured
from streams.broker.cluster import remove_member
from streams.broker.topics import describe_topics
from streams.center.verify import find_overdue
from streams.indexing.app import create_index_app, run_app
from streams.indexing.context import Guard
from streams.indexing.flow import Flow
from streams.indexing.slots import Slot
from streams.monitoring.metrics import Metrics, metrics_server
from streams.runtime.delivery import Patience, retry_until_available
from streams.runtime.process import run_until_stopped
from streams.settings import Settings
from streams.stores.histories.client import make_redis
from streams.stores.vectors.collection import mark_filled, read_center
from streams.wiring.center import opened_center, opened_mender, opened_verification

log = structlog.get_logger()


_NEEDED_TOPICS = ("items", "items-retry", "embeddings", "dead-letters")


_LEAVING_SECONDS = 15.0


_TOLD_EVERY_SECONDS = 30.0


async def _remove(settings: Settings, slot_name: str) -> None:
    """Take the slot first: then nobody lives in it."""
    async with AsyncExitStack() as opened:
        slot = _open_slot(settings, slot_name, opened)
        await slot.claim()
        opened.push_async_callback(slot.release)
        await _leave(settings, slot)


async def _leave(settings: Settings, slot: Slot) -> None:
    group = settings.topics.group("index")
    was_there = await asyncio.to_thread(remove_member, settings.kafka, group, slot.instance_id)
    log.info("index.left_group", slot=slot.instance_id, group=group, was_member=was_there)


def _open_slot(settings: Settings, name: str, opened: AsyncExitStack) -> Slot:
    redis = make_redis(settings.redis)
    opened.push_async_callback(redis.aclose)
    token = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
    return Slot(redis, settings.redis, settings.index.lease, role="index", name=name, token=token)


async def _index(settings: Settings, slot_name: str, *, leave: bool, metrics_port: int | None) -> None:
    metrics = Metrics()
    config = settings.index
    await asyncio.to_thread(_check_topics, settings)
    await read_center(settings.milvus)  # a Milvus that is down is said now, not after the encoder was loaded
    async with AsyncExitStack() as opened:
        await opened.enter_async_context(metrics_server(metrics, settings.metrics.host, metrics_port))
        slot = _open_slot(settings, slot_name, opened)
        # loading the encoder takes seconds, and so does waiting for the lease of a worker that was killed
        loading = asyncio.ensure_future(asyncio.to_thread(_load_encoder, settings))
        opened.callback(loading.cancel)
        await slot.claim()
        opened.push_async_callback(slot.release)
        keeping = asyncio.ensure_future(slot.keep())
        opened.callback(keeping.cancel)
        encoder = await loading

        center = await opened.enter_async_context(opened_center(settings, encoder))
        await _verify_if_overdue(settings, encoder, slot.assert_held)
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="mimstream-index-")))
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
                patience=center.patience,
            )

        await run_until_stopped(work, grace_seconds=config.drain_seconds + _LEAVING_SECONDS)
        if leave:
            await _leave(settings, slot)


async def _verify_if_overdue(settings: Settings, encoder: Encoder, guard: Guard) -> None:
    """Mend the center first, if it may lack what was acknowledged, or hold what was deleted while nobody read."""
    found = await retry_until_available(
        lambda: read_center(settings.milvus), what="center.look", patience=_patience(settings)
    )
    assert found is not None, "set up before"
    behind = await retry_until_available(
        lambda: find_overdue(
            settings.kafka,
            settings.topics,
            now=datetime.now(UTC),
            center_is_empty=found.encoder_version is None,
            center_is_filled=found.is_filled,
        ),
        what="index.positions",  # a broker that never had a group yet needs a moment
        patience=_patience(settings),
    )
    if behind:
        log.warning(
            "index.verification_forced",
            partitions=[one.partition for one in behind],
            committed=[one.committed for one in behind],
            center=found.name,
            reason=(
                "nothing was read for longer than deletes are kept "
                f"({settings.topics.tombstone_retention_hours} hours): items may have been deleted unseen"
                if found.is_filled
                else "the center is new or lost its data, and records of items were acknowledged before"
            ),
        )
        async with (
            opened_mender(settings, encoder, guard) as mender,
            opened_verification(settings, found, mender, _Telling()) as verification,
        ):
            report = await verification.run()
        log.info("index.verified", faults=report.faults, mended=report.mended, left=report.left)
        if report.left:
            return  # the next start looks again
    if not found.is_filled:
        await retry_until_available(
            lambda: mark_filled(settings.milvus, found), what="center.note", patience=_patience(settings)
        )


class _Telling:
    """Says now and then how far a verification has come."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _TOLD_EVERY_SECONDS

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _TOLD_EVERY_SECONDS
            log.info("index.verifying", doing=what, done=done, total=total)


def _patience(settings: Settings) -> Patience:
    return Patience(settings.index.back_off)


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
