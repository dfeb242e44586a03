"""The Faust agents of the item path, run on their local channels."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import faust
import pytest

from streams.broker.topics import TopicName, TopicsConfig
from streams.indexing.app import bind_agents
from streams.indexing.flow import Flow
from streams.indexing.take_over import RecentWrites
from tests.factories.item_path import ItemPath, allowed
from tests.factories.waiting import until


class Running:
    """One agent under test."""

    def __init__(self, path: ItemPath, flow: Flow) -> None:
        self.path, self.flow = path, flow
        self.reports: list[object] = []
        self.acked: list[tuple[int, int]] = []
        self.agent: Any = None

    async def put(self, key: str | None, value: dict[str, Any] | bytes | None, **more: Any) -> None:
        await self.agent.put(
            json.dumps(value).encode() if isinstance(value, dict) else value,
            key=key.encode() if key is not None else None,
            **more,
        )

    @property
    def unread(self) -> int:
        """Events that the agent has not read yet."""
        return int(self.agent._stream.channel.queue.qsize())

    async def until(self, done: Callable[[], bool]) -> None:
        await until(done, seconds=20, every=0.01)

    async def fails_with(self, error: type[Exception]) -> None:
        """Wait until the worker stops for this error."""
        with pytest.raises(error):
            await asyncio.wait_for(asyncio.shield(self.flow.failed), 10)


@asynccontextmanager
async def running(
    which: TopicName,
    path: ItemPath,
    folder: Path,
    *,
    is_current: Callable[[Any], bool] = lambda event: True,
    check_role: Any = allowed,
    recent: RecentWrites | None = None,
    partitions: int = 0,
) -> AsyncIterator[Running]:
    flow = Flow(check_role=check_role)
    never = RecentWrites(window_seconds=0, max_records=0, max_taken_over=0, clock=lambda: 0.0)
    run = Running(path, flow)
    app = faust.App("test", store="memory://", datadir=str(folder), value_serializer="raw", autodiscover=False)
    bound: dict[str, Any] = {"topics": TopicsConfig(), "is_current": is_current, "on_report": run.reports.append}
    bound |= {"count_partitions": lambda: partitions}
    agent: Any = bind_agents(app, path.context, flow, recent or never, **bound)[which]
    async with agent.test_context() as context:
        run.agent = context
        stream = context._stream
        original = stream.ack

        async def ack(event: Any) -> bool:
            run.acked.append((event.message.partition, event.message.offset))
            return bool(await original(event))

        stream.ack = ack
        yield run
    flow.failed.cancel()
    app.consumer._thread.thread_loop.close()  # made for a thread that no test starts
