"""`mimstream center verify` against a center that was damaged on purpose, and beside a worker that goes on."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pymilvus import MilvusClient
from structlog.testing import capture_logs

from schemas.items import embedding_key
from streams.commands import center as center_command
from streams.indexing.announcements import as_embedding
from streams.settings import Settings
from streams.stores.vectors.collection import read_center
from streams.stores.vectors.milvus_index import MilvusItemIndex
from tests.factories.index_worker import Start, start_index
from tests.factories.item_feed import Feed, assert_ends_with_the_last_word, center, feeding, held, stream_items
from tests.factories.waiting import until


@asynccontextmanager
async def writing(settings: Settings) -> AsyncIterator[MilvusItemIndex]:
    """The center, to be damaged."""
    found = await read_center(settings.milvus)
    assert found is not None and found.encoder_version is not None
    index = MilvusItemIndex(settings.milvus, encoder_version=found.encoder_version, dim=found.dim)
    try:
        yield index
    finally:
        await index.close()


async def verify(settings: Settings, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    parser = argparse.ArgumentParser()
    center_command.add_arguments(parser)
    options = parser.parse_args(["verify", "--json", *arguments])
    with capture_logs():
        status = await asyncio.to_thread(center_command.run, options, settings)
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, report


async def damage(settings: Settings, feed: Feed, dead: str, dead_in: int) -> dict[str, int]:
    """Every fault once or more; how many of each. Item `dead` was deleted, in partition `dead_in`."""
    alive = sorted(feed.expected)
    async with writing(settings) as index:
        rows = await index.fetch(alive)
        some = rows[alive[0]]
        await index.delete(alive[1:3])
        await index.upsert(
            [
                replace(rows[alive[3]], source_offset=rows[alive[3]].source_offset - 1, content_hash="1" * 32),
                replace(rows[alive[4]], content_hash="0" * 32, vector=np.roll(some.vector, 1)),
                replace(some, item_id=dead, source_partition=dead_in, source_offset=0),
                replace(some, item_id="never-published", source_offset=0),
                replace(some, item_id="from-nowhere", source_partition=77),
                replace(some, item_id="of-a-log-before-this-one", source_offset=1_000_000),
            ]
        )
    feed.ever |= {"never-published", "from-nowhere", "of-a-log-before-this-one"}
    return {"missing": 2, "stale": 1, "wrong": 1, "resurrected": 4}


async def announce_as_a_zombie(
    settings: Settings, feed: Feed, index: MilvusItemIndex, alive: str, deleted: str
) -> None:
    """The last word of two items becomes one of long ago: of older content, and of an item that is gone."""
    row = (await held(index, {alive}))[alive]
    for one in (replace(row, source_offset=row.source_offset - 1), replace(row, item_id=deleted, source_offset=0)):
        await feed.producer.send_and_wait(
            settings.topics.full_name("embeddings"),
            key=embedding_key(one.encoder_version, one.item_id),
            value=as_embedding(one).model_dump_json().encode(),
        )


async def test_every_fault_is_found_and_mended_beside_a_worker_that_goes_on(
    settings: Settings, process: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = start_index(process)
    async with feeding(settings) as feed, center(settings) as index:
        for n in range(40):
            await feed.publish(f"k{n:02}", f"title {n}")
        for n in range(36, 40):
            await feed.delete(f"k{n}")
        dead_in, _ = await feed.delete("k35")
        await feed.send(b"broken", b"{not json")
        await assert_ends_with_the_last_word(feed, index)
        # the broken record shows in no row: only what is acknowledged is judged
        await until(lambda: verify(settings, capsys), lambda found: found[1]["waiting"] == 0)
        assert worker.stop() == 0
        status, report = await verify(settings, capsys)
        assert (status, report["faults"], report["items"], report["unusable"]) == (0, 0, 36, 1)
        damaged = await damage(settings, feed, "k35", dead_in)
        alive, deleted = sorted(feed.expected)[5], "k36"
        await announce_as_a_zombie(settings, feed, index, alive, deleted)
        damaged |= {"misannounced": 2}
        await feed.publish("not-yet", "read by no worker")
        status, report = await verify(settings, capsys)
        assert status == 1
        assert {fault: report[fault] for fault in damaged} == damaged, report
        assert (report["waiting"], report["unusable"], report["mended"], report["repaired"]) == (1, 1, 0, False)

        start_index(process)
        stop = asyncio.Event()
        streaming = asyncio.create_task(stream_items(feed, stop, at_least=60))
        status, report = await verify(settings, capsys, "--repair")
        stop.set()
        await streaming
        late = report["misannounced"] - damaged["misannounced"]  # by a worker that is slow to announce: no fault of it
        assert {fault: report[fault] for fault in damaged} == damaged | {"misannounced": report["misannounced"]}
        assert (status, report["mended"] - late, report["left"]) == (0, sum(damaged.values()), 0) and late >= 0
        await assert_ends_with_the_last_word(feed, index)
        await until(lambda: verify(settings, capsys), lambda found: found[1]["waiting"] == 0)
        status, report = await verify(settings, capsys)
        assert (status, report["faults"]) == (0, 0)
        assert report["items"] == len(feed.expected) + 1  # the one that is not JSON


async def test_an_item_that_was_deleted_in_another_partition_stays_deleted_through_repairs(
    settings: Settings, process: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start_index(process)
    value = json.dumps({"item_id": "a", "title": "x", "published_at": "2026-01-01T00:00:00Z"}).encode()
    topic = settings.topics.full_name("items")
    async with feeding(settings) as feed, center(settings) as index:
        now = int(time.time() * 1000)
        await feed.producer.send_and_wait(topic, key=b"a", value=None, partition=1, timestamp_ms=now)
        await until(lambda: index.fetch(["a"], pending=True), lambda rows: "a" in rows and rows["a"].is_deleted)
        await feed.producer.send_and_wait(topic, key=b"a", value=value, partition=0, timestamp_ms=now - 1)
        await until(lambda: verify(settings, capsys), lambda found: found[1]["waiting"] == 0)
        for _ in range(2):
            status, report = await verify(settings, capsys, "--repair")
            assert (status, report["faults"], report["split"]) == (0, 0, 1)
            assert await index.fetch(["a"]) == {}
        async with writing(settings) as broken:
            await broken.delete(["a"])
            mark = (await index.fetch(["a"], pending=True)).get("a")
            assert mark is None
        status, report = await verify(settings, capsys, "--repair")
        assert (status, report["faults"], await index.fetch(["a"])) == (0, 0, {})


async def test_after_an_outage_longer_than_deletes_are_kept_a_worker_verifies_before_it_reads(
    settings: Settings, process: Start
) -> None:
    long_ago = int((time.time() - 7_200) * 1_000)

    async def publish_long_ago(feed: Feed, item_id: str) -> None:
        value = json.dumps({"item_id": item_id, "title": "old", "published_at": "2026-01-01T00:00:00Z"}).encode()
        topic = settings.topics.full_name("items")
        await feed.producer.send_and_wait(topic, key=item_id.encode(), value=value, timestamp_ms=long_ago)
        feed.expected[item_id] = "old"
        feed.ever.add(item_id)

    env = {"MIM_TOPICS__TOMBSTONE_RETENTION_HOURS": "1"}
    worker = start_index(process, **env)
    async with feeding(settings) as feed, center(settings) as index:
        for n in range(8):
            await publish_long_ago(feed, f"i{n}")
        await assert_ends_with_the_last_word(feed, index)
        assert worker.stop() == 0
        assert "index.verification_forced" not in worker.output()
        async with writing(settings) as damaged:
            (row,) = (await held(damaged, {"i0"})).values()
            await damaged.upsert([replace(row, item_id="deleted-unseen")])
        feed.ever.add("deleted-unseen")
        for n in range(8):
            await publish_long_ago(feed, f"after-{n}")
        again = start_index(process, **env)
        assert "index.verification_forced" in again.output()
        await assert_ends_with_the_last_word(feed, index)


def lose_the_center(settings: Settings) -> None:
    with closing(MilvusClient(settings.milvus.uri, timeout=10)) as client:
        collection = client.describe_collection(settings.milvus.alias)["collection_name"]
        for alias in client.list_aliases(collection)["aliases"]:
            client.drop_alias(alias)
        client.drop_collection(collection)


async def test_a_center_that_lost_its_data_is_filled_again_also_after_a_worker_that_died_over_it(
    settings: Settings, process: Start
) -> None:
    worker = start_index(process)
    async with feeding(settings) as feed, center(settings) as index:
        for n in range(12):
            await feed.publish(f"i{n:02}", f"title {n}")
        await feed.delete("i11")
        await assert_ends_with_the_last_word(feed, index)
        (row,) = (await held(index, {"i00"})).values()
        assert worker.stop() == 0
        assert "index.verification_forced" not in worker.output()

        lose_the_center(settings)
        half = MilvusItemIndex(settings.milvus, encoder_version=row.encoder_version, dim=len(row.vector))
        await half.open()
        await half.upsert([row])  # what a worker left that was killed while it filled the center
        await half.close()
        await feed.publish("i12", "while nobody works")
        again = start_index(process)
        assert "lost its data" in again.output()
        await assert_ends_with_the_last_word(feed, index)
        assert again.stop() == 0

        third = start_index(process)
        assert "index.verification_forced" not in third.output()
        await assert_ends_with_the_last_word(feed, index)
