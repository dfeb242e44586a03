"""Releases in the training loop: whatever is away when one is due, its rows are in it, and in no other."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from schemas.errors import StoreUnavailable
from schemas.manifests import Fence, ModelManifest, PromotionDecision
from streams.stores.artifacts.artifact_store import InMemoryArtifactStore
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.artifacts.journal import JournalStore
from streams.stores.artifacts.promotion import CurrentPointer
from streams.stores.artifacts.registry import ModelRegistry, in_memory_registry
from streams.training import release_schedule as release_cadence
from streams.training.checkpointing import Checkpoints
from streams.training.loop import TrainOnBehaviours
from streams.training.releaser import ReleasePublisher
from tests.factories.checkpoints import make_journal, make_store
from tests.factories.promotion import LOG, Leads
from tests.factories.samples import small_config
from tests.factories.training import ALL, ListedInput, make_log, make_loop, until, vectors
from trainer.online.gate import GateConfig

FENCE = Fence(producer_id=1, epoch=1)
EVERY = 64
EVENTS = 420
CONFIG = small_config(batch_rows=16, release_every_rows=EVERY)


class Flaky(ModelRegistry):
    """Does not answer the calls of one kind, from the second release on, a few times over."""

    def __init__(self, call: str, times: int) -> None:
        super().__init__(InMemoryArtifactStore(), ModelStoreConfig(), named="memory")
        self.call, self.times = call, times

    def publish(self, weights: Mapping[str, Tensor], manifest: ModelManifest) -> None:
        self._answer("publish")
        super().publish(weights, manifest)

    def record_decision(self, release_id: str, decision: PromotionDecision) -> PromotionDecision:
        self._answer("decide")
        return super().record_decision(release_id, decision)

    def current(self) -> CurrentPointer | None:
        self._answer("current")
        return super().current()

    def _answer(self, call: str) -> None:
        if call == self.call and self.times and self.list():
            self.times -= 1
            raise StoreUnavailable("store", "away")


class LeadsHere(Leads):
    """Leads, and is told of offsets that nobody asks for."""

    settled = True

    def confirm(self) -> None: ...


def make_run(folder: Path, store: ModelRegistry, *, resumes: bool = False) -> tuple[TrainOnBehaviours, JournalStore]:
    leads, journal = LeadsHere(), make_journal(folder)
    snapshots = Checkpoints(
        make_store(folder),
        journal,
        read_log=lambda: LOG,
        config={},
        encoder_version=None,
        fence=FENCE,
        clock=lambda: 1e9,
    )
    found = snapshots.resume()
    assert (found is not None) == resumes
    given = ListedInput(vectors(*ALL), make_log(EVENTS))
    if found is not None:
        given.fetched = found.meta.offsets["behaviours"][0]

    def make_releaser(version: str, dim: int) -> ReleasePublisher:
        common: dict[str, Any] = {"notices_topic": "models", "read_log": lambda: LOG, "clock": lambda: 1e9}
        return ReleasePublisher(store, leads, encoder_version=version, dim=dim, **common)  # type: ignore[arg-type]

    loop = make_loop(
        given,
        bounded=False,
        config=CONFIG,
        snapshots=snapshots,
        resume=found,
        leadership=leads,
        make_releaser=make_releaser,
        gate=GateConfig(trial_rows=16, min_takes=1_000),
    )
    loop._group = None  # nobody is told how far training has got
    return loop, journal


def releases(store: ModelRegistry, journal: JournalStore) -> list[tuple[int, int, int, str]]:
    """Per release, its rows so far; of its segment the first row, how many rows, and the hash."""
    found = []
    for manifest in store.list():
        assert manifest.segment is not None
        kept = journal.load(manifest.segment)
        assert kept.segment.root == manifest.rows_tree_sha256
        found.append((manifest.rows_trained, kept.segment.first_row, kept.segment.rows, kept.segment.root))
    return found


async def run_until_released(loop: TrainOnBehaviours, store: ModelRegistry, count: int) -> None:
    stop = asyncio.Event()
    running = asyncio.create_task(loop.run(stop))
    try:
        await until(lambda: running.done() or len(store.list()) == count)
    finally:
        stop.set()
        await asyncio.wait_for(running, 60)


@pytest.fixture
async def undisturbed(tmp_path: Path) -> list[tuple[int, int, int, str]]:
    store = in_memory_registry()
    loop, journal = make_run(tmp_path / "undisturbed", store)
    await run_until_released(loop, store, 4)
    found = releases(store, journal)
    assert [(rows, first, count) for rows, first, count, _ in found] == [
        (EVERY * n, EVERY * (n - 1), EVERY) for n in (1, 2, 3, 4)
    ]
    return found


@pytest.mark.parametrize("call", ["publish", "decide", "current"])
async def test_a_store_that_is_away_when_a_release_is_due_puts_it_off_and_no_row_falls_between_two(
    call: str, tmp_path: Path, undisturbed: list[tuple[int, int, int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_cadence, "_RETRY_SECONDS", 0.01)
    store = Flaky(call, times=3)
    loop, journal = make_run(tmp_path / "away", store)
    await run_until_released(loop, store, 4)
    assert store.times == 0 and releases(store, journal) == undisturbed


@pytest.mark.parametrize(("call", "due"), [("publish", 2), ("decide", 1)])
async def test_a_trainer_that_ends_while_the_store_is_away_releases_the_same_after_its_restart(
    call: str, due: int, tmp_path: Path, undisturbed: list[tuple[int, int, int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_cadence, "_RETRY_SECONDS", 0.01)
    store = Flaky(call, times=10**9)
    loop, _ = make_run(tmp_path / "away", store)
    stop = asyncio.Event()
    running = asyncio.create_task(loop.run(stop))
    await until(lambda: running.done() or store.times < 10**9 - 3)
    assert loop.trainer is not None and loop.trainer.progress.rows == due * EVERY  # nothing is learned meanwhile
    stop.set()
    await asyncio.wait_for(running, 60)
    store.times = 0
    again, journal = make_run(tmp_path / "away", store, resumes=True)
    await run_until_released(again, store, 4)
    assert releases(store, journal) == undisturbed
