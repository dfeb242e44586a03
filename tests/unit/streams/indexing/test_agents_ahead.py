"""How far the item path runs ahead of its writes, and how it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from streams.indexing import agents as item_streams
from streams.indexing.config import IndexConfig
from streams.indexing.flow import Flow
from streams.indexing.take_over import RecentWrites
from tests.factories.item_path import NOW, PICTURE_URL, ItemPath, allowed, item, picture, retry_record
from tests.factories.running_agent import running
from tests.factories.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Message(NamedTuple):
    offset: int
    key: bytes
    value: bytes
    partition: int = 0
    timestamp: float = NOW.timestamp()
    generation_id: int = 1
    headers: Any = None


class Event(NamedTuple):
    message: Message


class Stream:
    """Gives items one by one, as a batch each."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.taken = 0
        self.acked: list[int] = []

    async def noack_take(self, most: int, within: float) -> AsyncIterator[list[Event]]:
        for offset, name in enumerate(self.names):
            self.taken += 1
            yield [Event(Message(offset, name.encode(), json.dumps(item(name, title=f"t{offset}")).encode()))]
        await asyncio.Event().wait()

    async def ack(self, event: Event) -> None:
        self.acked.append(event.message.offset)


def pipeline(path: ItemPath, stream: Any, flow: Flow, recent: RecentWrites | None = None) -> item_streams.ItemPipeline:
    recent = recent or RecentWrites(window_seconds=0, max_records=0, max_taken_over=0, clock=lambda: 0.0)
    return item_streams.ItemPipeline(path.context, flow, recent, lambda event: True, lambda report: None, stream)


async def test_batches_are_read_ahead_up_to_the_limit_and_know_what_is_not_written_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, flow = ItemPath(IndexConfig(batches_ahead=1)), Flow(check_role=allowed)
    stream = Stream("a", "b", "a", "c", "d")
    prefetch, upsert = item_streams.prefetch, path.index.upsert
    unwritten: list[set[str]] = []
    may_write, writing = asyncio.Semaphore(0), 0

    async def noted(context: Any, prefetched: Any, names: frozenset[str]) -> None:
        unwritten.append(set(names))
        await prefetch(context, prefetched, names)

    async def held(rows: Any) -> None:
        nonlocal writing
        writing += 1
        await may_write.acquire()
        await upsert(rows)

    monkeypatch.setattr(item_streams, "prefetch", noted)
    path.index.upsert = held  # type: ignore[method-assign]
    reading = asyncio.create_task(pipeline(path, stream, flow).run())
    for written in range(5):
        read = min(written + 2, 5)
        await until(
            partial(lambda *wanted: (len(unwritten), writing) == wanted, read, written + 1), seconds=10, every=0.01
        )
        await asyncio.sleep(0.02)
        assert (stream.taken, stream.acked) == (read, list(range(written)))
        may_write.release()
    await until(lambda: len(stream.acked) == 5, seconds=10, every=0.01)
    assert unwritten == [set(), {"a"}, {"b"}, {"a"}, {"c"}]
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled() and not flow.failed.done()


async def test_of_a_batch_that_was_read_before_partitions_moved_the_center_is_not_even_asked() -> None:
    path, flow, stream = ItemPath(IndexConfig(batches_ahead=1)), Flow(check_role=allowed), Stream("a", "b", "c")
    fetch, written = path.index.fetch, list[list[str]]()

    async def moving(item_ids: Any, **more: Any) -> Any:
        if path.context.writing.locked():
            written.append(list(item_ids))
            if len(written) == 1:
                await until(lambda: stream.taken == 2, seconds=10, every=0.01)
                flow.partitions_moved()
        return await fetch(item_ids, **more)

    path.index.fetch = moving  # type: ignore[method-assign]
    reading = asyncio.create_task(pipeline(path, stream, flow).run())
    await until(lambda: stream.acked == [2], seconds=10, every=0.01)
    assert written == [["a"], ["c"]] and set(path.on_sale) == {"c"}
    reading.cancel()
    await asyncio.wait([reading])


