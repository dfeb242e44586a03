"""The Faust application against a real broker, in this process; the center is in memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from streams.settings import Settings
from tests.factories.index_app import Worker
from tests.factories.item_feed import feeding
from tests.factories.waiting import until

# Faust leaves threads' sockets to the garbage collector when it is stopped after a crash
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


async def test_a_member_whose_heartbeats_are_confirmed_writes_long_after_it_joined(
    settings: Settings, tmp_path: Path
) -> None:
    worker = Worker(settings, tmp_path, session_timeout_seconds=6)
    async with feeding(settings) as feed:
        await feed.publish("a", "at once")
        await until(lambda: worker.titles == feed.expected)
        await asyncio.sleep(worker.context.config.silence_seconds + 1)
        await feed.publish("a", "later")
        await until(lambda: worker.titles == feed.expected)
    assert len(worker.apps) == 1
    worker.stop.set()
    await worker.running


async def test_an_application_that_crashed_is_replaced_and_nothing_is_lost(settings: Settings, tmp_path: Path) -> None:
    worker = Worker(settings, tmp_path)
    async with feeding(settings) as feed:
        for n in range(50):
            await feed.publish(f"i{n}", "before")
        await until(lambda: worker.titles == feed.expected)
        held_back = asyncio.Event()
        upsert = worker.index.upsert

        async def slow(rows: Any) -> None:
            held_back.set()
            await asyncio.sleep(1)
            await upsert(rows)

        worker.index.upsert = slow  # type: ignore[method-assign]
        for n in range(100):
            await feed.publish(f"i{n}", "after")
        await held_back.wait()  # a batch is in hand
        await worker.apps[0].crash(RuntimeError("as a commit may"))
        await until(lambda: worker.titles == feed.expected)
    assert len(worker.apps) == 2
    assert worker.ready == 2
    worker.stop.set()
    await asyncio.wait_for(worker.running, 30)


async def test_what_an_agent_cannot_go_on_from_ends_the_process(settings: Settings, tmp_path: Path) -> None:
    worker = Worker(settings, tmp_path)

    async def broken(rows: Any) -> None:
        raise ZeroDivisionError("a bug")

    worker.index.upsert = broken  # type: ignore[method-assign]
    async with feeding(settings) as feed:
        await feed.publish("a", "x")
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(worker.running, 60)
    again = Worker(settings, tmp_path)  # under the same instance id: the record was not acknowledged
    await until(lambda: again.titles == {"a": "x"})
    again.stop.set()
    await asyncio.wait_for(again.running, 30)
