"""One active trainer: a standby takes over, whoever was replaced releases nothing, and releases only go forward."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition

from schemas.errors import Fenced
from schemas.manifests import PromotionDecision
from streams.broker.clients import make_producer
from streams.broker.cluster import TRAINING_TOPICS, describe_topics
from streams.broker.leadership import Leadership
from streams.settings import Settings
from streams.stores.artifacts.registry import folder_registry, in_memory_registry
from streams.training.release_publisher import ReleasePublisher
from tests.factories.click_world import DIM, ENCODER, SMALL, World, accounts, group_offsets, produce, read_notices
from tests.factories.releases import current_id
from tests.factories.waiting import wait_until

pytestmark = pytest.mark.timeout(240)


async def test_a_restart_does_not_release_what_is_behind_the_current_release(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    world, store, state = World(), folder_registry(settings.models), tmp_path / "state"
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
    assert claimed.fence.term > before.fence.term
    behind = [manifest for manifest in store.list() if manifest.release_id not in released]
    # of the three it went past on its way; one more may lie beyond where the first had released
    assert len(behind) <= 1

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
    decided = [manifest.release_id for manifest in manifests if store.decision(manifest.release_id)]
    assert [notice.release_id for notice in notices] == decided


async def leader(settings: Settings, process: Callable[..., Any], state: Path) -> tuple[World, Any]:
    """A trainer that owns the partitions and has released once, with the world that it learns from."""
    world = World()
    await produce(settings, world=world, behaviours=world.behaviours(700))
    child = process("train", "--state", str(state), env=SMALL)
    child.wait_for("train.ready")
    wait_until(lambda: accounts(state).get("releases", 0) >= 1, "a release of the first")
    return world, child


async def test_a_second_trainer_waits_and_takes_over_when_the_first_is_killed(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    store, states = folder_registry(settings.models), [tmp_path / "a", tmp_path / "b"]
    world, first = await leader(settings, process, states[0])
    second = process("train", "--state", str(states[1]), env=SMALL)
    third = process("train", "--state", str(tmp_path / "c"), env=SMALL)
    second.wait_for("train.standby")
    third.wait_for("train.standby")
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


async def test_a_trainer_that_slept_through_its_succession_releases_nothing_and_exits(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    store, states = folder_registry(settings.models), [tmp_path / "a", tmp_path / "b"]
    world, first = await leader(settings, process, states[0])
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
    assert current_id(store) == accounts(states[1])["release_id"]
    releases = [manifest.release_id for manifest in store.list()]
    decided = [release_id for release_id in releases if store.decision(release_id) is not None]
    assert [notice.release_id for notice in await read_notices(settings)] == decided
    assert releases[: len(decided)] == decided and len(releases) <= len(decided) + 1  # one may still be compared


async def test_a_candidate_of_a_superseded_trainer_is_refused_before_anyone_could_load_it(settings: Settings) -> None:
    import torch

    from trainer.online.trainer import Candidate

    topics = settings.topics
    store = in_memory_registry()
    leadership = Leadership(
        settings.kafka,
        group=topics.group("train"),
        topic=topics.full_name("models"),
        transactional_id=topics.group("train"),
    )
    candidate = Candidate({"w": torch.zeros(2)}, 1, 1, "0" * 64, 0, 1, {}, {})
    async with leadership.candidate():
        assert await leadership.elected(asyncio.Event())
        publisher = ReleasePublisher(
            store,
            leadership,
            notices_topic=topics.full_name("models"),
            read_log=lambda: describe_topics(settings.kafka, topics, TRAINING_TOPICS),
            clock=time.time,
        )
        await publisher.take_over(encoder_version=ENCODER, dim=DIM)

        async def release(made: Candidate, offsets: dict[str, dict[int, int]]) -> None:
            published = await publisher.publish(made, offsets)
            await publisher.carry_out(published.manifest, PromotionDecision(passed=True))

        await release(candidate, {"behaviours": {0: 5}})
        assert not publisher.beyond_current({0: 5}) and publisher.beyond_current({0: 6})
        current = store.current()
        assert leadership.fence is not None
        before = await asyncio.to_thread(group_offsets, settings)
        await leadership.prove()
        assert await asyncio.to_thread(group_offsets, settings) == before  # a proof leaves nothing behind

        async with make_producer(settings.kafka, transactional_id=topics.group("train")):  # its successor
            newer = Candidate({"w": torch.ones(2)}, 2, 2, "1" * 64, 0, 2, {}, {})
            with pytest.raises(Fenced):
                await leadership.prove()
            with pytest.raises(Fenced):
                await release(newer, {"behaviours": {0: 6}})
            with pytest.raises(Fenced):  # and for good
                await leadership.transact(offsets={TopicPartition(topics.full_name("behaviours"), 0): 6})
        assert store.current() == current
    assert len(await read_notices(settings)) == 1
