"""Runs over a log that ends: its last candidate is compared on the last rows, and what is not released is told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from streams.stores.artifacts.registry import ModelRegistry, in_memory_registry
from streams.training.loop import TrainingLoop
from streams.training.promotion_gate import PromotionGate
from streams.training.release_publisher import ReleasePublisher
from streams.training.release_schedule import ReleaseScheduler
from streams.training.reports import TrainReport
from tests.factories.checkpoints import make_checkpointer
from tests.factories.promotion import LOG, FakeLeadership
from tests.factories.samples import small_config
from tests.factories.training import ALL, ListedInput, make_log, make_loop, make_thread, vectors
from trainer.online.gate import GateConfig
from trainer.online.trainer import OnlineTrainer

LAST_ROWS = 40
LAX: dict[str, Any] = {"gauc_margin": 1, "log_loss_margin": 99, "min_takes": 1_000}


class Run:
    """A trainer over the first `events` events of a log, to their end."""

    def __init__(
        self, folder: Path, store: ModelRegistry, events: int, *, replace: bool = False, **config: Any
    ) -> None:
        leads: Any = FakeLeadership()
        config = {"batch_rows": 16, "release_every_rows": 64} | config
        trial_rows = config.pop("trial_rows", LAST_ROWS)
        checkpointer = make_checkpointer(folder, **small_config(**config).model_dump())
        self.found = checkpointer.load()
        given = ListedInput(vectors(*ALL), make_log(events))
        if self.found is not None:
            given.fetched = self.found.meta.offsets["behaviours"][0]
        self.thread = make_thread(given, small_config(**config))
        self.publisher = ReleasePublisher(
            store, leads, notices_topic="models", read_log=lambda: LOG, clock=lambda: 1e9, replace=replace
        )
        gate = PromotionGate(store, self.publisher, GateConfig(trial_rows=trial_rows, **LAX))
        releases = ReleaseScheduler(self.thread, self.publisher, gate, leads, checkpointer=checkpointer, until_end=True)
        self.loop: TrainingLoop = make_loop(given, self.thread, checkpointer=checkpointer, releases=releases)
        self.stop = asyncio.Event()

    async def finish(self) -> TrainReport:
        await asyncio.wait_for(self.loop.run(self.stop, self.found), 60)
        return self.loop.report()

    @property
    def trainer(self) -> OnlineTrainer:
        assert self.thread.trainer is not None
        return self.thread.trainer


async def test_the_last_candidate_is_compared_on_the_last_rows_before_they_are_learned(tmp_path: Path) -> None:
    store = in_memory_registry()
    report = await Run(tmp_path, store, 400).finish()
    releases = store.list()
    last = store.decision(releases[-1].release_id)
    assert releases[-1].rows_trained == report.rows_trained and report.not_serving is None
    assert last is not None and LAST_ROWS <= last.rows < LAST_ROWS + 16
    # what served when the last rows began, and still does when they are through
    assert last.against == releases[-1].parent
    current = store.current()
    assert current is not None and current.release_id == releases[-1].release_id


async def test_a_first_release_among_the_last_rows_is_compared_with_what_follows_it(tmp_path: Path) -> None:
    store = in_memory_registry()
    await Run(tmp_path, store, 120).finish()
    first, last = store.list()
    decision = store.decision(last.release_id)
    assert decision is not None and decision.against == first.release_id
    assert decision.rows == last.rows_trained - first.rows_trained == 96 - 64


@pytest.mark.parametrize("events", [40, 130, 400])
async def test_rows_that_are_held_back_change_nothing_of_what_is_learned(tmp_path: Path, events: int) -> None:
    plain = make_thread(given := ListedInput(vectors(*ALL), make_log(events)), small_config(batch_rows=16))
    await asyncio.wait_for(make_loop(given, plain).run(asyncio.Event(), None), 60)
    run = Run(tmp_path, in_memory_registry(), events)
    report = await run.finish()
    assert plain.trainer is not None
    assert (report.rows_trained, report.rows_sha256) == (
        plain.trainer.progress.rows,
        plain.trainer.progress.rows_sha256,
    )
    ours, theirs = run.trainer.candidate().weights, plain.trainer.candidate().weights
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


async def test_rows_that_are_held_back_never_stop_reading(tmp_path: Path) -> None:
    report = await Run(tmp_path, in_memory_registry(), 3000, trial_rows=10_000, pending_megabytes=0.5).finish()
    assert report.accounts["trained"] == 3000


async def test_a_run_that_goes_on_compares_its_few_new_rows(tmp_path: Path) -> None:
    store = in_memory_registry()
    await Run(tmp_path, store, 300).finish()
    await Run(tmp_path, store, 320).finish()
    newest = store.decision(store.list()[-1].release_id)
    assert newest is not None and 0 < newest.rows < LAST_ROWS and newest.passed
    assert f"compared on {newest.rows} rows only" in newest.remarks[0]


async def test_a_run_that_begins_anew_and_learns_less_does_not_replace_what_serves(tmp_path: Path) -> None:
    store = in_memory_registry()
    await Run(tmp_path / "all", store, 300).finish()
    serving = store.current()
    given = Run(tmp_path / "anew", store, 320)
    given.thread._reads.fetched = 150  # type: ignore[attr-defined]  # begins in the middle of the log, as with --from
    report = await given.finish()
    assert report.not_serving is not None and "rows fewer than" in report.not_serving
    now = store.current()
    assert serving is not None and now is not None and now.release_id == serving.release_id


async def test_a_second_run_over_the_same_log_says_that_it_releases_nothing_and_how_it_would(tmp_path: Path) -> None:
    store = in_memory_registry()
    await Run(tmp_path / "first", store, 300).finish()
    before = [manifest.release_id for manifest in store.list()]
    report = await Run(tmp_path / "second", store, 300, seed=7).finish()
    assert [manifest.release_id for manifest in store.list()] == before
    assert report.not_serving is not None and "--replace" in report.not_serving
    assert "MIM_MODELS__FOLDER" in report.not_serving

    replaced = await Run(tmp_path / "third", store, 300, seed=7, replace=True).finish()
    current = store.current()
    assert current is not None and current.release_id not in before and replaced.not_serving is None
    decision = store.decision(current.release_id)
    assert decision is not None and "compared on 0 rows only" in decision.remarks[0]


async def test_a_second_run_that_learns_the_same_is_no_news(tmp_path: Path) -> None:
    store = in_memory_registry()
    await Run(tmp_path / "first", store, 300).finish()
    assert (await Run(tmp_path / "second", store, 300).finish()).not_serving is None
    assert (await Run(tmp_path / "second", store, 300).finish()).not_serving is None  # goes on, and nothing came


async def test_a_run_that_is_stopped_releases_nothing_that_was_not_compared(tmp_path: Path) -> None:
    store = in_memory_registry()
    await Run(tmp_path / "first", store, 200).finish()
    before = [manifest.release_id for manifest in store.list()]
    run = Run(tmp_path / "first", store, 400)
    learned = run.thread.run_once

    def stopped_soon(*given: Any, **more: Any) -> Any:
        run.stop.set()
        return learned(*given, **more)

    run.thread.run_once = stopped_soon  # type: ignore[method-assign]
    await run.finish()
    assert [manifest.release_id for manifest in store.list()] == before
