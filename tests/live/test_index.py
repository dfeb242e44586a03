"""`mimstream index` as a process, against real Kafka, Valkey and Milvus Lite."""

from __future__ import annotations

import asyncio
import io
import json
import random
import struct
import time
import zlib
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from kafka.admin import NewPartitions
from PIL import Image

from schemas.errors import Reason
from streams.broker.clients import make_admin
from streams.settings import Settings
from streams.stack.run import RunningStack
from tests.factories.index_worker import ONE_THREAD, SOON, Start, start_index
from tests.factories.item_feed import (
    Feed,
    announced,
    assert_ends_with_the_last_word,
    center,
    feeding,
    held,
    letters,
    streaming_items,
)
from tests.factories.item_path import b64, picture
from tests.factories.waiting import until


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
        row = rows[key]
        assert (message.source.partition, message.source.offset) == (row.source_partition, row.source_offset)
        assert np.allclose(np.frombuffer(message.vector, "<f4"), row.vector, atol=1e-6)


async def goes_on(feed: Feed, index: Any, killed: float, before: set[str]) -> float:
    """How long after the kill the center holds an item that it did not hold before the kill."""
    await until(lambda: held(index, set(feed.expected) - before))
    return time.monotonic() - killed


async def test_a_killed_worker_loses_nothing_and_is_back_soon(
    settings: Settings, process: Start, record_property: Any
) -> None:
    started = time.monotonic()
    worker = process("index", env=ONE_THREAD, cold=True)
    worker.wait_for("index.ready", 120)
    fresh_start = time.monotonic() - started
    async with feeding(settings) as feed, center(settings) as index:
        times = []
        async with streaming_items(feed, index, at_least=200):
            for _ in range(2):
                worker.kill()
                killed, before = time.monotonic(), set(await held(index, feed.ever))
                worker = process("index", env=ONE_THREAD, cold=True)
                times.append(await goes_on(feed, index, killed, before))
                await asyncio.sleep(1)
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
        times = []
        async with streaming_items(feed, index, at_least=200):
            for _ in range(2):
                await asyncio.to_thread(stack.kill, part)
                killed, before = time.monotonic(), set(feed.ever)  # what was in flight may still be written
                times.append(await goes_on(feed, index, killed, before))
                await asyncio.to_thread(stack.wait_ready, part)
                await asyncio.sleep(1)
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
        (b"bad", event(image=b64(picture("red", 200)[:60])), "image", Reason.BAD_IMAGE),
        (b"bad", event(image=bomb), "image", Reason.IMAGE_TOO_LARGE),
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

        await until(lambda: letters(settings), lambda found: len(found) >= len(bad))
        assert await index.fetch(["bad", "other"]) == {}
    found = {(le.partition, le.offset): (le.key, le.value, le.stage, le.reason) for le in await letters(settings)}
    assert found == sent


async def test_a_picture_of_the_largest_size_goes_through_in_its_record(settings: Settings, process: Start) -> None:
    start_index(process)
    noise = np.random.default_rng(0).integers(0, 256, (1_670, 1_670, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(noise).save(encoded, "PNG")
    most = settings.encoder.max_image_bytes
    assert 0.99 * most < len(encoded.getvalue()) <= most
    async with feeding(settings) as feed, center(settings) as index:
        await feed.publish("large", "a large picture", image=b64(encoded.getvalue()))
        await assert_ends_with_the_last_word(feed, index)
        assert (await index.fetch(["large"]))["large"].has_image
    assert await letters(settings) == []


def _png_that_says_it_is(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


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
        await asyncio.to_thread(again.wait_for, "items.indexed")  # logged after the write that the center shows
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
    worker = process("index", env=ONE_THREAD | SOON | {variable: value})
    assert await asyncio.to_thread(worker.wait, 90) == 3
    assert variable in worker.output()
    assert "127.0.0.1:9" in worker.output()
    assert "Traceback" not in worker.output()


async def test_topics_that_are_missing_are_named_with_the_way_out(settings_values: Any, process: Start) -> None:
    worker = process("index", env=ONE_THREAD)
    assert await asyncio.to_thread(worker.wait, 60) == 2
    assert "mimstream topics create" in worker.output()


async def test_partitions_added_to_items_alone_end_the_worker_with_what_to_do_and_added_to_both_they_are_read(
    settings: Settings, process: Start
) -> None:
    partitions = settings.topics.partitions
    items, retries = (settings.topics.full_name(name) for name in ("items", "items-retry"))

    def widen(topic: str) -> None:
        with closing(make_admin(settings.kafka)) as admin:
            admin.create_partitions({topic: NewPartitions(partitions + 1)})

    worker = start_index(process, MIM_INDEX__TOPIC_CHECK_SECONDS="1")
    await asyncio.to_thread(widen, items)
    assert await asyncio.to_thread(worker.wait, 60) == 2
    assert f"--topic {retries} --partitions {partitions + 1}" in worker.output()
    await asyncio.to_thread(widen, retries)
    start_index(process, MIM_INDEX__TOPIC_CHECK_SECONDS="1")
    async with feeding(settings) as feed, center(settings) as index:
        value = json.dumps({"item_id": "a", "title": "x", "published_at": "2026-01-01T00:00:00Z"}).encode()
        await feed.producer.send_and_wait(items, key=b"a", value=value, partition=partitions)
        await until(lambda: index.fetch(["a"]), lambda rows: "a" in rows)
