"""`mimstream train` over real Kafka: same figures from the same topics, one active trainer, releases in order."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka import TopicPartition

from schemas.behaviours import Behaviour, BehaviourKind
from schemas.errors import Fenced
from schemas.items import ItemEmbedding, SourceOffset, embedding_key
from schemas.manifests import GateVerdict, ReleaseNotice
from streams.broker import make_admin, make_consumer, make_producer
from streams.consumers.leadership import Leadership
from streams.consumers.releasing import Releaser
from streams.consumers.train_input import describe_input
from streams.consumers.train_ledger import read_scores
from streams.settings import Settings, environment_of
from streams.stack.running import RunningStack
from streams.stores.models import FolderModelStore, InMemoryModelStore

pytestmark = pytest.mark.timeout(240)

DIM = 16
ENCODER = "test-encoder.1"
START = datetime(2025, 3, 1, tzinfo=UTC)
SMALL = {
    "OMP_NUM_THREADS": "1",
    "MIM_TRAINER__BATCH_ROWS": "64",
    "MIM_TRAINER__RELEASE_EVERY_ROWS": "500",
    "MIM_TRAINER__SPACE_NEGATIVES": "32",
    "MIM_TRAINER__TIME_NEGATIVES": "32",
    "MIM_TRAIN__IDLE_SECONDS": "1",
    "MIM_TRAIN__COMMIT_INTERVAL_SECONDS": "0.5",
}


class World:
    """Items with unit vectors, users with a taste: what is close to a user's taste is clicked more often."""

    def __init__(self, *, items: int = 60, users: int = 40, seed: int = 1) -> None:
        numbers = np.random.default_rng(seed)
        self.rng = random.Random(seed)
        vectors = numbers.normal(size=(items, DIM))
        self.items = {f"item{i}": v / np.linalg.norm(v) for i, v in enumerate(vectors)}
        tastes = numbers.normal(size=(users, DIM))
        self.users = {f"user{i}": v / np.linalg.norm(v) for i, v in enumerate(tastes)}
        self.second = 0
        self.number = 0

    def behaviours(self, exposures: int) -> list[Behaviour]:
        """Exposures a second apart, each followed by its click where there is one."""
        events = []
        for _ in range(exposures):
            user, item = self.rng.choice(list(self.users)), self.rng.choice(list(self.items))
            self.second += 1
            self.number += 1
            exposure = Behaviour(
                event_id=f"x{self.number}",
                kind=BehaviourKind.EXPOSURE,
                user_id=user,
                item_id=item,
                occurred_at=START + timedelta(seconds=self.second),
            )
            events.append(exposure)
            if self.rng.random() < 1 / (1 + np.exp(-8 * float(self.users[user] @ self.items[item]))):
                took: dict[str, object] = {
                    "event_id": f"c{self.number}",
                    "kind": BehaviourKind.CLICK,
                    "exposure_id": exposure.event_id,
                }
                took["occurred_at"] = exposure.occurred_at + timedelta(seconds=2)
                events.append(exposure.model_copy(update=took))
        return events

    def embedding(self, item_id: str, *, encoder: str = ENCODER) -> ItemEmbedding:
        return ItemEmbedding(
            item_id=item_id,
            encoder_version=encoder,
            vector=b64encode(self.items[item_id].astype("<f4").tobytes()),
            dim=DIM,
            content_hash=f"hash-{item_id}",
            published_at=START,
            source=SourceOffset(partition=0, offset=0),
        )


async def produce(
    settings: Settings,
    *,
    world: World | None = None,
    vectors_of: list[str] | None = None,
    behaviours: list[Behaviour] | None = None,
    raw: list[tuple[bytes | None, bytes]] | None = None,
    encoder: str = ENCODER,
) -> None:
    topics = settings.topics
    async with make_producer(settings.kafka) as producer:
        sends = []
        if world is not None:
            for item_id in world.items if vectors_of is None else vectors_of:
                value = world.embedding(item_id, encoder=encoder).model_dump_json().encode()
                sends.append(
                    await producer.send(topics.full_name("embeddings"), value, key=embedding_key(encoder, item_id))
                )
        for event in behaviours or []:
            value = event.model_dump_json().encode()
            sends.append(await producer.send(topics.full_name("behaviours"), value, key=event.user_id.encode()))
        for key, value in raw or []:
            sends.append(await producer.send(topics.full_name("behaviours"), value, key=key))
        await asyncio.gather(*sends)


