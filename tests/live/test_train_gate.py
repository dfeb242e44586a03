"""What answers stays until something better was tried beside it, over real Kafka."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streams.settings import Settings
from streams.stores.artifacts.registry import folder_registry
from tests.factories.click_world import SMALL, World, accounts, produce, read_notices
from tests.factories.releases import current_id
from tests.factories.waiting import until, wait_until

pytestmark = pytest.mark.timeout(240)


async def test_a_candidate_that_is_worse_than_what_answers_is_kept_back_and_serving_stays(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    world, store, state = World(), folder_registry(settings.models), tmp_path / "state"
    gate = {"MIM_GATE__TRIAL_ROWS": "250", "MIM_GATE__MIN_TAKES": "50"}
    gate |= {"MIM_GATE__GAUC_MARGIN": "0.01", "MIM_GATE__LOG_LOSS_MARGIN": "0.03"}
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
    assert current_id(store) == before.release_id
    refused = store.list()[1]
    verdict = store.decision(refused.release_id)
    assert verdict is not None and not verdict.passed and any("log-loss" in reason for reason in verdict.reasons)
    assert verdict.against == before.release_id and verdict.rows >= 250
    assert refused.parent == before.release_id and store.load(refused.release_id)
    assert accounts(state)["releases"] == 0 and "train.refused" in wild.output()
    assert wild.stop() == 0
    assert [notice.passed for notice in await read_notices(settings)][:2] == [True, False]


async def test_a_trial_that_was_cut_short_by_a_kill_goes_on_and_is_decided_once(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    world, store, state = World(), folder_registry(settings.models), tmp_path / "state"
    env = SMALL | {"MIM_GATE__TRIAL_ROWS": "250", "MIM_GATE__LOG_LOSS_MARGIN": "9", "MIM_GATE__MIN_TAKES": "9999"}
    env |= {"MIM_TRAIN__SNAPSHOT_EVERY_EVENTS": "100"}
    events = world.behaviours(1200)  # ends within the second candidate's trial
    await produce(settings, world=world, behaviours=events)
    first = process("train", "--state", str(state), env=env)
    await asyncio.to_thread(first.wait_for, "train.on_trial", 120)
    await until(lambda: accounts(state)["accounts"]["received"] == len(events), seconds=120)
    first.kill()
    before = [manifest.release_id for manifest in store.list()]
    assert len(before) == 2 and store.decision(before[1]) is None

    second = process("train", "--state", str(state), env=env)
    await asyncio.to_thread(second.wait_for, "train.ready", 120)
    await produce(settings, behaviours=world.behaviours(300))
    await until(lambda: store.decision(before[1]), seconds=120)
    await until(lambda: accounts(state).get("releases", 0) == 1, seconds=120)
    assert second.stop() == 0
    verdict, current = store.decision(before[1]), store.current()
    assert verdict is not None and 250 <= verdict.rows < 250 + 64 and verdict.against == before[0]
    assert current is not None and current.release_id == before[1]
    assert [manifest.release_id for manifest in store.list()][:2] == before
    assert [notice.release_id for notice in await read_notices(settings)] == before
