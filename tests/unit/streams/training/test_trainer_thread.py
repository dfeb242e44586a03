"""What a checkpoint brings back of everything beside the trainer, and how far the thread says that it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.behaviours import BehaviourKind
from schemas.errors import Fenced
from streams.training.trainer_thread import TrainerThread
from streams.training.vector_records import EmbeddingRecord
from tests.factories import training
from tests.factories.checkpoints import make_checkpointer
from tests.factories.feeding import through_bytes
from tests.factories.promotion import LOG
from tests.factories.samples import DIM, click_log, small_config
from tests.factories.training import (
    ALL,
    ListedInput,
    forgotten,
    make_log,
    make_loop,
    trained,
    vectors,
)
from trainer.samples.forgotten import ForgottenUsers

CONFIG = small_config(batch_rows=16, release_every_rows=10**6)


def make_thread(given: ListedInput, **more: Any) -> TrainerThread:
    return training.make_thread(given, CONFIG, **more)


async def run_before(**more: Any) -> tuple[ListedInput, TrainerThread]:
    """A thread that has learned 300 events, of which i3 never had a vector and u1 was forgotten."""
    given = ListedInput(vectors("i0", "i1", "i2", "i4"), make_log(300))
    given.starts = {0: 17}
    thread = make_thread(given, forgotten=ForgottenUsers("c", "t"), **more)
    await thread.to_forget([forgotten("u1", until=250)], "source", 1)
    await trained(make_loop(given, thread))
    return given, thread


def restored(thread: TrainerThread, given: ListedInput) -> TrainerThread:
    again = make_thread(given, forgotten=ForgottenUsers("c", "t"))
    again.restore(through_bytes(thread.snapshot()), encoder_version="e", dim=DIM)
    return again


async def test_a_checkpoint_brings_back_what_stands_beside_the_trainer() -> None:
    _, before = await run_before()
    before.metrics = {"auc": 0.5}
    fresh = ListedInput([], [])
    fresh.starts = {0: 300}
    thread = restored(before, fresh)
    assert thread.begins() == {0: 17} and fresh.starts == {0: 300}  # where the lineage began
    assert thread.last_event_at == before.last_event_at is not None and thread.metrics == {"auc": 0.5}
    assert thread.waits.timeouts == before.waits.timeouts == 1
    assert thread.events_since_snapshot == 0 and thread.trainer is not None
    assert thread._erases("u1", 0, 249) and not thread._erases("u1", 0, 250) and not thread._erases("u2", 0, 0)
    again = restored(thread, fresh)
    assert again.begins() == {0: 17} and again._erases("u1", 0, 249)  # a checkpoint of a restarted one


async def test_events_that_the_log_deleted_meanwhile_are_not_kept_in_mind_after_a_restart() -> None:
    _, before = await run_before()
    assert before.trainer is not None
    before.trainer.intake.window.dropped_by_idle = {(0, 5): None, (0, 250): None}
    fresh = ListedInput([], [])
    fresh.beginnings = {0: 250}
    thread = restored(before, fresh)
    assert thread.trainer is not None and list(thread.trainer.intake.window.dropped_by_idle) == [(0, 250)]


async def test_vectors_that_were_held_are_held_after_a_restart() -> None:
    _, before = await run_before()
    thread = restored(before, ListedInput([], []))
    assert thread.trainer is not None
    assert sorted(thread.trainer.catalogue.items_with_vector) == ["i0", "i1", "i2", "i4"]


@pytest.mark.parametrize("kind", ["click", "exposure"])
async def test_a_fit_of_trees_is_told_with_its_trees_and_a_missed_one_with_why(kind: str) -> None:
    events = [
        one if one.exposure_id is None else one.model_copy(update={"kind": BehaviourKind(kind), "exposure_id": None})
        for one in click_log(200, items=4)[0]
    ]
    thread = make_thread(given := ListedInput(vectors("i0", "i1", "i2", "i3"), events))
    with capture_logs() as said:
        await trained(make_loop(given, thread))
    assert thread.trainer is not None and (trees := thread.trainer.trees) is not None
    told = [one for one in said if one["event"].startswith("train.trees")]
    if kind == "click":
        assert 1 <= len(told) <= trees.fits and trees.trees > 0 == trees.fits_missed
        assert {(one["event"], one["log_level"]) for one in told} == {("train.trees_fitted", "info")}
        assert told[-1]["trees"] == trees.trees
    else:
        assert 1 <= len(told) <= trees.fits_missed and trees.trees == 0 == trees.fits
        assert {(one["event"], one["log_level"]) for one in told} == {("train.trees_not_fitted", "warning")}
        assert "one label" in told[0]["why"]


async def test_what_was_fetched_before_a_checkpoint_is_in_it() -> None:
    given, thread = await run_before()
    given.vectors = [*vectors("i3"), EmbeddingRecord("i0", None)]
    state = thread.snapshot()
    assert not given.vectors
    again = make_thread(ListedInput([], []))
    again.restore(state, encoder_version="e", dim=DIM)
    assert again.trainer is not None
    assert sorted(again.trainer.catalogue.items_with_vector) == ["i1", "i2", "i3", "i4"]


async def test_events_since_a_checkpoint_are_counted_from_it() -> None:
    given = ListedInput(vectors(*ALL), make_log(300))
    thread = make_thread(given)
    assert thread.events_since_snapshot == 0
    await trained(make_loop(given, thread))
    assert thread.events_since_snapshot == 300
    thread.snapshot()
    assert thread.events_since_snapshot == 0


async def test_no_offset_lies_before_what_the_log_still_holds() -> None:
    given, thread = await run_before()
    assert thread.committed_offsets() == {0: 300} == thread.read_offsets()["behaviours"]
    given.beginnings, given.embedding_offsets = {0: 500}, {0: 9}
    assert thread.committed_offsets() == thread.trained_offsets() == {0: 500}
    assert thread.read_offsets() == thread.report_offsets() == {"behaviours": {0: 500}, "embeddings": {0: 9}}
    _, offsets = thread.candidate()
    assert offsets == {"behaviours": {0: 500}, "embeddings": {0: 9}}


async def test_offsets_of_queries_are_kept_by_checkpoints_and_reports_where_they_are_read_and_by_no_release() -> None:
    given, thread = await run_before()
    given.query_offsets = {0: 4, 1: 2}
    for offsets in (thread.read_offsets(), thread.report_offsets()):
        assert offsets["queries"] == {0: 4, 1: 2} and offsets.keys() == {"behaviours", "embeddings", "queries"}
    assert thread.candidate()[1].keys() == {"behaviours", "embeddings"}
    fresh = make_thread(ListedInput([], []))
    assert fresh.committed_offsets() == {0: 0} and fresh.begins() == {0: 0}


async def test_a_user_is_forgotten_once_and_not_before_there_is_a_trainer() -> None:
    given = ListedInput(vectors(*ALL), make_log(100))
    thread = make_thread(given, forgotten=ForgottenUsers("c", "t"))
    await thread.to_forget([forgotten("u1", until=9), forgotten("u2", until=9, topic_id="other")], "s", 1)
    thread.forget()
    assert thread.has_more  # kept until there is something to forget from
    await thread.to_forget([forgotten("u1", until=9)], "s", 2)
    assert thread._to_forget == ["u1"]
    thread.put_embeddings()
    thread.forget()
    assert not thread.has_more
    without = make_thread(ListedInput([], []))
    await without.to_forget([forgotten("u1", until=9)], "s", 1)
    assert not without.has_more


class Commits:
    """Notes what the loop asks of the offsets' commits."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fenced = False

    def confirm(self) -> None:
        self.calls.append("confirm")
        if self.fenced:
            raise Fenced("another process leads")

    def commit_soon(self) -> None:
        self.calls.append("soon")

    async def commit_if_due(self) -> None:
        self.calls.append("due")

    async def commit_final(self) -> None:
        self.calls.append("final")

    def cancel(self) -> None:
        self.calls.append("cancel")


