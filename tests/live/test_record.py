"""`mimstream record` against real Kafka and Valkey: killed, starved and rebuilt, its view is as if nothing happened."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import aclosing, closing
from typing import Any

import kafka
import pytest

from streams.broker.clients import make_admin
from streams.broker.log_reader import read_ends
from streams.settings import Settings
from streams.stack.run import RunningStack
from streams.stores.histories.client import make_redis
from tests.factories.index_worker import SOON, Start
from tests.factories.item_feed import letters
from tests.factories.recorded_log import behaviour_store, click_log, expected, send, view_of
from tests.factories.topics import create_anew
from tests.factories.waiting import until


async def recorded(settings: Settings) -> dict[str, Any]:
    async with behaviour_store(settings) as store:
        return await view_of(store)


async def wait_until_recorded(settings: Settings, seconds: float = 60) -> None:
    """Until every position stands at its partition's end."""
    async with behaviour_store(settings) as store:

        async def left() -> dict[int, int]:
            ends, positions = await read_ends(settings.kafka, settings.topics, "behaviours"), await store.positions()
            return {partition: end - positions.get(partition, 0) for partition, end in ends.items()}

        await until(left, lambda left: not any(left.values()), seconds=seconds)


async def record_all(settings: Settings, process: Start, *arguments: str, **env: str) -> Any:
    """Run a recorder until everything is recorded; returns it when it has ended."""
    child = process("record", *arguments, env=env)
    child.wait_for("record.ready")
    await wait_until_recorded(settings)
    assert child.stop() == 0
    return child


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
    await record_all(settings, process)
    await record_all(settings, process, "--rebuild")
    found = await letters(settings)
    assert {letter.value: letter.reason.value for letter in found} == broken
    assert len(found) == len(broken)
    assert {(letter.topic, letter.stage, letter.key) for letter in found} == {("behaviours", "record", b"u1")}
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
    await record_all(settings, process)
    before = await recorded(settings)
    await record_all(settings, process, "--rebuild", MIM_RECORD__MAX_RECORDS="70")
    assert await recorded(settings) == before == await expected(settings)


async def test_a_store_that_lost_everything_while_running_is_filled_again(settings: Settings, process: Start) -> None:
    child = process("record")
    await send(settings, click_log(7, 500))
    await wait_until_recorded(settings)
    async with aclosing(make_redis(settings.redis)) as client:
        await client.delete(*await client.keys(f"{settings.redis.key_prefix}*"))
    await send(settings, click_log(8, 400))
    await wait_until_recorded(settings)
    assert child.stop() == 0
    assert await recorded(settings) == await expected(settings)
    assert "record.replaying" in child.output()


async def test_the_groups_lag_is_zero_after_a_kill_between_write_and_commit(settings: Settings, process: Start) -> None:
    await send(settings, click_log(11, 200))
    await record_all(settings, process)
    group = settings.topics.group("record")
    with closing(make_admin(settings.kafka)) as admin:
        admin.delete_groups([group])  # as if no commit had ever come through
        child = process("record")
        child.wait_for("record.ready")
        ends = (await recorded(settings))["positions"]
        found = {tp.partition: row.offset for tp, row in admin.list_group_offsets({group: None})[group].items()}
    assert found == {partition: end for partition, end in ends.items() if end}
    assert child.stop() == 0


async def test_a_topic_created_anew_is_refused_with_the_way_out(settings: Settings, process: Start) -> None:
    await send(settings, click_log(9, 100))
    await record_all(settings, process)
    create_anew(settings, "behaviours")
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
    await record_all(settings, process)
    create_anew(settings, "behaviours")
    topic, group = settings.topics.full_name("behaviours"), settings.topics.group("record")
    with closing(make_admin(settings.kafka)) as admin:
        # a recorder that still had records of the old topic in hand commits by the topic's name
        partitions = [kafka.TopicPartition(topic, p) for p in range(settings.topics.partitions)]
        admin.alter_group_offsets(group, {p: kafka.structs.OffsetAndMetadata(30, "", None) for p in partitions})
    broken = [(b"u1", b"{" + bytes([32] * n)) for n in range(5)]
    await send(settings, [*broken, *(row for row in click_log(13, 200) if row[1].endswith(b"}"))])
    child = await record_all(settings, process, "--rebuild")
    assert {value for _, value in broken} <= {letter.value for letter in await letters(settings)}
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
