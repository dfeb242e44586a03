"""`mimstream record` against real Kafka and Valkey: killed, starved and rebuilt, its view is as if nothing happened."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from typing import Any

import kafka
import pytest
from aiokafka import TopicPartition

from schemas.errors import StoreUnavailable
from schemas.letters import DeadLetter
from streams.broker.clients import make_admin, make_consumer
from streams.broker.topics import create_topics
from streams.settings import Settings
from streams.stack.run import RunningStack
from streams.stores.histories.client import make_redis
from streams.stores.histories.redis_store import RedisBehaviourStore
from tests.factories.index_worker import SOON
from tests.factories.recorded_log import click_log, expected, read_all, send, view_of

Start = Callable[..., Any]


async def recorded(settings: Settings) -> dict[str, Any]:
    store = RedisBehaviourStore(make_redis(settings.redis), settings.redis, settings.behaviours)
    try:
        return await view_of(store)
    finally:
        await store.close()


async def wait_until_recorded(settings: Settings, timeout: float = 60) -> None:
    """Until every position stands at its partition's end."""
    consumer = make_consumer(settings.kafka)
    await consumer.start()
    store = RedisBehaviourStore(make_redis(settings.redis), settings.redis)
    try:
        topic = settings.topics.full_name("behaviours")
        deadline = time.monotonic() + timeout
        while True:
            ends = await consumer.end_offsets([TopicPartition(topic, p) for p in range(settings.topics.partitions)])
            wanted = {partition.partition: end for partition, end in ends.items() if end}
            try:
                positions = await store.positions()
            except StoreUnavailable:
                positions = {}
            if {p: n for p, n in positions.items() if n} == wanted:
                return
            assert time.monotonic() < deadline, f"recorded {positions}, sent {wanted}"
            await asyncio.sleep(0.05)
    finally:
        await store.close()
        await consumer.stop()


async def test_killed_again_and_again_it_records_every_event_once(settings: Settings, process: Start) -> None:
    sending = asyncio.create_task(send(settings, click_log(1, 6_000), pause_every=40))
    fast = {"MIM_RECORD__MAX_RECORDS": "50", "MIM_RECORD__SESSION_TIMEOUT_MS": "6000"}
    for _ in range(3):
        child = process("record", env=fast)
        await asyncio.to_thread(child.wait_for, "behaviours.recorded")
        await asyncio.sleep(0.3)
        child.kill()
    await sending
    child = process("record", env=fast)
    await asyncio.to_thread(child.wait_for, "record.ready")  # the one before it may have recorded everything already
    await wait_until_recorded(settings)
    assert child.stop() == 0
    assert await recorded(settings) == await expected(settings)


async def test_each_broken_behaviour_is_buried_once_with_its_reason(settings: Settings, process: Start) -> None:
    good = click_log(2, 50)
    event = {"event_id": "x", "kind": "click", "user_id": "u1", "item_id": "i", "occurred_at": "2024-01-01T00:00:00Z"}
    broken = {
        b"{not json": "not_json",
        json.dumps(event | {"kind": "glance"}).encode(): "wrong_type",
        json.dumps(event | {"occurred_at": "2024-01-01T00:00:00"}).encode(): "timestamp_without_zone",
        json.dumps(event | {"user_id": "someone else"}).encode(): "key_mismatch",
        json.dumps(event | {"schema_version": 9}).encode(): "unknown_version",
    }
    good = [(key, value) for key, value in good if value.endswith(b"}")]
    rows = good + [(b"u1", value) for value in broken]
    random.Random(0).shuffle(rows)
    await send(settings, rows)
    child = process("record")
    await wait_until_recorded(settings)
    assert child.stop() == 0
    rebuilding = process("record", "--rebuild")
    rebuilding.wait_for("record.ready")
    await wait_until_recorded(settings)
    assert rebuilding.stop() == 0
    found = await read_all(settings, settings.topics.full_name("dead-letters"))
    letters = [DeadLetter.from_record(r.value, r.headers) for records in found.values() for r in records]
    assert {letter.value: letter.reason.value for letter in letters} == broken
    assert len(letters) == len(broken)
    assert {(letter.topic, letter.stage, letter.key) for letter in letters} == {("behaviours", "record", b"u1")}
    assert (await recorded(settings))["counts"]["broken"] == len(broken)


async def test_a_kill_of_the_store_loses_nothing(stack: RunningStack, settings: Settings, process: Start) -> None:
    child = process("record", env={"MIM_RECORD__MAX_RECORDS": "50"})
    child.wait_for("record.ready")
    sending = asyncio.create_task(send(settings, click_log(3, 4_000), pause_every=40))
    await asyncio.to_thread(child.wait_for, "behaviours.recorded")
    for _ in range(2):
        await asyncio.to_thread(stack.kill, "valkey")
        await asyncio.to_thread(stack.wait_ready, "valkey")
        await asyncio.sleep(0.3)
    await sending
    await wait_until_recorded(settings)
    assert child.stop() == 0
    assert await recorded(settings) == await expected(settings)