@pytest.mark.parametrize("checkpoints", [True, False])
async def test_offsets_are_committed_after_a_checkpoint_and_at_the_end(
    tmp_path: Path, checkpoints: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(write: Callable[..., Any], *arguments: Any) -> Any:
        return write(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", at_once)  # else the log may end before the first checkpoint is written
    commits, given = Commits(), ListedInput(vectors(*ALL), make_log(600))
    checkpointer = make_checkpointer(tmp_path, LOG)
    assert checkpointer.load() is None
    checkpointer._every_events = 150
    more: dict[str, Any] = {"checkpointer": checkpointer} if checkpoints else {}
    await trained(make_loop(given, make_thread(given), commits=commits, **more))
    assert commits.calls[-2:] == ["final", "cancel"] and commits.calls.count("final") == 1
    assert commits.calls.count("confirm") == commits.calls.count("due") > 3
    assert ("soon" in commits.calls) == checkpoints
    assert (checkpointer.load() is not None) == checkpoints


async def test_a_trainer_that_does_not_lead_any_more_ends_at_once_and_writes_nothing(tmp_path: Path) -> None:
    commits, given = Commits(), ListedInput(vectors(*ALL), make_log(600))
    checkpointer = make_checkpointer(tmp_path, LOG)
    checkpointer.load()
    commits.fenced, cancel, cancelled = True, checkpointer.cancel, list[str]()

    def noted() -> None:
        cancelled.append("checkpoint")
        cancel()

    checkpointer.cancel = noted  # type: ignore[method-assign]
    loop = make_loop(given, make_thread(given), commits=commits, checkpointer=checkpointer)
    with pytest.raises(Fenced):
        await asyncio.wait_for(loop.run(asyncio.Event()), 30)
    assert commits.calls == ["confirm", "cancel"] and checkpointer.load() is None and cancelled == ["checkpoint"]


async def test_a_run_that_is_stopped_leaves_a_checkpoint_of_what_it_has_read(tmp_path: Path) -> None:
    given = ListedInput(vectors(*ALL), make_log(100), bounded=False)
    checkpointer = make_checkpointer(tmp_path, LOG)
    checkpointer.load()
    loop, stop = make_loop(given, make_thread(given), checkpointer=checkpointer), asyncio.Event()
    running = asyncio.create_task(loop.run(stop))
    async with asyncio.timeout(30):
        while loop.report().accounts["received"] < 100:
            await asyncio.sleep(0.005)
    stop.set()
    await running
    found = checkpointer.load()
    assert found is not None and found.meta.offsets == {"behaviours": {0: 100}, "embeddings": {0: 0}}
