"""From what a user searched to the trainer's row: index workers encode it, and the trainer waits for it."""

from __future__ import annotations

import asyncio
import base64
import random
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kafka.admin import NewPartitions

from schemas.behaviours import Behaviour
from schemas.queries import QueryEmbedding, query_id, query_key
from streams.broker.clients import make_admin
from streams.broker.log_reader import LogReader
from streams.settings import Settings
from streams.stores.artifacts.registry import folder_registry
from tests.factories.click_world import SMALL, Run, World, produce, train_to_the_end
from tests.factories.hostile_records import hostile_records, send_hostile
from tests.factories.item_feed import announced, feeding
from tests.factories.item_path import picture
from tests.factories.topics import read_all
from tests.factories.waiting import until

pytestmark = pytest.mark.timeout(280)

WORDS = [f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("lamp", "table", "chair")]
PHOTOS = [picture("red"), picture("blue")]
BROKEN = b"no picture at all"
SEEN = {"MIM_TRAINER__FEATURES__QUERIES": "true"}


def searching(events: list[Behaviour]) -> list[Behaviour]:
    """Every exposure with a search, and its take with the same."""
    draw, chosen = random.Random(3), dict[str, dict[str, Any]]()
    for event in events:
        if event.exposure_id is None:
            image = draw.choice([None, None, None, *PHOTOS, BROKEN])
            text = draw.choice(WORDS) if image is None else None
            photo = None if image is None else base64.b64encode(image)
            chosen[event.event_id] = {"query_text": text, "query_image": photo}
    return [
        Behaviour.model_validate(event.model_dump() | chosen[event.exposure_id or event.event_id]) for event in events
    ]


async def queries(settings: Settings) -> dict[bytes, QueryEmbedding]:
    records = await read_all(settings, "queries")
    return {record.key: QueryEmbedding.model_validate_json(record.value) for record in records}


async def test_rows_see_what_was_searched_by_words_and_by_photo(
    settings: Settings, run_command: Run, process: Callable[..., Any], tmp_path: Path
) -> None:
    world = World()
    worker = process("index", env={"OMP_NUM_THREADS": "1"})
    async with feeding(settings) as feed:
        for item in world.items:
            await feed.publish(item, f"{item} as it is")
    events = searching(world.behaviours(1000))
    await produce(settings, behaviours=events)
    await until(lambda: announced(settings), lambda found: len(found) == len(world.items))
    version = next(one.encoder_version for one in (await announced(settings)).values() if one is not None)
    names = {query_id(event.query_text, event.query_image) for event in events}
    assert len(names) == len(WORDS) + len(PHOTOS) + 1
    expected = {query_key(version, str(name)) for name in names}
    await until(lambda: queries(settings), lambda held: held.keys() == expected, seconds=90)
    found = await queries(settings)
    refused = {one.query: one.reason for one in found.values() if one.vector is None}
    assert refused.keys() == {query_id(None, BROKEN)} and "bad_image" in str(refused[str(query_id(None, BROKEN))])
    lengths = [np.linalg.norm(np.frombuffer(one.vector, "<f4")) for one in found.values() if one.vector is not None]
    assert np.allclose(lengths, 1, atol=1e-3)
    # each once: a worker that is asked again knows them
    again = searching(world.behaviours(300))
    await produce(settings, behaviours=again)
    await produce(settings, behaviours=[again[0].model_copy(update={"event_id": "z", "query_text": "the last one"})])
    await until(lambda: queries(settings), lambda held: len(held) == len(expected) + 1, seconds=60)
    assert set(Counter(record.key for record in await read_all(settings, "queries")).values()) == {1}
    assert worker.stop() == 0

    hostile = list(hostile_records("queries", embedding_version=version))
    await send_hostile(settings, hostile)
    report = train_to_the_end(run_command, env=SEEN)
    assert report["rows_trained"] == 1300 and report["given_up"] == 0
    assert report["broken_vectors"] + report["other_encoders"] == sum(one.refused for one in hostile)
    assert sum(report["offsets"]["queries"].values()) >= len(expected) + 1
    blind = train_to_the_end(run_command)
    assert blind["rows_trained"] == 1300 and blind["rows_sha256"] != report["rows_sha256"]
    assert "queries" not in blind["offsets"]

    # and a row does wait for its query: no worker is there any more that could encode this one
    unheard = searching(world.behaviours(200))
    unheard[100] = unheard[100].model_copy(update={"query_text": "never heard of", "query_image": None})
    await produce(settings, behaviours=unheard)
    waited = train_to_the_end(run_command, env=SEEN)
    assert waited["rows_trained"] == 1500 and waited["given_up"] >= 1


