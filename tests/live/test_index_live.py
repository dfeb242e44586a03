"""`mimstream index` as a process, against real Kafka, Valkey and Milvus Lite."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from item_feed import (
    Feed,
    announced,
    assert_ends_with_the_last_word,
    b64,
    center,
    feeding,
    held,
    letters,
    picture,
    read_all,
    until,
)

from schemas.errors import Reason
from streams.settings import Settings
from streams.stack.running import RunningStack

ONE_THREAD = {"OMP_NUM_THREADS": "1"}

Start = Callable[..., Any]


def start_index(process: Start, *arguments: str, **env: str) -> Any:
    worker = process("index", *arguments, env=ONE_THREAD | env)
    worker.wait_for("index.ready", 120)
    return worker


async def test_200_keys_at_once_end_with_the_last_word_of_each(settings: Settings, process: Start) -> None:
    start_index(process)
    draw = random.Random(3)
    async with feeding(settings) as feed, center(settings) as index:
        fates = {}
        for n in range(200):
            fate = ["publish", *draw.choices(["publish", "price", "delete"], k=draw.randint(1, 4))]
            fates[f"k{n}"] = [(step, what) for step, what in enumerate(fate)]
        queue = [key for key, fate in fates.items() for _ in fate]
        draw.shuffle(queue)
        for key in queue:
            step, what = fates[key].pop(0)
            if what == "delete":
                await feed.delete(key)
            else:
                title = f"{key} number {step}" if what == "publish" else feed.expected.get(key, f"{key} again")
                await feed.publish(key, title, price=float(step))
        await assert_ends_with_the_last_word(feed, index)
        rows = await held(index, feed.ever)
    last = await announced(settings)
    assert set(last) == feed.ever
    for key in feed.ever:
        message = last[key]
        if key not in feed.expected:
            assert message is None
            continue
        assert message is not None
        assert (message.source.partition, message.source.offset) == (
            rows[key].source_partition,
            rows[key].source_offset,
        )
        assert np.allclose(np.frombuffer(message.vector, "<f4"), rows[key].vector, atol=1e-6)


async def stream_items(feed: Feed, stop: asyncio.Event, *, at_least: int) -> None:
    """Publish, update and delete without pause until told to stop."""
    draw = random.Random(11)
    n = 0
    while n < at_least or not stop.is_set():
        await feed.publish(f"i{n}", f"item {n} as published")
        if n > 20 and draw.random() < 0.3:
            await feed.publish(f"i{draw.randrange(n)}", f"updated at {n}")
        if n > 20 and draw.random() < 0.2:
            await feed.delete(f"i{draw.randrange(n)}")
        n += 1
        await asyncio.sleep(0.03)


async def goes_on(feed: Feed, index: Any, killed: float, before: set[str]) -> float:
    """How long after the kill the center holds an item that it did not hold before the kill."""

    async def more() -> bool:
        return bool(set(await held(index, set(feed.expected) - before)))

    await until(more, 60, every=0.05)
    return time.monotonic() - killed


async def test_a_killed_worker_loses_nothing_and_is_back_soon(
    settings: Settings, process: Start, record_property: Any
) -> None:
    started = time.monotonic()
    worker = start_index(process)
    fresh_start = time.monotonic() - started
    async with feeding(settings) as feed, center(settings) as index:
        stop = asyncio.Event()
        streaming = asyncio.create_task(stream_items(feed, stop, at_least=200))

        async def under_way() -> bool:
            return await index.count() > 40

        await until(under_way)
        times = []
        for _ in range(2):
            worker.kill()
            killed, before = time.monotonic(), set(await held(index, feed.ever))
            worker = process("index", env=ONE_THREAD)
            times.append(await goes_on(feed, index, killed, before))
            await asyncio.sleep(1)
        stop.set()
        await streaming
        await assert_ends_with_the_last_word(feed, index)
        print("\nindexing went on", [round(t, 1) for t in times], f"s after kill -9; a start took {fresh_start:.1f} s")
        record_property("seconds_after_worker_kill", times)
    assert worker.stop() == 0


@pytest.mark.parametrize("part", ["kafka", "valkey", "milvus"])
async def test_a_killed_part_is_waited_for_and_nothing_is_lost(
    settings: Settings, process: Start, stack: RunningStack, part: Any, record_property: Any
) -> None:
    worker = start_index(process)
    async with feeding(settings) as feed, center(settings) as index:
        stop = asyncio.Event()
        streaming = asyncio.create_task(stream_items(feed, stop, at_least=200))

        async def under_way() -> bool:
            return await index.count() > 40

        await until(under_way)
        times = []
        for _ in range(2):
            await asyncio.to_thread(stack.kill, part)
            killed, before = time.monotonic(), set(feed.ever)  # what was in flight may still be written
            times.append(await goes_on(feed, index, killed, before))
            await asyncio.to_thread(stack.wait_ready, part)
            await asyncio.sleep(1)
        stop.set()
        await streaming
        await assert_ends_with_the_last_word(feed, index)
        print("\nindexing went on", [round(t, 1) for t in times], f"s after kill -9 of {part}")
        record_property(f"seconds_after_{part}_kill", times)
    assert worker.returncode is None
    assert worker.stop() == 0


async def test_bad_input_is_buried_one_by_one_and_its_neighbours_go_through(settings: Settings, process: Start) -> None:
    start_index(process)

    def event(**fields: Any) -> bytes:
        return json.dumps({"item_id": "bad", "published_at": "2026-01-01T00:00:00Z", **fields}).encode()

    bomb = b64(_png_that_says_it_is(100_000, 100_000))
    bad: list[tuple[bytes, bytes, str, Reason]] = [
        (b"bad", b"{not json", "decode", Reason.NOT_JSON),
        (b"bad", event(title=5), "decode", Reason.WRONG_TYPE),
        (b"bad", event(), "decode", Reason.NO_CONTENT),
        (b"bad", event(title="x", image=b64(picture("red", 200)[:60])), "image", Reason.BAD_IMAGE),
        (b"bad", event(title="x", image=bomb), "image", Reason.IMAGE_TOO_LARGE),
        (b"bad", event(title="x", schema_version=77), "decode", Reason.UNKNOWN_VERSION),
        (b"bad", event(title="x", published_at="2026-01-01T00:00:00"), "decode", Reason.TIMESTAMP_WITHOUT_ZONE),
        (b"bad", event(title="x", published_at="2999-01-01T00:00:00Z"), "decode", Reason.TIMESTAMP_IN_FUTURE),
        (b"bad", event(title="x", item_id="other"), "decode", Reason.KEY_MISMATCH),
        (b"\xff\xfe", event(title="x"), "decode", Reason.KEY_MISMATCH),  # without a key Kafka itself refuses it
    ]
    async with feeding(settings) as feed, center(settings) as index:
        sent = {}
        for n, (key, value, stage, reason) in enumerate(bad):
            await feed.publish(f"neighbour-{n}", f"a good one, {n}")
            sent[await feed.send(key, value)] = (key, value, stage, reason)
        await feed.publish("neighbour-last", "a good one at the end")
        await assert_ends_with_the_last_word(feed, index)

        async def all_buried() -> bool:
            return len(await letters(settings)) >= len(bad)

        await until(all_buried)
        assert await index.fetch(["bad", "other"]) == {}
    found = {(le.partition, le.offset): (le.key, le.value, le.stage, le.reason) for le in await letters(settings)}
    assert found == sent


def _png_that_says_it_is(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


async def test_a_second_worker_of_a_slot_is_turned_away_and_the_first_goes_on(
    settings: Settings, process: Start
) -> None:
    first = start_index(process)
    second = process("index", env=ONE_THREAD)
    assert second.wait(60) == 2
    assert "index-0" in second.output()
    assert "--slot" in second.output()
    async with feeding(settings) as feed, center(settings) as index:
        await feed.publish("a", "still at work")
        await assert_ends_with_the_last_word(feed, index)
    assert first.returncode is None


async def test_a_worker_that_wakes_up_after_it_was_replaced_writes_nothing_and_ends(
    settings: Settings, process: Start
) -> None:
    sleeper = start_index(process)
    async with feeding(settings) as feed, center(settings) as index:
        stop = asyncio.Event()
        streaming = asyncio.create_task(stream_items(feed, stop, at_least=100))

        async def under_way() -> bool:
            return await index.count() > 20

        await until(under_way)
        sleeper.send_signal(signal.SIGSTOP)  # in the middle of a batch, as likely as not
        successor = start_index(process)
        stop.set()
        await streaming
        await assert_ends_with_the_last_word(feed, index)
        for item_id in sorted(feed.expected)[:50]:
            await feed.publish(item_id, "after the sleeper")
        await assert_ends_with_the_last_word(feed, index)
        said = len(sleeper.output())
        sleeper.send_signal(signal.SIGCONT)
        assert await asyncio.to_thread(sleeper.wait, 60) == 4
        assert "index-0" in sleeper.output()[said:]
        assert '"items.indexed"' not in sleeper.output()[said:]
        await feed.publish("last", "one more")
        await assert_ends_with_the_last_word(feed, index)
    assert successor.returncode is None


async def test_two_slots_share_the_work_and_one_that_leaves_comes_back(settings: Settings, process: Start) -> None:
    first = start_index(process)
    second = start_index(process, "--slot", "1")
    async with feeding(settings) as feed, center(settings) as index:
        for n in range(60):
            await feed.publish(f"i{n}", f"title {n}")
        await assert_ends_with_the_last_word(feed, index)

        async def both_at_work() -> bool:
            await feed.publish(f"i{len(feed.ever)}", "more")
            return all("items.indexed" in worker.output() for worker in (first, second))

        await until(both_at_work)
        assert second.stop() == 0
        second = start_index(process, "--slot", "1")
        for n in range(60):
            await feed.publish(f"i{n}", f"title {n} again")
        await assert_ends_with_the_last_word(feed, index)


def assigned(worker: Any) -> dict[str, list[int]]:
    """What the worker was given last."""
    lines = [json.loads(line) for line in worker.output().splitlines() if '"index.assigned"' in line]
    return {"items": lines[-1]["items"], "items_retry": lines[-1]["items_retry"]}


async def test_an_item_and_its_retries_are_always_read_by_one_worker(settings: Settings, process: Start) -> None:
    # four partitions over three workers: handed out one by one, items-1 and items-retry-1 would part
    workers = [start_index(process, "--slot", name, MIM_ENCODER__NUM_THREADS="1") for name in "abc"]

    async def settled() -> bool:
        given = [assigned(worker) for worker in workers]
        return sorted(p for one in given for p in one["items"]) == [0, 1, 2, 3]

    await until(settled)
    for worker in workers:
        assert assigned(worker)["items"] == assigned(worker)["items_retry"]


async def test_a_slot_that_does_not_come_back_leaves_at_once_or_is_taken_out(
    settings: Settings, process: Start
) -> None:
    env = {"MIM_INDEX__SESSION_TIMEOUT_SECONDS": "120"}  # twice as long as the test waits for what it expects
    stays = start_index(process, **env)
    leaves = start_index(process, "--slot", "1", "--leave", **env)

    async def shared() -> bool:
        return len(assigned(stays)["items"]) == len(assigned(leaves)["items"]) == 2

    async def alone() -> bool:
        return assigned(stays)["items"] == [0, 1, 2, 3]

    await until(shared)
    taking_out = process("index", "--slot", "1", "--remove", env=ONE_THREAD)
    assert await asyncio.to_thread(taking_out.wait, 60) == 2  # somebody lives in it
    assert leaves.stop() == 0
    assert "index.left_group" in leaves.output()
    await until(alone)
    killed = start_index(process, "--slot", "2", **env)

    async def shared_again() -> bool:
        return len(assigned(stays)["items"]) == len(assigned(killed)["items"]) == 2

    await until(shared_again)
    killed.kill()
    taking_out = process("index", "--slot", "2", "--remove", env=ONE_THREAD)
    assert await asyncio.to_thread(taking_out.wait, 60) == 0, taking_out.output()
    await until(alone)
    async with feeding(settings) as feed, center(settings) as index:
        for n in range(20):
            await feed.publish(f"i{n}", f"title {n}")
        await assert_ends_with_the_last_word(feed, index)


async def test_a_worker_killed_while_it_waited_for_milvus_loses_nothing(
    settings: Settings, process: Start, stack: RunningStack
) -> None:
    worker = start_index(process)
    async with feeding(settings) as feed, center(settings) as index:
        await feed.publish("before", "the stop")
        await assert_ends_with_the_last_word(feed, index)
        await asyncio.to_thread(stack.stop, "milvus")
        try:
            for n in range(100):
                await feed.publish(f"i{n}", f"title {n}")
            await feed.delete("before")
            await asyncio.to_thread(worker.wait_for, "delivery.held")
            await asyncio.sleep(2)  # more than a commit's interval: what was acknowledged is committed by now
            worker.kill()
        finally:
            await asyncio.to_thread(stack.start, "milvus")
            await asyncio.to_thread(stack.wait_ready, "milvus")
        start_index(process)
        await assert_ends_with_the_last_word(feed, index)


async def test_a_clean_stop_leaves_nothing_to_do_twice(settings: Settings, process: Start) -> None:
    worker = start_index(process)
    async with feeding(settings) as feed, center(settings) as index:
        for n in range(30):
            await feed.publish(f"i{n}", f"title {n}")
        await assert_ends_with_the_last_word(feed, index)
        assert worker.stop() == 0
        again = start_index(process)
        await feed.publish("after", "the stop")
        await assert_ends_with_the_last_word(feed, index)
        indexed = [json.loads(line) for line in again.output().splitlines() if "items.indexed" in line]
        assert sum(line["count"] for line in indexed) == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MIM_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:9"),
        ("MIM_REDIS__URL", "redis://127.0.0.1:9/0"),
        ("MIM_MILVUS__URI", "http://127.0.0.1:9"),
    ],
)
async def test_a_part_that_is_down_at_start_is_named_with_its_setting(
    settings: Settings, process: Start, variable: str, value: str
) -> None:
    worker = process("index", env=ONE_THREAD | {variable: value})
    assert await asyncio.to_thread(worker.wait, 90) == 3
    assert variable in worker.output()
    assert "127.0.0.1:9" in worker.output()
    assert "Traceback" not in worker.output()


async def test_topics_that_are_missing_are_named_with_the_way_out(settings_values: Any, process: Start) -> None:
    worker = process("index", env=ONE_THREAD)
    assert await asyncio.to_thread(worker.wait, 60) == 2
    assert "mimstream topics create" in worker.output()


class Pictures:
    """A site whose pictures a test uploads."""

    def __init__(self) -> None:
        self.there: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        name = request.path.lstrip("/")
        self.asked.append(name)
        return web.Response(body=self.there[name]) if name in self.there else web.Response(status=503)


@pytest.fixture
async def pictures() -> Any:
    site = Pictures()
    app = web.Application()
    app.router.add_get("/{name}", site.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    server = web.TCPSite(runner, "127.0.0.1", 0)
    await server.start()
    port = server._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    site.url = f"http://127.0.0.1:{port}/"
    yield site
    await runner.cleanup()


async def test_a_late_picture_is_added_and_a_delete_wins_over_it_also_after_a_kill(
    settings: Settings, process: Start, pictures: Pictures
) -> None:
    env = {
        "MIM_IMAGES__PRIVATE_NETWORKS": '["127.0.0.0/8"]',
        "MIM_IMAGES__ALLOWED_PORTS": "[]",
        "MIM_INDEX__RETRY_INITIAL_SECONDS": "2",
        "MIM_INDEX__RETRY_FACTOR": "1",
        "MIM_INDEX__RETRY_MAX_ATTEMPTS": "60",
    }
    worker = start_index(process, **env)
    async with feeding(settings) as feed, center(settings) as index:
        await feed.publish("titled", "a title first", image_url=pictures.url + "one")
        await feed.publish("bare", "", image_url=pictures.url + "one")
        await feed.publish("gone", "", image_url=pictures.url + "one")
        await feed.publish("titled-gone", "a title", image_url=pictures.url + "one")
        await feed.publish("newer", "", image_url=pictures.url + "one")

        async def titles_there() -> bool:
            return set(await held(index, feed.ever)) == {"titled", "titled-gone"}

        await until(titles_there)
        assert not (await index.fetch(["titled"]))["titled"].has_image

        async def retried() -> bool:
            return len(await read_all(settings, "items-retry")) > 5

        await until(retried)
        worker.kill()
        await feed.delete("gone")
        await feed.delete("titled-gone")
        await feed.publish("newer", "now with a title")
        pictures.there["one"] = picture("blue")
        start_index(process, **env)

        async def pictures_there() -> bool:
            rows = await held(index, feed.ever)
            return all(item_id in rows and rows[item_id].has_image for item_id in ("titled", "bare"))

        await until(pictures_there)
        await asyncio.sleep(5)  # time for every retry that is still about
        await assert_ends_with_the_last_word(feed, index)
        rows = await held(index, feed.ever)
        assert (rows["titled"].has_title, rows["bare"].has_title, rows["newer"].has_image) == (True, False, False)
    last = await announced(settings)
    assert {item_id for item_id, message in last.items() if message is not None} == {"titled", "bare", "newer"}
    titled = last["titled"]
    assert titled is not None
    assert titled.has_image
