"""`mimstream models` beside a trainer that runs: the user's choice stays until it is unpinned, and servers follow."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streams.serving.model_watcher import ModelWatcher
from streams.settings import Settings
from streams.stores.artifacts.registry import folder_registry
from streams.wiring.serving import make_scorer
from tests.factories.click_world import ENCODER, SMALL, World, accounts, produce, read_notices
from tests.factories.waiting import until, wait_until
from trainer.features.config import FeatureConfig

pytestmark = pytest.mark.timeout(240)


async def test_a_rollback_beside_a_running_trainer_holds_until_it_is_unpinned_and_servers_follow(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    def models(*arguments: str) -> Any:
        done = process("--log-level", "error", "models", *arguments, "--json", cold=True)
        assert done.wait(60) == 0, done.output()
        return json.loads(done.output())

    world, store, state = World(), folder_registry(settings.models), tmp_path / "state"
    await produce(settings, world=world, behaviours=world.behaviours(1400))
    trainer = process("train", "--state", str(state), env=SMALL)
    wait_until(lambda: accounts(state).get("releases", 0) >= 2, "two releases", 120)
    watcher = ModelWatcher(
        store, make_scorer, encoder_version=ENCODER, features=FeatureConfig().version, poll_seconds=0.2
    )
    stop = asyncio.Event()
    watching = asyncio.create_task(watcher.run(stop))

    async def answers(release_id: str) -> None:
        await until(lambda: watcher.current and watcher.current.manifest.release_id == release_id, seconds=30)

    try:
        first, second = (manifest.release_id for manifest in store.list()[:2])
        await answers(second)
        after = await asyncio.to_thread(models, "rollback", "--why", "second thoughts")
        assert after["release_id"] == first and after["pinned"] and after["announced"]
        await answers(first)

        await produce(settings, behaviours=world.behaviours(700))
        await until(lambda: accounts(state).get("held", 0) >= 1, seconds=120)
        current = store.current()
        assert current is not None and current.release_id == first and trainer.returncode is None
        listed = await asyncio.to_thread(models, "list")
        assert [row["state"] for row in listed][:2] == ["current", "superseded"] and listed[0]["pinned"]
        assert listed[-1]["state"] == "candidate"

        await asyncio.to_thread(models, "unpin")
        await produce(settings, behaviours=world.behaviours(700))
        await until(store.current, lambda now: now and now.release_id not in (first, second), seconds=120)
        after_unpin = next(p for p in store.history() if p.release_id not in (first, second))
        assert store.manifest(after_unpin.release_id).parent == first
        # releases follow each other: whichever is current in the end
        await until(
            lambda: (store.current(), watcher.current),
            lambda found: all(found) and found[0].release_id == found[1].manifest.release_id,
        )
    finally:
        stop.set()
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    assert trainer.stop() == 0
    assert [notice.chosen_by is not None for notice in await read_notices(settings)].count(True) == 2
    trail = [(pointer.action, pointer.release_id) for pointer in store.history()]
    assert ("rolled back", first) in trail and ("unpinned", first) in trail
