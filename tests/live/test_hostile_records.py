"""Hostile records on every topic that is read: each process stays, reads on, and says what it refused."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from schemas.letters import DeadLetter
from streams.broker.topics import TOPICS, TopicName
from streams.settings import Settings
from tests.factories.click_world import SMALL, START, Run, World, accounts, produce
from tests.factories.hostile_records import hostile_records, send_hostile
from tests.factories.index_worker import ONE_THREAD, Start, start_index
from tests.factories.item_feed import announced, center, feeding, held
from tests.factories.samples import behaviour
from tests.factories.topics import read_all
from tests.factories.waiting import until
from trainer.features.state_records import StateCopies

EAGER = SMALL | {"MIM_TRAINER__BATCH_ROWS": "32", "MIM_TRAINER__RELEASE_EVERY_ROWS": "64"}


async def states(settings: Settings) -> StateCopies:
    """What a server makes of `item-states`."""
    copies = StateCopies(settings.trainer.features)
    for record in await read_all(settings, "item-states"):
        with suppress(ValueError):
            copies.apply(record.key, record.value)
    return copies


def counted(process: Any, event: str) -> int:
    return int(process.output().count(event))


@pytest.mark.timeout(280)
async def test_every_process_reads_on_behind_hostile_records_and_each_of_them_is_told(
    settings: Settings, process: Start, run_command: Run, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    running = {"index": start_index(process)}
    running["record"] = process("record")
    running["train"] = process("train", "--state", str(state), env=EAGER)
    running["serve"] = process("serve", "--port", "0", env=ONE_THREAD)
    for name, child in running.items():
        await asyncio.to_thread(child.wait_for, f"{name}.ready", 120)
    world = World(items=12, users=6)
    async with feeding(settings) as feed, center(settings) as index:
        for item_id in world.items:
            await feed.publish(item_id, f"before {item_id}", published_at=START.isoformat())
        await until(lambda: held(index, feed.ever), lambda rows: set(rows) == feed.ever)
        await until(lambda: announced(settings), lambda known: set(known) == feed.ever)
        version = (await read_all(settings, "embeddings"))[0].key.decode().partition(":")[0]

        hostile = [
            one
            for topic in TOPICS
            for one in hostile_records(topic, embedding_version=version, features=settings.trainer.features)
        ]
        places = await send_hostile(settings, hostile)

        await feed.publish("last", "a good one at the end", published_at=START.isoformat())
        await until(lambda: held(index, {"last"}))
        events = world.behaviours(150)
        second = events[-1].occurred_at.timestamp() - behaviour("x").occurred_at.timestamp() + 5
        events.append(behaviour("the last", "click", user="user0", item="last", second=second))
        await produce(settings, behaviours=events)

    def refused(*topics: TopicName) -> set[tuple[str, int, int]]:
        return {(one.topic, *places[n]) for n, one in enumerate(hostile) if one.refused and one.topic in topics}

    wanted = refused("items", "items-retry", "behaviours")

    async def buried() -> set[tuple[str, int, int]]:
        found = set()
        for record in await read_all(settings, "dead-letters"):
            with suppress(KeyError, ValueError):  # there are hostile ones among them too
                letter = DeadLetter.from_record(record.value, record.headers)
                found.add((letter.topic, letter.partition, letter.offset))
        return found

    await until(buried, lambda found: found >= wanted)
    assert await buried() == wanted

    total = len(await read_all(settings, "behaviours"))
    await until(
        lambda: accounts(state), lambda now: now["accounts"]["received"] == total and now.get("releases", 0) > 0
    )
    report = accounts(state)
    assert report["accounts"]["dead_lettered"] == len(refused("behaviours"))
    assert report["broken_vectors"] + report["other_encoders"] == len(refused("embeddings"))

    base = re.search(r"http://127\.0\.0\.1:\d+", running["serve"].output())
    assert base is not None
    async with aiohttp.ClientSession(base.group()) as session:

        async def scored() -> Any:
            asked = {"user_id": "user0", "item_ids": ["last", "n"], "at": (START + timedelta(days=1)).isoformat()}
            async with session.post("/v1/score", json=asked) as answer:
                return await answer.json()

        await until(scored, lambda answer: "scores" in answer and answer["history_length"] > 0)
        answer = await scored()
        assert [one["has_vector"] for one in answer["scores"]] == [True, False]

        told: dict[str, tuple[str, TopicName]]
        told = {"states.unreadable": ("serve", "item-states"), "train.skew_unreadable": ("train", "skew")}
        for event, (name, topic) in told.items():
            count, wished = partial(counted, running[name], event), len(refused(topic))
            await until(count, lambda found, wished=wished: found >= wished)
            assert count() == wished
        for name in ("record", "train"):
            assert running[name].output().count("forgotten.unreadable") == len(refused("forgotten"))
        assert running["serve"].output().count("representations.unreadable") == len(refused("embeddings"))

        trainer = running.pop("train")
        assert trainer.stop() == 0
        assert "Traceback" not in trainer.output()
        releases = json.loads(run_command("models", "list", "--json").stdout)
        current = next(one["release_id"] for one in releases if one["state"] == "current")
        written = await states(settings)
        head = written.head
        assert head is not None and len(written) > 0

        async def served() -> tuple[str, float]:
            answer = await scored()
            async with session.get("/metrics") as page:
                number = re.search(r"^mim_states_number (\S+)$", await page.text(), re.MULTILINE)
            return answer["release_id"], float(number[1]) if number else 0.0

        await until(served, lambda found: found == (current, head.number))
        answer = await scored()
        again = [one for one in hostile if one.topic in ("item-states", "skew")]
        await send_hostile(settings, again)
        count = partial(counted, running["serve"], "states.unreadable")
        await until(count, lambda found: found == 2 * len(refused("item-states")))
        assert await scored() == answer
        async with session.get("/readyz") as ready:
            assert (ready.status, (await ready.json())["unconfirmed"]) == (200, [])

    shown, plain = run_command("skew"), run_command("skew", "--json")
    assert shown.returncode == plain.returncode < 2
    assert shown.stdout.replace("\n", "").isprintable()
    assert json.loads(plain.stdout, parse_constant=pytest.fail)["comparisons"] >= 2
    listed = run_command("dead-letters", "list", "--json")
    assert listed.returncode == 0
    assert {entry["topic"] for entry in json.loads(listed.stdout)} == {"items", "items-retry", "behaviours"}
    for name, child in running.items():
        assert child.returncode is None, name
        assert "Traceback" not in child.output(), name
        assert child.stop() == 0, name
