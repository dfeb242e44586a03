"""Roles on a Redis with a replica that is promoted, and on a Redis Cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streams.broker.log_reader import read_ends
from streams.settings import Settings
from tests.factories.index_worker import ONE_THREAD, Start
from tests.factories.recorded_log import behaviour_store, click_log, expected, send, view_of
from tests.factories.redis_pair import redis_cluster, redis_pair
from tests.factories.waiting import until


async def test_a_recorder_goes_on_after_switchovers_without_a_restart_and_loses_nothing(
    settings: Settings, process: Start, tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    with redis_pair(tmp_path, unused_tcp_port_factory) as pair:
        settings = settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": pair.url})})
        child = process("record", env={"MIM_REDIS__URL": pair.url, "MIM_RECORD__MAX_RECORDS": "50"})
        await asyncio.to_thread(child.wait_for, "record.ready")
        sending = asyncio.create_task(send(settings, click_log(1, 2_000), pause_every=40))
        for _ in range(2):
            written = child.output().count("behaviours.recorded")
            await until(child.output, lambda output, seen=written: output.count("behaviours.recorded") > seen + 2)
            await asyncio.to_thread(pair.switch)
        await sending

        async def left() -> int:
            async with behaviour_store(settings) as store:
                positions = await store.positions()
            ends = await read_ends(settings.kafka, settings.topics, "behaviours")
            return sum(ends.values()) - sum(positions.values())

        await until(left, lambda left: left == 0)
        assert child.returncode is None and child.stop() == 0
        async with behaviour_store(settings) as store:
            assert await view_of(store) == await expected(settings)


async def test_a_redis_cluster_is_refused_at_the_start_of_every_role(
    settings: Settings, process: Start, tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    with redis_cluster(tmp_path, unused_tcp_port_factory) as url:
        children: list[Any] = [
            process(role, env={"MIM_REDIS__URL": url} | ONE_THREAD) for role in ("check", "record", "index", "serve")
        ]
        for child, status in zip(children, (1, 2, 2, 2), strict=True):
            assert await asyncio.to_thread(child.wait) == status, child.output()
            told = " ".join(child.output().split())
            assert "is a Redis Cluster" in told and "MIM_REDIS__URL" in told, told
            assert "Traceback" not in told
