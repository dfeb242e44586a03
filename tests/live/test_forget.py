"""`mimstream forget user`: nothing of him is found by search afterwards, and no replay brings him back."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from streams.commands.forget import forget_user
from streams.encoder_training.topic_input import read_topics
from streams.settings import Settings
from streams.stores.histories.client import make_redis
from tests.factories.click_world import SMALL, World, accounts, produce
from tests.factories.recorded_log import behaviour_store, record, send
from tests.factories.waiting import until

pytestmark = pytest.mark.timeout(240)

USER = "user-whom-nobody-remembers"


def clicks(user: str, first: int, count: int) -> list[tuple[bytes, bytes]]:
    return [record(user, f"{user}-{n}", f"i{n}", n) for n in range(first, first + count)]


async def found_in_redis(settings: Settings, needle: bytes) -> list[bytes]:
    """Keys below our prefix whose name or value holds `needle`."""
    client: Any = make_redis(settings.redis)
    found = []
    async with aclosing(client):
        async for key in client.scan_iter(match=f"{settings.redis.key_prefix}*"):
            kind = await client.type(key)
            if kind == b"string":
                value = await client.get(key)
            elif kind == b"hash":
                value = b"|".join(part for pair in (await client.hgetall(key)).items() for part in pair)
            else:
                value = b"|".join(await client.smembers(key))
            if needle in key or needle in value:
                found.append(key)
    return found


async def test_a_forgotten_user_is_nowhere_in_redis_through_restart_and_rebuild_and_may_come_back_as_a_new_one(
    settings: Settings, process: Callable[..., Any]
) -> None:
    async def takes(user: str) -> list[str]:
        return [take.item_id for take in await store.history(user)]

    async def counted(takes: int) -> None:
        await until(store.counts, lambda counts: counts["takes"] >= takes)

    async with behaviour_store(settings) as store:
        await send(settings, clicks(USER, 0, 20) + clicks("other", 0, 5))
        recorder = process("record")
        await counted(takes=25)
        assert await found_in_redis(settings, USER.encode())

        await forget_user(settings, USER)
        await until(lambda: found_in_redis(settings, USER.encode()), operator.not_)
        assert len(await takes("other")) == 5

        await send(settings, clicks(USER, 100, 2))
        await counted(takes=27)
        assert await takes(USER) == ["i100", "i101"]
        assert recorder.stop() == 0

        rebuilding = process("record", "--rebuild")
        rebuilding.wait_for("record.ready")
        await counted(takes=7)
        assert (await store.counts())["erased"] == 20
        assert await takes(USER) == ["i100", "i101"] and len(await takes("other")) == 5

        read = await read_topics(settings.kafka, settings.topics, {}, {})  # what teaches an encoder
        of_user = [event.item_id for _, _, event in read.behaviours if event.user_id == USER]
        assert read.erased == 20 and of_user == ["i100", "i101"]

        await forget_user(settings, USER)
        await until(lambda: found_in_redis(settings, USER.encode()), operator.not_)
        assert rebuilding.stop() == 0
        again = process("record")
        again.wait_for("record.ready")
        assert not await found_in_redis(settings, USER.encode())
        assert again.stop() == 0


def files_with(folder: Path, needle: bytes) -> list[str]:
    """Files below `folder` that hold `needle`, packed ones unpacked."""
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content += repr(pq.read_table(path).to_pydict()).encode()
        if needle in content or needle in str(path).encode():
            found.append(str(path.relative_to(folder)))
    return found


async def test_a_forgotten_user_is_in_no_snapshot_score_journal_or_account_of_the_trainer(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    world, state = World(), tmp_path / "state"
    user = "user7"
    env = {**SMALL, "MIM_TRAIN__KEEP_SNAPSHOTS": "1"}
    events = world.behaviours(1200)
    await produce(settings, world=world, behaviours=events)
    trainer = process("train", "--state", str(state), env=env)
    await until(lambda: accounts(state).get("releases", 0) >= 1, seconds=120)
    assert trainer.stop() == 0
    assert files_with(settings.models.folder, user.encode()) and files_with(state, user.encode())

    await forget_user(settings, user)
    again = process("train", "--state", str(state), env=env)
    await asyncio.to_thread(again.wait_for, "train.user_forgotten", 120)
    await until(lambda: accounts(state)["accounts"]["received"] == len(events), seconds=120)
    assert again.stop() == 0
    assert files_with(settings.models.folder, user.encode()) == []
    assert files_with(state, user.encode()) == []
    assert accounts(state)["accounts"]["erased"] > 0
