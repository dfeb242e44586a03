"""A trainer that is killed goes on from its newest snapshot, over real Kafka, as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from schemas.manifests import ModelManifest
from streams.settings import Settings
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.artifacts.registry import folder_registry
from streams.wiring.training import make_checkpoint_store
from tests.factories.click_world import SMALL, START, Run, World, accounts, produce, train_to_the_end
from tests.factories.topics import delete_records
from tests.factories.waiting import wait_until

pytestmark = pytest.mark.timeout(290)

RESUMABLE = {
    **SMALL,
    "MIM_TRAIN__SNAPSHOT_EVERY_EVENTS": "700",
    "MIM_TRAIN__SESSION_TIMEOUT_MS": "6000",
    "MIM_TRAIN__KEEP_SNAPSHOTS": "50",
    "MIM_MODELS__KEEP_RELEASES": "100",
    "MIM_TRAINER__MODEL__DROPOUT": "0.1",
    "MIM_GATE__GAUC_MARGIN": "1",
    "MIM_GATE__LOG_LOSS_MARGIN": "9",
}


def what_was_learned(manifest: ModelManifest) -> tuple[Any, ...]:
    told = manifest.model_dump(exclude={"release_id", "parent", "created_at", "fence"})
    return tuple(sorted(told.items(), key=lambda item: item[0]))


def releases(folder: Path) -> list[ModelManifest]:
    return list(folder_registry(ModelStoreConfig(folder=folder)).list())


async def test_training_killed_twice_makes_the_releases_of_a_run_that_nobody_disturbed(
    settings: Settings, run_command: Run, process: Callable[..., Any], tmp_path: Path
) -> None:
    world = World(items=200, users=100)
    events = world.behaviours(3000)
    await produce(settings, world=world, behaviours=events[:2500])
    undisturbed = tmp_path / "undisturbed"

    def disturbed(state: str) -> Any:
        return process("train", "--state", str(tmp_path / state), env=RESUMABLE)

    first = disturbed("a")
    wait_until(lambda: len(releases(settings.models.folder)) >= 1, "a release")
    first.kill()
    second = disturbed("b")
    second.wait_for("snapshot.resumed")
    wait_until(lambda: len(releases(settings.models.folder)) >= 2, "further releases")
    second.kill()
    await produce(settings, behaviours=events[2500:])
    third = disturbed("c")
    wait_until(lambda: accounts(tmp_path / "c")["accounts"]["received"] >= len(events), "all to be read")
    wait_until(lambda: len(releases(settings.models.folder)) >= 5, "the releases")
    wait_until(lambda: accounts(tmp_path / "c")["accounts"]["pending"] < 300, "all to be trained")
    assert third.stop() == 0
    final = accounts(tmp_path / "c")
    assert final["accounts"]["received"] == len(events) and final["accounts"]["late"] == 0

    own = {"MIM_MODELS__FOLDER": str(undisturbed), "MIM_TRAIN__SNAPSHOT_EVERY_EVENTS": "1000000"}
    done = run_command("train", "--until-end", "--state", str(tmp_path / "d"), env=RESUMABLE | own)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = releases(settings.models.folder), releases(undisturbed)
    assert len(ours) >= 5
    for mine, yours in zip(ours, theirs, strict=False):
        assert what_was_learned(mine) == what_was_learned(yours)
    assert [manifest.rows_trained for manifest in ours] == [512 * n for n in range(1, len(ours) + 1)]


async def test_a_stopped_trainer_has_nothing_to_do_again_and_refuses_what_its_snapshot_does_not_belong_to(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    world, state = World(), tmp_path / "s"
    events = world.behaviours(800)
    await produce(settings, world=world, behaviours=events)
    first = process("train", "--state", str(state), env=RESUMABLE)
    wait_until(lambda: accounts(state)["accounts"]["received"] == len(events), "the log to be read")
    assert first.stop() == 0
    before = accounts(state)
    store = make_checkpoint_store(settings)
    assert store.current_id() == store.kept()[-1].snapshot_id
    assert sum(store.kept()[-1].offsets["behaviours"].values()) == before["accounts"]["received"]

    again = process("train", "--state", str(state), env=RESUMABLE)
    again.wait_for("train.ready")
    assert "snapshot.resumed" in again.output()
    wait_until(lambda: accounts(state)["updated_at"] > before["updated_at"], "a report")
    assert again.stop() == 0
    after = accounts(state)
    assert after["accounts"]["received"] == before["accounts"]["received"] and after["steps"] >= before["steps"]

    def refused(**env: str) -> str:
        child = process("train", "--state", str(tmp_path / "t"), env={**RESUMABLE, **env})
        assert child.wait(60) == 2, child.output()[-2000:]
        output: str = child.output()
        return output

    told = refused(MIM_TRAINER__LEARNER__LEARNING_RATE="0.5")
    assert "MIM_TRAINER__LEARNER__LEARNING_RATE was 0.004, is 0.5" in told and "MIM_TRAIN__SNAPSHOT_FOLDER" in told
    assert "MIM_TRAIN__ENCODER_VERSION" in refused(MIM_TRAIN__ENCODER_VERSION="another")
    await produce(settings, behaviours=world.behaviours(300))
    delete_records(settings, "behaviours", before=-1)
    assert "are gone" in refused()


async def test_event_time_and_offsets_cut_the_log_into_spans_that_lose_and_repeat_nothing(
    settings: Settings, run_command: Run, process: Callable[..., Any], tmp_path: Path
) -> None:
    world = World()
    events = world.behaviours(2400)
    await produce(settings, world=world, behaviours=events)
    moment = START + timedelta(seconds=1500)
    rows, offsets = tmp_path / "rows", tmp_path / "offsets.json"
    before = train_to_the_end(run_command, "--until", moment.isoformat(), "--rows", str(rows))
    trained_at = [int(line.split("\t")[2]) for line in rows.read_text().splitlines()]
    assert max(trained_at) < moment.timestamp() <= max(trained_at) + 10
    offsets.write_text(json.dumps(before["offsets"]))

    after = train_to_the_end(run_command, "--from", moment.isoformat(), "--rows", str(rows))
    assert int(rows.read_text().split("\t")[2]) >= moment.timestamp() - 2  # clicks come two seconds later
    assert before["accounts"]["received"] + after["accounts"]["received"] == len(events)
    again = train_to_the_end(run_command, "--from-offsets", str(offsets))
    assert again["rows_sha256"] == after["rows_sha256"] and again["weights_sha256"] == after["weights_sha256"]

    for wrong in ("yesterday", "2026-09-16T00:00"):
        child = process("train", "--no-release", "--from", wrong, env=SMALL)
        assert child.wait(60) == 2 and "2026-09-16T00:00Z" in child.output()
