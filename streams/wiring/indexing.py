"""Wiring of `mimstream index`."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

import structlog

from encoders.base import Encoder
from encoders.loading import load_encoder
from schemas.errors import Unavailable
from streams.broker.cluster import assigned_topics, describe_topics, remove_member
from streams.broker.log_reader import LogReader
from streams.center.compare import Overdue, lost_retries
from streams.center.verify import find_overdue
from streams.indexing.app import WrongAssignment, create_index_app, different_partitions, read_topics, run_app
from streams.indexing.context import Guard
from streams.indexing.flow import Flow
from streams.indexing.slots import Slot
from streams.monitoring.metrics import Metrics, metrics_server
from streams.runtime.delivery import Patience, retry_until_available
from streams.runtime.process import run_until_stopped
from streams.settings import Settings
from streams.stores.histories.client import make_redis
from streams.stores.vectors.collection import CollectionInfo, mark_filled, read_center
from streams.wiring.center import open_index_context, run_verification
from streams.wiring.rights import RIGHTS

log = structlog.get_logger()

_LEAVING_SECONDS = 15.0
_LOGGED_EVERY_SECONDS = 30.0


async def remove_slot(settings: Settings, slot_name: str) -> None:
    """Remove a slot from the group. Claims it first: then no worker is alive in it."""
    async with AsyncExitStack() as opened:
        slot = await _open_slot(settings, slot_name, opened)
        await slot.claim()
        opened.push_async_callback(slot.release)
        await _leave(settings, slot)


async def run_index_worker(settings: Settings, slot_name: str, *, leave: bool, metrics_port: int | None) -> None:
    """Index until stopped; then leave the group at once if asked to."""
    metrics = Metrics("index")
    config = settings.index
    await asyncio.to_thread(_check_topics, settings)
    await read_center(settings.milvus)  # a Milvus that is down is reported now, not after the encoder was loaded
    async with AsyncExitStack() as opened:
        await opened.enter_async_context(metrics_server(metrics, settings.metrics.host, metrics_port))
        slot = await _open_slot(settings, slot_name, opened)
        # loading the encoder takes seconds, and so does waiting for the lease of a worker that was killed
        loading = asyncio.ensure_future(asyncio.to_thread(load_encoder, settings.encoder))
        opened.callback(loading.cancel)
        await slot.claim()
        opened.push_async_callback(slot.release)
        keeping = asyncio.ensure_future(slot.keep())
        opened.callback(keeping.cancel)
        encoder = await loading

        context = await opened.enter_async_context(open_index_context(settings, encoder))
        await _prepare_center(settings, encoder, slot.assert_held)
        await _leave_if_outdated(settings, slot)
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="mimstream-index-")))
        flow = Flow(check_role=slot.assert_held)
        keeping.add_done_callback(partial(_fail_with, flow))
        make_app = partial(
            create_index_app,
            context,
            flow,
            broker=settings.kafka,
            topics=settings.topics,
            instance_id=slot.instance_id,
            folder=folder,
            on_report=metrics.record,
            # once: an application that replaces another one gets ready too
            on_ready=cache(partial(log.info, "index.ready", slot=slot.instance_id, encoder=encoder.version)),
        )
        work = partial(run_app, make_app, flow, drain_seconds=config.drain_seconds, patience=context.patience)
        try:
            await run_until_stopped(work, grace_seconds=config.drain_seconds + _LEAVING_SECONDS)
        except WrongAssignment:
            with suppress(Unavailable):
                await _leave(settings, slot)
            raise
        if leave:
            await _leave(settings, slot)


async def _leave_if_outdated(settings: Settings, slot: Slot) -> None:
    """Leave the group first if this slot joined it for other topics, by another setting or another version.

    A static member that comes back to a group that is stable gets the partitions that it had, and none of a new topic.
    """
    group, topics = settings.topics.group("index"), read_topics(settings.index, settings.topics)
    joined_for = await retry_until_available(
        lambda: asyncio.to_thread(assigned_topics, settings.kafka, group, slot.instance_id),
        what="index.group",  # a broker that never had a group yet needs a moment
        patience=Patience(settings.index.back_off),
    )
    if joined_for is not None and joined_for != topics:
        log.info("index.joins_anew", slot=slot.instance_id, joined_for=sorted(joined_for), topics=sorted(topics))
        await _leave(settings, slot)


async def _leave(settings: Settings, slot: Slot) -> None:
    group = settings.topics.group("index")
    was_member = await asyncio.to_thread(remove_member, settings.kafka, group, slot.instance_id)
    log.info("index.left_group", slot=slot.instance_id, group=group, was_member=was_member)


async def _open_slot(settings: Settings, name: str, opened: AsyncExitStack) -> Slot:
    redis = make_redis(settings.redis)
    opened.push_async_callback(redis.aclose)
    token = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
    return Slot(redis, settings.redis, settings.index.lease, role="index", name=name, token=token)


async def _prepare_center(settings: Settings, encoder: Encoder, guard: Guard) -> None:
    """Repair the center first, if it may lack what was acknowledged or hold what was deleted unseen; mark it filled."""
    patience = Patience(settings.index.back_off)
    found = await retry_until_available(lambda: read_center(settings.milvus), what="center.look", patience=patience)
    assert found is not None, "set up before"
    overdue = await retry_until_available(
        lambda: find_overdue(
            settings.kafka,
            settings.topics,
            now=datetime.now(UTC),
            center_is_empty=found.encoder_version is None,
            center_is_filled=found.is_filled,
        ),
        what="index.positions",  # a broker that never had a group yet needs a moment
        patience=patience,
    )
    await retry_until_available(lambda: _warn_of_lost_retries(settings), what="index.retries", patience=patience)
    if overdue and not await _repair(settings, encoder, guard, found, overdue):
        return  # the next start verifies again
    if not found.is_filled:
        await retry_until_available(lambda: mark_filled(settings.milvus, found), what="center.note", patience=patience)


async def _warn_of_lost_retries(settings: Settings) -> None:
    async with LogReader(settings.kafka, settings.topics) as reader:
        bounds = await reader.bounds(await reader.partitions("items-retry"))
        committed = {one.partition: at for one, at in (await reader.committed("index")).items() if one in bounds}
    lost = lost_retries({one.partition: start for one, (start, _) in bounds.items()}, committed)
    if lost:
        log.warning(
            "index.retries_lost",
            by_partition=lost,
            reason="they were removed from items-retry before a worker read them, so their pictures are not fetched",
            fix="mimstream center verify --repair",
        )


async def _repair(
    settings: Settings, encoder: Encoder, guard: Guard, found: CollectionInfo, overdue: Sequence[Overdue]
) -> bool:
    """Verify and repair the whole center. False if faults are left."""
    log.warning(
        "index.verification_forced",
        partitions=[one.partition for one in overdue],
        committed=[one.committed for one in overdue],
        center=found.name,
        reason=(
            "nothing was read for longer than deletes are kept "
            f"({settings.topics.tombstone_retention_hours} hours): items may have been deleted unseen"
            if found.is_filled
            else "the center is new or lost its data, and records of items were acknowledged before"
        ),
    )
    report = await run_verification(settings, found, encoder, guard, _ProgressLog())
    log.info("index.verified", faults=report.faults, mended=report.mended, left=report.left)
    return not report.left


class _ProgressLog:
    """Logs now and then how far a verification is."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _LOGGED_EVERY_SECONDS

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LOGGED_EVERY_SECONDS
            log.info("index.verifying", doing=what, done=done, total=total)


def _fail_with(flow: Flow, keeping: asyncio.Future[None]) -> None:
    if not keeping.cancelled() and isinstance(error := keeping.exception(), Exception):
        flow.fail(error)


def _check_topics(settings: Settings) -> None:
    """Check early what Faust would wait for without a log line. Blocking. Raises `Misconfigured`."""
    partitions = describe_topics(
        settings.kafka, settings.topics, RIGHTS["index"].needed(queries=settings.index.queries)
    ).partitions
    items, retries = len(partitions["items"]), len(partitions["items-retry"])
    if items != retries:
        name = settings.topics.full_name
        raise different_partitions(name("items"), items, name("items-retry"), retries)