async def test_a_kill_of_the_broker_loses_nothing(stack: RunningStack, settings: Settings, process: Start) -> None:
    child = process("record", env={"MIM_RECORD__MAX_RECORDS": "50"})
    child.wait_for("record.ready")
    await send(settings, click_log(4, 1_000))
    await asyncio.to_thread(stack.kill, "kafka")
    await asyncio.to_thread(stack.wait_ready, "kafka")
    await send(settings, click_log(5, 1_000))
    await wait_until_recorded(settings, 90)
    assert child.stop() == 0
    assert await recorded(settings) == await expected(settings)


async def test_a_rebuild_gives_the_same_view(settings: Settings, process: Start) -> None:
    await send(settings, click_log(6, 2_000))
    child = process("record")
    await wait_until_recorded(settings)
    assert child.stop() == 0
    before = await recorded(settings)
    child = process("record", "--rebuild", env={"MIM_RECORD__MAX_RECORDS": "70"})
    child.wait_for("record.ready")
    await wait_until_recorded(settings)
    assert child.stop() == 0
    assert await recorded(settings) == before == await expected(settings)


async def test_a_store_that_lost_everything_while_running_is_filled_again(settings: Settings, process: Start) -> None:
    child = process("record")
    await send(settings, click_log(7, 500))
    await wait_until_recorded(settings)
    client = make_redis(settings.redis)
    await client.delete(*await client.keys(f"{settings.redis.key_prefix}*"))
    await client.aclose()
    await send(settings, click_log(8, 400))
    await wait_until_recorded(settings)
    assert child.stop() == 0
    assert await recorded(settings) == await expected(settings)
    assert "record.replaying" in child.output()


async def test_the_groups_lag_is_zero_after_a_kill_between_write_and_commit(settings: Settings, process: Start) -> None:
    await send(settings, click_log(11, 200))
    child = process("record")
    await wait_until_recorded(settings)
    child.stop()
    group = settings.topics.group("record")
    admin = make_admin(settings.kafka)
    try:
        admin.delete_groups([group])  # as if no commit had ever come through
        child = process("record")
        child.wait_for("record.ready")
        ends = (await recorded(settings))["positions"]
        found = {tp.partition: row.offset for tp, row in admin.list_group_offsets({group: None})[group].items()}
    finally:
        admin.close()
    assert found == {partition: end for partition, end in ends.items() if end}
    assert child.stop() == 0


async def test_a_topic_created_anew_is_refused_with_the_way_out(settings: Settings, process: Start) -> None:
    await send(settings, click_log(9, 100))
    child = process("record")
    await wait_until_recorded(settings)
    assert child.stop() == 0
    admin = make_admin(settings.kafka)
    admin.delete_topics([settings.topics.full_name("behaviours")])
    admin.close()
    deadline = time.monotonic() + 60
    while settings.topics.full_name("behaviours") not in create_topics(settings.kafka, settings.topics):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    child = process("record")
    assert child.wait() == 2
    assert "record --rebuild" in child.output()
    child = process("record", "--rebuild")
    await send(settings, click_log(10, 100))
    await wait_until_recorded(settings)
    assert child.stop() == 0
    assert await recorded(settings) == await expected(settings)


async def test_a_late_commit_of_the_topic_before_takes_no_letter_away(settings: Settings, process: Start) -> None:
    await send(settings, click_log(12, 100))
    child = process("record")
    await wait_until_recorded(settings)
    assert child.stop() == 0
    topic, group = settings.topics.full_name("behaviours"), settings.topics.group("record")
    admin = make_admin(settings.kafka)
    try:
        admin.delete_topics([topic])
        deadline = time.monotonic() + 20
        while topic not in create_topics(settings.kafka, settings.topics):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        # a recorder that still had records of the old topic in hand commits by the topic's name
        partitions = [kafka.TopicPartition(topic, p) for p in range(settings.topics.partitions)]
        admin.alter_group_offsets(group, {p: kafka.structs.OffsetAndMetadata(30, "", None) for p in partitions})
    finally:
        admin.close()
    broken = [(b"u1", b"{" + bytes([32] * n)) for n in range(5)]
    await send(settings, [*broken, *(row for row in click_log(13, 200) if row[1].endswith(b"}"))])
    child = process("record", "--rebuild")
    await wait_until_recorded(settings)
    assert child.stop() == 0
    found = await read_all(settings, settings.topics.full_name("dead-letters"))
    values = [record.value for records in found.values() for record in records]
    assert {value for _, value in broken} <= set(values)
    assert "record.replaying" not in child.output()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MIM_REDIS__URL", "redis://127.0.0.1:1/0"), ("MIM_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")],
)
async def test_a_part_that_is_down_at_the_start_is_named_by_its_setting(
    settings: Settings, process: Start, variable: str, value: str
) -> None:
    child = process("record", env=SOON | {variable: value})
    assert child.wait() == 3
    assert variable in child.output()
    assert "Traceback" not in child.output()
