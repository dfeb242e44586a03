"""Releases in the training loop: whatever is away when one is due, its rows are in it, and in no other."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from schemas.errors import BrokerUnavailable, StoreUnavailable
from schemas.manifests import ModelManifest, PromotionDecision
from streams.broker.cluster import ClusterTopics
from streams.stores.artifacts.artifact_store import InMemoryArtifactStore
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.artifacts.promotion import CurrentPointer
from streams.stores.artifacts.registry import ModelRegistry, in_memory_registry
from streams.training import release_schedule
from streams.training.promotion_gate import PromotionGate
from streams.training.release_publisher import ReleasePublisher
from streams.training.release_schedule import ReleaseScheduler
from tests.factories.checkpoints import make_checkpointer, make_journal
from tests.factories.promotion import LOG, FakeLeadership
from tests.factories.samples import small_config
from tests.factories.training import ALL, ListedInput, make_log, make_loop, make_thread, vectors
from tests.factories.waiting import until
from trainer.online.gate import GateConfig

EVERY = 64
EVENTS = 420
Release = tuple[int, int, int, str]
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


class Run:
    """A trainer that releases into a store, from where its checkpoints in a folder are."""

    def __init__(self, folder: Path, store: ModelRegistry, *, away: int = 0) -> None:
        leads: Any = FakeLeadership()
        self.away = away
        self.store, self.journal = store, make_journal(folder)
        checkpointer = make_checkpointer(folder, LOG)
        self.found = checkpointer.load()
        given = ListedInput(vectors(*ALL), make_log(EVENTS), bounded=False)
        if self.found is not None:
            given.fetched = self.found.meta.offsets["behaviours"][0]
        thread = make_thread(given, CONFIG)
        publisher = ReleasePublisher(store, leads, notices_topic="models", read_log=self._log, clock=lambda: 1e9)
        gate = PromotionGate(store, publisher, GateConfig(trial_rows=16, min_takes=1_000))
        releases = ReleaseScheduler(thread, publisher, gate, leads, checkpointer=checkpointer)
        self.loop = make_loop(given, thread, checkpointer=checkpointer, releases=releases)
        self._stop = asyncio.Event()

    def _log(self) -> ClusterTopics:
        if self.away:
            self.away -= 1
            assert self.loop.report().rows_trained == 0
            raise BrokerUnavailable("Kafka", "away")
        return LOG

    def start(self) -> None:
        self.running = asyncio.create_task(self.loop.run(self._stop, self.found))

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.wait_for(self.running, 60)

    async def until_released(self, count: int) -> list[Release]:
        """The first `count` releases; the trainer may have made more before it is stopped."""
        self.start()
        try:
            await until(lambda: self.running.done() or len(self.store.list()) >= count)
        finally:
            await self.stop()
        return self.releases()[:count]

    def releases(self) -> list[Release]:
        """Per release, its rows so far; of its segment the first row, how many rows, and the hash."""
        found = []
        for manifest in self.store.list():
            assert manifest.segment is not None
            kept = self.journal.load(manifest.segment)
            assert kept.segment.root == manifest.rows_tree_sha256
            found.append((manifest.rows_trained, kept.segment.first_row, kept.segment.rows, kept.segment.root))
        return found


@pytest.fixture
async def undisturbed(tmp_path: Path) -> list[Release]:
    found = await Run(tmp_path / "undisturbed", in_memory_registry()).until_released(4)
    assert [(rows, first, count) for rows, first, count, _ in found] == [
        (EVERY * n, EVERY * (n - 1), EVERY) for n in (1, 2, 3, 4)
    ]
    return found


@pytest.mark.parametrize("call", ["publish", "decide", "current"])
async def test_a_store_that_is_away_when_a_release_is_due_puts_it_off_and_no_row_falls_between_two(
    call: str, tmp_path: Path, undisturbed: list[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_schedule, "_RETRY_SECONDS", 0.01)
    store = Flaky(call, times=3)
    assert await Run(tmp_path / "away", store).until_released(4) == undisturbed
    assert store.times == 0


async def test_a_broker_that_is_away_when_the_first_vector_comes_is_waited_for_and_nothing_is_learned_meanwhile(
    tmp_path: Path, undisturbed: list[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_schedule, "_WAIT_SECONDS", 0.01)
    run = Run(tmp_path / "away", in_memory_registry(), away=3)
    assert await run.until_released(4) == undisturbed
    assert run.away == 0


@pytest.mark.parametrize(("call", "due"), [("publish", 2), ("decide", 1)])
async def test_a_trainer_that_ends_while_the_store_is_away_releases_the_same_after_its_restart(
    call: str, due: int, tmp_path: Path, undisturbed: list[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_schedule, "_RETRY_SECONDS", 0.01)
    store = Flaky(call, times=10**9)
    run = Run(tmp_path / "away", store)
    run.start()
    await until(lambda: run.running.done() or store.times < 10**9 - 3)
    assert run.loop.report().rows_trained == due * EVERY  # nothing is learned meanwhile
    await run.stop()
    store.times = 0
    again = Run(tmp_path / "away", store)
    assert again.found is not None
    assert await again.until_released(4) == undisturbed