def train_to_the_end(values: dict[str, Any], *arguments: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "streams", "train", "--until-end", "--no-release", "--json", *arguments],
        env={**os.environ, **environment_of(values), **SMALL, **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def wait_until(condition: Callable[[], Any], what: str, timeout_seconds: float = 100.0) -> Any:
    deadline = time.monotonic() + timeout_seconds
    while True:
        if found := condition():
            return found
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.1)


def accounts(state: Path) -> dict[str, Any]:
    path = state / "accounts.json"
    return json.loads(path.read_text()) if path.exists() else {"accounts": {"received": 0, "trained": 0}, "steps": 0}


async def test_two_runs_over_the_same_topics_give_the_same_figures_to_the_last_digit(
    settings: Settings, settings_values: dict[str, Any], tmp_path: Path
) -> None:
    world = World()
    events = world.behaviours(2500)
    late = events[100].model_copy(update={"event_id": "late"})
    await produce(settings, world=world)
    await produce(settings, world=world, encoder="another-encoder", vectors_of=["item1"])
    await produce(settings, behaviours=events)
    await produce(
        settings,
        behaviours=[late, events[-1]],
        raw=[(b"user1", b"{"), (b"user2", events[0].model_dump_json().encode())],
    )

    runs = []
    for name, size in (("a", "5000"), ("b", "7"), ("c", "333")):
        folder = tmp_path / name
        folder.mkdir()
        report = train_to_the_end(
            settings_values,
            *("--fetch-max-records", size, "--scores", str(folder), "--rows", str(folder / "rows")),
            env={"MIM_TRAIN__VARIANTS": "ciubm,din,ciubm_shuffled", "MIM_TRAIN__BUFFERED_RECORDS": size},
        )
        scores = read_scores(folder)
        assert scores is not None
        runs.append((report, (folder / "rows").read_text(), scores.scores["ciubm"].tolist()))
    assert runs[0] == runs[1] == runs[2]

    report, rows, scores_made = runs[0]
    taken = sum(event.kind.is_take for event in events)
    assert report["accounts"] == {
        "received": len(events) + 4,
        "trained": len(events),
        "late": 1,
        "duplicate": 1,
        "dead_lettered": 2,
        "erased": 0,
        "pending": 0,
    }
    assert report["rows_trained"] == 2500 == len(rows.splitlines()) == len(scores_made)
    assert sum(line.endswith("\t1") for line in rows.splitlines()) == taken
    assert report["other_encoders"] == 1 and report["given_up"] == 0 and report["releases"] == 0
    assert sum(report["offsets"]["behaviours"].values()) == len(events) + 4
    assert not settings.models.folder.exists()
    assert np.mean(scores_made[-500:]) > 0.1  # and it says something: see the next test


async def test_content_helps_and_shuffled_content_does_not(settings: Settings, settings_values: dict[str, Any]) -> None:
    world = World(items=300, users=150)
    await produce(settings, world=world, behaviours=world.behaviours(8000))
    report = train_to_the_end(settings_values, "--variants", "ciubm,din,ciubm_shuffled")
    gauc = {variant: buckets["overall"]["gauc"] for variant, buckets in report["prequential"].items()}
    assert gauc["ciubm"] > 0.55 and gauc["ciubm"] > gauc["ciubm_shuffled"] + 0.02, gauc


