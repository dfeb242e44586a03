"""`mimstream forget user`: nothing of him is found by search afterwards, and no replay brings him back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from streams.commands.forget import forget_user
from streams.encoder_training.topic_input import read_topics
from streams.settings import Settings
from streams.stores.histories.client import make_redis
from streams.stores.histories.redis_store import RedisBehaviourStore
from tests.factories.click_world import SMALL, World, accounts, produce, wait_until
from tests.factories.recorded_log import send
from tests.factories.waiting import until

pytestmark = pytest.mark.timeout(240)

USER = "user-whom-nobody-remembers"


def clicks(user: str, first: int, count: int) -> list[tuple[bytes, bytes]]:
    return [
        (
            user.encode(),
            json.dumps(
                {
                    "event_id": f"{user}-{n}",
                    "kind": "click",
                    "user_id": user,
                    "item_id": f"i{n}",
                    "occurred_at": 1_700_000_000 + n,
                }
            ).encode(),
        )
        for n in range(first, first + count)
    ]


async def found_in_redis(settings: Settings, needle: bytes) -> list[bytes]:
    """Keys below our prefix whose name or value holds `needle`."""
    client: Any = make_redis(settings.redis)
    found = []
    try:
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
    finally:
        await client.aclose()
    return found


async def test_a_forgotten_user_is_nowhere_in_redis_through_restart_and_rebuild_and_may_come_back_as_a_new_one(
    settings: Settings, process: Callable[..., Any]
) -> None:
    store = RedisBehaviourStore(make_redis(settings.redis), settings.redis, settings.behaviours)

    async def takes(user: str) -> list[str]:
        return [take.item_id for take in await store.history(user)]

    async def counted(name: str, least: int) -> bool:
        return (await store.counts())[name] >= least

    try:
        await send(settings, clicks(USER, 0, 20) + clicks("other", 0, 5))
        recorder = process("record")
        await until(lambda: counted("takes", 25), "everything to be recorded")
        assert await found_in_redis(settings, USER.encode())

        await forget_user(settings, USER)

        async def gone() -> bool:
            return not await found_in_redis(settings, USER.encode())

        await until(gone, "the user to be gone")
        assert len(await takes("other")) == 5

        await send(settings, clicks(USER, 100, 2))
        await until(lambda: counted("takes", 27), "the new user")
        assert await takes(USER) == ["i100", "i101"]
        assert recorder.stop() == 0

        rebuilding = process("record", "--rebuild")
        rebuilding.wait_for("record.ready")
        await until(lambda: counted("takes", 7), "the rebuild")
        assert (await store.counts())["erased"] == 20
        assert await takes(USER) == ["i100", "i101"] and len(await takes("other")) == 5

        read = await read_topics(settings.kafka, settings.topics, {}, {})  # what teaches an encoder
        assert read.erased == 20 and [event.item_id for _, _, event in read.behaviours if event.user_id == USER] == [
            "i100",
            "i101",
        ]

        await forget_user(settings, USER)
        await until(gone, "the user to be gone again")
        assert rebuilding.stop() == 0
        again = process("record")
        again.wait_for("record.ready")
        assert await gone()
        assert again.stop() == 0
    finally:
        await store.close()


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
    await asyncio.to_thread(wait_until, lambda: accounts(state).get("releases", 0) >= 1, "a release", 120)
    assert trainer.stop() == 0
    assert files_with(settings.models.folder, user.encode()) and files_with(state, user.encode())

    await forget_user(settings, user)
    again = process("train", "--state", str(state), env=env)
    await asyncio.to_thread(again.wait_for, "train.user_forgotten", 120)
    await asyncio.to_thread(
        wait_until, lambda: accounts(state)["accounts"]["received"] == len(events), "everything to be read", 120
    )
    assert again.stop() == 0
    assert files_with(settings.models.folder, user.encode()) == []
    assert files_with(state, user.encode()) == []
    assert accounts(state)["accounts"]["erased"] > 0
