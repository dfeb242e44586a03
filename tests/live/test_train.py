"""`mimstream train` over real Kafka: the same figures from the same topics, whatever has to be waited for."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streams.settings import Settings
from streams.stack.run import RunningStack
from streams.training.scores import read_scores
from tests.factories.click_world import SMALL, Run, World, accounts, produce, train_to_the_end
from tests.factories.waiting import wait_until

pytestmark = pytest.mark.timeout(240)


async def test_two_runs_over_the_same_topics_give_the_same_figures_to_the_last_digit(
    settings: Settings, run_command: Run, tmp_path: Path
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
            run_command,
            *("--fetch-max-records", size, "--scores", str(folder), "--rows", str(folder / "rows")),
            env={"MIM_TRAIN__VARIANTS": "ciubm,din,ciubm_shuffled", "MIM_TRAIN__BUFFERED_RECORDS": size},
        )
        scores = read_scores(folder)
        assert scores is not None
        runs.append((report, (folder / "rows").read_text(), scores.scores["ciubm"].tolist()))
    assert runs[0] == runs[1] == runs[2]

    report, rows, scores_made = runs[0]
    taken = sum(event.kind.is_take for event in events)
    aside = {"late": 1, "duplicate": 1, "dead_lettered": 2, "erased": 0, "pending": 0}
    assert report["accounts"] == {"received": len(events) + 4, "trained": len(events), **aside}
    assert report["rows_trained"] == 2500 == len(rows.splitlines()) == len(scores_made)
    assert sum(line.endswith("\t1") for line in rows.splitlines()) == taken
    assert report["other_encoders"] == 1 and report["given_up"] == 0 and report["releases"] == 0
    assert sum(report["offsets"]["behaviours"].values()) == len(events) + 4
    assert not settings.models.folder.exists()
    assert np.mean(scores_made[-500:]) > 0.1  # and it says something: see the next test


async def test_content_helps_and_shuffled_content_does_not(settings: Settings, run_command: Run) -> None:
    world = World(items=300, users=150)
    await produce(settings, world=world, behaviours=world.behaviours(8000))
    report = train_to_the_end(run_command, "--variants", "ciubm,din,ciubm_shuffled")
    gauc = {variant: buckets["overall"]["gauc"] for variant, buckets in report["prequential"].items()}
    assert gauc["ciubm"] > 0.55 and gauc["ciubm"] > gauc["ciubm_shuffled"] + 0.02, gauc


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
    trainer = process(
        "train",
        "--state",
        str(state),
        env={**SMALL, "MIM_TRAIN__IDLE_SECONDS": "5", "MIM_TRAIN__ALL_IDLE_SECONDS": "5"},
    )
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