async def test_a_restart_does_not_release_what_is_behind_the_current_release(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    world, store, state = World(), FolderModelStore(settings.models), tmp_path / "state"
    await produce(settings, world=world, behaviours=world.behaviours(1800))
    first = process("train", "--state", str(state), env=SMALL)
    first.wait_for("train.ready")
    wait_until(lambda: accounts(state).get("releases", 0) >= 3, "three releases")
    trained = accounts(state)["accounts"]["trained"]
    assert first.stop() == 0
    before, released = store.current(), [manifest.release_id for manifest in store.list()]
    assert before is not None and before.release_id == released[-1]

    state = tmp_path / "state-of-second"
    second = process("train", "--state", str(state), env=SMALL)
    second.wait_for("train.ready")
    wait_until(lambda: accounts(state)["accounts"]["trained"] >= trained, "the same state")
    claimed = store.current()
    assert claimed is not None and claimed.fence is not None and before.fence is not None
    assert claimed.fence.as_pair() > before.fence.as_pair()
    behind = [manifest for manifest in store.list() if manifest.release_id not in released]
    assert (
        len(behind) <= 1
    )  # of the three it went past on its way; one more may lie beyond where the first had released

    await produce(settings, behaviours=world.behaviours(900))
    wait_until(lambda: accounts(state)["releases"] >= 1 + len(behind), "a release beyond")
    assert second.stop() == 0
    manifests = store.list()
    assert [manifest.release_id for manifest in manifests[: len(released)]] == released
    for older, newer in pairwise(manifests):
        assert newer.parent == older.release_id and newer.rows_trained > older.rows_trained
        assert int(newer.release_id[1:7]) == int(older.release_id[1:7]) + 1
        for partition, offset in older.offsets["behaviours"].items():
            assert newer.offsets["behaviours"][partition] >= offset
    assert manifests[-1].cluster_id and set(manifests[-1].topic_ids) == {"embeddings", "behaviours"}
    assert sum(manifests[-1].offsets["embeddings"].values()) == len(world.items)

    notices = await read_notices(settings)
    assert [notice.release_id for notice in notices] == [manifest.release_id for manifest in manifests]


async def read_notices(settings: Settings) -> list[ReleaseNotice]:
    partition = TopicPartition(settings.topics.full_name("models"), 0)
    consumer = make_consumer(settings.kafka)
    await consumer.start()
    try:
        consumer.assign([partition])
        consumer.seek(partition, 0)
        found: list[ReleaseNotice] = []
        end = (await consumer.end_offsets([partition]))[partition]
        while await consumer.position(partition) < end:
            for record in (await consumer.getmany(timeout_ms=200)).get(partition, []):
                found.append(ReleaseNotice.model_validate_json(record.value))
        return found
    finally:
        await consumer.stop()


async def test_a_second_trainer_waits_and_takes_over_when_the_first_is_killed(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    world, store = World(), FolderModelStore(settings.models)
    states = [tmp_path / "a", tmp_path / "b"]
    await produce(settings, world=world, behaviours=world.behaviours(700))
    first = process("train", "--state", str(states[0]), env=SMALL)
    first.wait_for("train.ready")
    second = process("train", "--state", str(states[1]), env=SMALL)
    third = process("train", "--state", str(tmp_path / "c"), env=SMALL)
    second.wait_for("train.standby")
    third.wait_for("train.standby")
    wait_until(lambda: accounts(states[0]).get("releases", 0) >= 1, "a release of the first")
    committed = wait_until(lambda: group_offsets(settings), "committed offsets")
    assert all(topic == settings.topics.full_name("behaviours") for topic, _ in committed)
    assert "train.elected" not in second.output() + third.output()
    assert first.returncode is None  # the newcomers did not unseat it

    first.kill()
    killed_at = time.monotonic()
    wait_until(lambda: "train.elected" in second.output() + third.output(), "a successor")
    print("taken over after", time.monotonic() - killed_at)
    before = store.current()
    await produce(settings, behaviours=world.behaviours(900))
    wait_until(lambda: (now := store.current()) and before and now.release_id != before.release_id, "a new release")
    elected = [child for child in (second, third) if "train.elected" in child.output()]
    assert len(elected) == 1 and elected[0].returncode is None
    assert second.stop() == 0 and third.stop() == 0


def group_offsets(settings: Settings) -> dict[tuple[str, int], int]:
    admin = make_admin(settings.kafka)
    try:
        found = admin.list_group_offsets(settings.topics.group("train"))[settings.topics.group("train")]
        return {(partition.topic, partition.partition): value.offset for partition, value in found.items()}
    finally:
        admin.close()


async def test_a_trainer_that_slept_through_its_succession_releases_nothing_and_exits(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    world, store = World(), FolderModelStore(settings.models)
    states = [tmp_path / "a", tmp_path / "b"]
    await produce(settings, world=world, behaviours=world.behaviours(700))
    first = process("train", "--state", str(states[0]), env=SMALL)
    first.wait_for("train.ready")
    wait_until(lambda: accounts(states[0]).get("releases", 0) >= 1, "a release of the first")
    second = process("train", "--state", str(states[1]), env=SMALL)
    second.wait_for("train.standby")

    first.send_signal(signal.SIGSTOP)
    second.wait_for("train.ready", 60)
    await produce(settings, behaviours=world.behaviours(900))  # the first would have something to release, too
    wait_until(lambda: accounts(states[1]).get("releases", 0) >= 1, "a release of the second")
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 4
    assert "another process" in first.output()
    wait_until(lambda: accounts(states[1])["accounts"]["pending"] < 200, "the second to be through")
    assert second.stop() == 0
    current = store.current()
    assert current is not None and current.release_id == accounts(states[1])["release_id"]
    assert [notice.release_id for notice in await read_notices(settings)] == [m.release_id for m in store.list()]


async def test_a_candidate_of_a_superseded_trainer_is_refused_before_anyone_could_load_it(settings: Settings) -> None:
    import torch

    from trainer.online import Candidate

    topics = settings.topics
    store = InMemoryModelStore()
    leadership = Leadership(
        settings.kafka,
        group=topics.group("train"),
        topic=topics.full_name("models"),
        transactional_id=topics.group("train"),
    )
    candidate = Candidate({"w": torch.zeros(2)}, 1, 1, "0" * 64, 0, 1, {}, {})
    async with leadership.candidate():
        assert await leadership.elected(asyncio.Event())
        releaser = Releaser(
            store,
            leadership,
            notices_topic=topics.full_name("models"),
            read_log=lambda: describe_input(settings.kafka, topics),
            encoder_version=ENCODER,
            dim=DIM,
            clock=time.time,
        )
        await releaser.take_over()

        async def release(made: Candidate, offsets: dict[str, dict[int, int]]) -> None:
            published = await releaser.publish(made, offsets)
            await releaser.carry_out(published.manifest, GateVerdict(passed=True))

        await release(candidate, {"behaviours": {0: 5}})
        assert not releaser.beyond_current({0: 5}) and releaser.beyond_current({0: 6})
        current = store.current()

        successor = make_producer(settings.kafka, transactional_id=topics.group("train"))
        await successor.start()
        try:
            newer = Candidate({"w": torch.ones(2)}, 2, 2, "1" * 64, 0, 2, {}, {})
            with pytest.raises(Fenced):
                await release(newer, {"behaviours": {0: 6}})
            with pytest.raises(Fenced):  # and for good
                await leadership.transact(offsets={TopicPartition(topics.full_name("behaviours"), 0): 6})
        finally:
            await successor.stop()
        assert store.current() == current
    assert len(await read_notices(settings)) == 1


async def test_a_candidate_that_is_worse_than_what_answers_is_kept_back_and_serving_stays(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    world, store, state = World(), FolderModelStore(settings.models), tmp_path / "state"
    gate = {"MIM_GATE__TRIAL_ROWS": "250", "MIM_GATE__MIN_TAKES": "50"}
    await produce(settings, world=world, behaviours=world.behaviours(700))
    good = process("train", "--state", str(state), env=SMALL | gate)
    wait_until(lambda: accounts(state).get("releases", 0) >= 1, "a first release", 120)
    assert good.stop() == 0
    before = store.current()
    assert before is not None

    wild = process("train", "--state", str(state), env=SMALL | gate | {"MIM_TRAINER__LEARNER__LEARNING_RATE": "2"})
    refused_to_go_on = wild.wait(120)
    assert refused_to_go_on == 2, wild.output()  # another configuration than the snapshot's
    shutil.rmtree(settings.models.folder / "training")
    wild = process("train", "--state", str(state), env=SMALL | gate | {"MIM_TRAINER__LEARNER__LEARNING_RATE": "2"})
    wild.wait_for("train.ready")
    await produce(settings, behaviours=world.behaviours(1400))
    wait_until(lambda: accounts(state).get("refused", 0) >= 1, "a refusal", 120)
    current = store.current()
    assert current is not None and current.release_id == before.release_id
    refused = store.list()[1]
    verdict = store.verdict(refused.release_id)
    assert verdict is not None and not verdict.passed and any("log-loss" in reason for reason in verdict.reasons)
    assert verdict.against == before.release_id and verdict.rows >= 250
    assert refused.parent == before.release_id and store.load(refused.release_id)
    assert accounts(state)["releases"] == 0 and "train.refused" in wild.output()
    assert wild.stop() == 0
    assert [notice.passed for notice in await read_notices(settings)][:2] == [True, False]


async def test_a_trial_that_was_cut_short_by_a_kill_goes_on_and_is_decided_once(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    world, store, state = World(), FolderModelStore(settings.models), tmp_path / "state"
    env = SMALL | {"MIM_GATE__TRIAL_ROWS": "250", "MIM_GATE__LOG_LOSS_MARGIN": "9", "MIM_GATE__MIN_TAKES": "9999"}
    env |= {"MIM_TRAIN__SNAPSHOT_EVERY_EVENTS": "100"}
    events = world.behaviours(1200)  # ends within the second candidate's trial
    await produce(settings, world=world, behaviours=events)
    first = process("train", "--state", str(state), env=env)
    await asyncio.to_thread(first.wait_for, "train.on_trial", 120)
    await asyncio.to_thread(
        wait_until, lambda: accounts(state)["accounts"]["received"] == len(events), "everything to be read", 120
    )
    first.kill()
    before = [manifest.release_id for manifest in store.list()]
    assert len(before) == 2 and store.verdict(before[1]) is None

    second = process("train", "--state", str(state), env=env)
    await asyncio.to_thread(second.wait_for, "train.ready", 120)
    await produce(settings, behaviours=world.behaviours(300))
    await asyncio.to_thread(wait_until, lambda: store.verdict(before[1]), "the verdict", 120)
    await asyncio.to_thread(wait_until, lambda: accounts(state).get("releases", 0) == 1, "the promotion", 120)
    assert second.stop() == 0
    verdict, current = store.verdict(before[1]), store.current()
    assert verdict is not None and 250 <= verdict.rows < 250 + 64 and verdict.against == before[0]
    assert current is not None and current.release_id == before[1]
    assert [manifest.release_id for manifest in store.list()][:2] == before
    assert [notice.release_id for notice in await read_notices(settings)] == before


async def test_the_stream_waits_for_a_vector_and_gives_up_when_it_does_not_come(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    world, state = World(), tmp_path / "state"
    missing, never = "item3", "item4"
    await produce(settings, world=world, vectors_of=[i for i in world.items if i not in (missing, never)])
    trainer = process("train", "--state", str(state), env={**SMALL, "MIM_TRAIN__HOLD_SECONDS": "20"})
    trainer.wait_for("train.ready")
    world.rng = random.Random(5)
    await produce(settings, behaviours=world.behaviours(1000))
    held = wait_until(
        lambda: (now := accounts(state)).get("waiting_for", 0) and now["accounts"]["pending"] > 500 and now, "a hold"
    )
    assert held["given_up"] == 0 and held["steps"] <= 2  # one of the first few rows is on an item without a vector
    await produce(settings, world=world, vectors_of=[missing])
    wait_until(lambda: accounts(state)["given_up"] == 1, "the other one to be given up", 60)
    wait_until(lambda: accounts(state)["accounts"]["pending"] < 200, "the rest to be trained")
    assert accounts(state)["waiting_for"] == 0
    assert trainer.stop() == 0


async def test_training_goes_on_after_the_broker_was_killed(
    settings: Settings, process: Callable[..., Any], stack: RunningStack, tmp_path: Path
) -> None:
    world, state = World(), tmp_path / "state"
    await produce(settings, world=world, behaviours=world.behaviours(700))
    trainer = process("train", "--state", str(state), env={**SMALL, "MIM_TRAIN__IDLE_SECONDS": "5"})
    wait_until(lambda: accounts(state).get("releases", 0) >= 1, "a release")
    stack.kill("kafka")
    stack.wait_ready("kafka")
    events = world.behaviours(900)
    await produce(settings, behaviours=events)
    wait_until(lambda: accounts(state)["accounts"]["received"] >= 700 + len(events), "everything to be read")
    wait_until(lambda: accounts(state).get("releases", 0) >= 2, "another release")
    assert accounts(state)["accounts"]["late"] == 0
    assert trainer.stop() == 0


async def test_a_topic_that_does_not_exist_and_a_variant_that_is_unknown_are_named(
    settings: Settings, process: Callable[..., Any]
) -> None:
    child = process("train", env={**SMALL, "MIM_TOPICS__PREFIX": "nowhere."})
    assert child.wait(60) == 2 and "topics create" in child.output()
    await produce(settings, world=World())
    child = process("train", "--variants", "ciubm,dim", "--no-release", "--until-end", env=SMALL)
    assert child.wait(60) == 2 and "--variants" in child.output()