async def test_a_release_of_rows_with_searches_is_rebuilt_and_training_goes_on_from_its_checkpoint(
    settings: Settings, run_command: Run, process: Callable[..., Any], tmp_path: Path
) -> None:
    world, env = World(), SMALL | SEEN
    with closing(make_admin(settings.kafka)) as admin:  # a width of its own, which no other topic has
        admin.create_partitions({settings.topics.full_name("behaviours"): NewPartitions(6)})
    workers = [process("index", "--slot", slot, env={"OMP_NUM_THREADS": "1"}) for slot in ("a", "b")]
    async with feeding(settings) as feed:
        for item in world.items:
            await feed.publish(item, f"{item} as it is")
    await until(lambda: announced(settings), lambda found: len(found) == len(world.items))
    await produce(settings, behaviours=searching(world.behaviours(900)))
    await until(lambda: queries(settings), lambda held: len(held) == len(WORDS) + len(PHOTOS) + 1, seconds=90)
    done = run_command("train", "--until-end", "--state", str(tmp_path / "state"), env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train.searches_ignored" not in done.stderr + done.stdout
    release = folder_registry(settings.models).list()[-1].release_id
    for given in (env, SMALL):  # rebuilding needs no queries, whatever the settings say
        shown = run_command("trainset", "show", release, env=given)
        assert shown.returncode == 0, shown.stdout[-2000:] + shown.stderr[-2000:]

    await produce(settings, behaviours=searching(world.behaviours(300)))
    done = run_command("train", "--until-end", "--state", str(tmp_path / "state"), env=env)
    assert done.returncode == 0 and "snapshot.resumed" in done.stderr + done.stdout, done.stderr[-3000:]
    assert [worker.stop() for worker in workers] == [0, 0]
    assert all("queries.announced" in worker.output() for worker in workers)
    async with LogReader(settings.kafka, settings.topics) as reader:  # each has its share, and nothing is read again
        committed = await reader.committed("index")
        ends = {one: end for one, (_, end) in (await reader.bounds(await reader.partitions("behaviours"))).items()}
    assert len(ends) == 6 and {one: committed.get(one, 0) for one in ends} == ends
    done = run_command("train", "--until-end", "--no-release", env=SMALL)
    assert done.returncode == 0 and "train.searches_ignored" in done.stderr + done.stdout


async def test_workers_that_come_back_to_read_searches_too_get_their_partitions_at_once(
    settings: Settings, process: Callable[..., Any]
) -> None:
    def start(slot: str, reads: str) -> Any:
        worker = process("index", "--slot", slot, env={"OMP_NUM_THREADS": "1", "MIM_INDEX__QUERIES": reads})
        worker.wait_for("index.ready")
        return worker

    before = [start(slot, "false") for slot in ("a", "b")]
    await asyncio.sleep(2)  # until the second has its share
    await produce(settings, behaviours=searching(World().behaviours(300)))
    after = []
    for slot, worker in zip(("a", "b"), before, strict=True):
        assert worker.stop() == 0
        after.append(start(slot, "true"))
    await until(lambda: queries(settings), lambda held: len(held) == len(WORDS) + len(PHOTOS) + 1, seconds=20)
    assert all(worker.output().count("index.joins_anew") == 1 for worker in after)
    assert after[0].stop() == 0
    again = start("a", "true")
    assert "index.joins_anew" not in again.output()
    assert [worker.stop() for worker in (again, after[1])] == [0, 0]