async def test_nothing_is_checked_again_between_a_write_and_its_being_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(item_streams, "_DUE_EVERY_SECONDS", 0.005)
    path, flow, stream = ItemPath(), Flow(check_role=allowed), Stream("a")
    recent = RecentWrites(window_seconds=0, max_records=9, max_taken_over=9, clock=lambda: 0.0)
    recent.take_over()
    upsert, checked, meanwhile = path.index.upsert, list[bytes | None](), list[bytes | None]()

    async def recheck(context: Any, writes: Any, guard: Any) -> None:
        checked.extend(write.record.key for write in writes)

    async def held(rows: Any) -> None:
        recent.add([path.publish("earlier", title="x")])
        await asyncio.sleep(0.05)
        meanwhile.extend(checked)
        await upsert(rows)

    monkeypatch.setattr(item_streams, "recheck", recheck)
    path.index.upsert = held  # type: ignore[method-assign]
    reading = asyncio.create_task(pipeline(path, stream, flow, recent).run())
    await until(lambda: len(checked) == 2, seconds=10, every=0.01)
    assert meanwhile == [] and checked == [b"earlier", b"a"]
    reading.cancel()
    await asyncio.wait([reading])


async def test_a_path_that_is_cancelled_leaves_nothing_under_way_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, stream, flow = ItemPath(IndexConfig(batches_ahead=2)), Stream("a", "b", "c"), Flow(check_role=allowed)
    begun, ended = 0, 0

    async def stuck(*_: Any) -> None:
        nonlocal begun, ended
        begun += 1
        try:
            await asyncio.Event().wait()
        finally:
            for _turn in range(5):
                await asyncio.sleep(0)
            ended += 1

    monkeypatch.setattr(item_streams, "prefetch", stuck)
    reading = asyncio.create_task(pipeline(path, stream, flow).run())
    await until(lambda: begun == 3, seconds=10, every=0.01)
    reading.cancel()
    await asyncio.wait([reading])
    assert ended == 3 and stream.acked == []
    assert not flow.failed.done()


class Retries(Stream):
    """Gives late pictures one by one."""

    def __init__(self, values: list[bytes]) -> None:
        super().__init__()
        self.values = values

    async def noack_take(self, most: int, within: float) -> AsyncIterator[list[Event]]:
        for offset, value in enumerate(self.values):
            self.taken += 1
            yield [Event(Message(offset, b"a", value))]
        await asyncio.Event().wait()


async def test_no_more_late_pictures_wait_than_may_and_the_next_one_in_line_is_read() -> None:
    path = ItemPath(IndexConfig(retry_max_waiting=2))
    await path.index_all(*(path.publish(f"i{n}", title="x", image_url=PICTURE_URL) for n in range(6)))
    path.web[PICTURE_URL] = picture()
    stream: Any = Retries([retry_record(one).value or b"" for one in path.outbox.retries])
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(0.01)

    flow = Flow(check_role=allowed)
    pool = item_streams.ImageRetryPool(path.context, flow, lambda event: True, lambda report: None, sleep, stream)
    reading = asyncio.create_task(pool.run())
    await until(lambda: len(waits) >= 6, seconds=10, every=0.01)
    assert (stream.taken, stream.acked) == (3, []) and max(waits) <= 1.0
    path.now = path.outbox.retries[-1].not_before
    await until(lambda: len(stream.acked) == 6, seconds=10, every=0.01)
    assert stream.acked == [*range(6)] and not flow.failed.done()
    reading.cancel()
    await asyncio.wait([reading])


async def test_a_loop_that_ends_by_itself_stops_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_streams, "_DUE_EVERY_SECONDS", 0.01)
    path = ItemPath()

    def broken() -> None:
        raise ZeroDivisionError("a bug")

    path.context.__dict__["now"] = broken
    async with running("items", path, tmp_path) as run:
        await run.fails_with(RuntimeError)
