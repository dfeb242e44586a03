"""Checkpoints turn by turn: when one is due, what goes before it, who is erased with it, and what a release adds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.errors import Fenced, Misconfigured, StoreUnavailable
from streams.broker.cluster import ClusterTopics
from streams.stores.artifacts.checkpoints import BaseGone, CheckpointStore
from streams.stores.artifacts.journal import JournalStore
from streams.training.checkpointing import HARMLESS, learning_config, of_earlier_build
from tests.factories.checkpoints import LOG, OLD, make_checkpointer, make_state
from tests.factories.training import ALL, ListedInput, make_log, make_loop, make_thread, trained, vectors
from trainer.changed_rows import RowsHeld
from trainer.online.config import TrainerConfig

OFFSETS = {"behaviours": {0: 7}, "embeddings": {0: 3}}


class Turns:
    """A checkpointer beside a thread that notes, in order, what is asked of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.erase: list[str] = []
        self.events_since_snapshot = 0
        self.failure: Exception | None = None
        self.written: list[dict[str, Any]] = []
        self.given_since: list[Any] = []
        progress = SimpleNamespace(rows=5, rows_sha256="ab")
        self.trainer: Any = SimpleNamespace(encoder_version="e", catalogue=SimpleNamespace(dim=3), progress=progress)
        self.scores: Any = SimpleNamespace(flush=self._step("flush"))
        self.checkpointer = make_checkpointer(folder)
        self.checkpointer.load()
        self.forget = self._step("forget")
        self.flush_fails = False
        write = CheckpointStore.write

        def writing(store: CheckpointStore, *positional: Any, **named: Any) -> Any:
            self.done.append("write")
            self.written.append(named)
            if self.failure is not None:
                raise self.failure
            return write(store, *positional, **named)

        monkeypatch.setattr(CheckpointStore, "write", writing)

    def _step(self, name: str) -> Callable[[], None]:
        def step() -> None:
            self.done.append(name)
            if name == "flush" and self.flush_fails:
                raise StoreUnavailable("state folder", "full")

        return step

    def snapshot(self, since: Any) -> Any:
        self.done.append("snapshot")
        self.given_since.append(dict(since))
        return make_state(len(self.written) + 1).frozen(since)

    def take_erased(self) -> list[str]:
        erased, self.erase = self.erase, []
        return erased

    def read_offsets(self) -> Any:
        return OFFSETS

    async def write(self) -> bool:
        given: Any = self
        return await self.checkpointer.checkpoint(given) and await self.checkpointer.written()


@pytest.fixture
def turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Turns:
    return Turns(tmp_path, monkeypatch)


async def test_users_are_forgotten_and_scores_written_before_a_checkpoint_says_how_far_it_is(turns: Turns) -> None:
    assert await turns.write() and turns.done == ["forget", "flush", "snapshot", "write"]
    turns.done.clear()
    turns.flush_fails = True
    assert not await turns.write() and turns.done == ["forget", "flush"]
    turns.trainer = None
    assert await turns.write() and turns.done == ["forget", "flush"]  # nothing to keep, and nothing to wait for


async def test_a_checkpoint_is_due_after_so_many_events_unless_one_is_being_written(turns: Turns) -> None:
    given: Any = turns
    turns.checkpointer._every_events = 10
    for events, due in ((9, False), (10, True)):
        turns.events_since_snapshot = events
        assert turns.checkpointer.due(given) is due
    assert await turns.checkpointer.checkpoint(given)
    assert not turns.checkpointer.due(given)
    while not turns.checkpointer.just_written:
        await asyncio.sleep(0.001)
    assert not turns.checkpointer.due(given) and await turns.checkpointer.written()
    assert turns.checkpointer.due(given) and not turns.checkpointer.just_written
    assert await turns.checkpointer.written()  # asked again, with nothing under way


async def test_a_user_is_erased_from_the_store_by_the_next_checkpoint_that_can_be_written(turns: Turns) -> None:
    turns.erase, turns.failure = ["u1"], StoreUnavailable("disk", "full")
    assert not await turns.write()
    turns.erase, turns.failure = ["u2"], None
    assert await turns.write() and await turns.write()
    assert [one["erased"] for one in turns.written] == [["u1"], ["u1", "u2"], []]


async def test_each_checkpoint_goes_on_from_the_one_before_it_and_one_whose_base_is_gone_holds_everything(
    turns: Turns,
) -> None:
    assert await turns.write() and await turns.write()
    first, second = turns.written
    assert first["since"] is None and second["since"] is not None
    turns.checkpointer._held = {"table": RowsHeld(5, 0, 0, 0)}
    turns.failure = BaseGone("here", "gone")
    assert not await turns.write()
    turns.failure = None
    assert await turns.write()
    assert turns.written[-1]["since"] is None and turns.given_since[-1] == {}


async def test_what_is_in_the_journal_is_listed_before_it_is_asked_which_releases_there_are(
    turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, present = list[str](), JournalStore.present

    def listed(journal: JournalStore) -> Any:
        order.append("present")
        return present(journal)

    async def kept() -> set[str]:
        order.append("kept")
        return set()

    monkeypatch.setattr(JournalStore, "present", listed)
    await turns.checkpointer.after_release(kept)
    assert order == ["present", "kept"], "else the segment of a release that is made between them would go"


@pytest.mark.parametrize("error", [Fenced("a later trainer writes here"), Misconfigured("the log was replaced")])
async def test_what_ends_a_trainer_is_raised_by_the_checkpoint_after(turns: Turns, error: Exception) -> None:
    given: Any = turns
    turns.failure = error
    assert await turns.checkpointer.checkpoint(given)
    with pytest.raises(type(error)):
        await turns.checkpointer.checkpoint(given)


def test_what_decides_what_is_learned_is_compared_under_the_names_people_set() -> None:
    config = TrainerConfig().model_dump(mode="json")
    found = learning_config(config, "ciubm,din", {"user_id": "uid"})
    assert found["MIM_TRAIN__VARIANTS"] == "ciubm,din" and found["MIM_RECORD__FIELD_MAP"] == {"user_id": "uid"}
    assert found["MIM_TRAINER__LEARNER__LEARNING_RATE"] == TrainerConfig().learner.learning_rate
    assert not [name for name in HARMLESS if f"MIM_TRAINER__{name.upper()}" in found]
    assert all(name in config for name in HARMLESS)
    assert of_earlier_build({"MIM_TRAINER__SEED": 9, "MIM_TRAINER__CORRECTION_ROWS": 1}) == learning_config(
        config | {"seed": 9}, "", {}
    )


@pytest.mark.parametrize("changed", ["MIM_TRAIN__VARIANTS", "MIM_RECORD__FIELD_MAP"])
def test_other_variants_or_fields_are_another_training(tmp_path: Path, changed: str) -> None:
    ours = make_checkpointer(tmp_path)
    ours.load()
    ours.save(make_state(1), OFFSETS, encoder_version="e", dim=3, rows=5, rows_sha256="ab")
    other = make_checkpointer(tmp_path)
    other._config[changed] = "other"
    with pytest.raises(Misconfigured, match=f"was learned otherwise \\({changed} was"):
        other.load()


def test_a_snapshot_is_gone_on_from_by_name_the_newest_by_default_or_not_at_all(tmp_path: Path) -> None:
    ours = make_checkpointer(tmp_path)
    ours.load()
    kept = [
        ours.save(make_state(rows), OFFSETS, encoder_version="e", dim=3, rows=rows, rows_sha256="ab").snapshot_id
        for rows in (1, 2)
    ]
    again = make_checkpointer(tmp_path)
    found = again.load()
    assert found is not None and found.meta.snapshot_id == kept[1] and again._since == kept[1]
    named = again.load(kept[0])
    assert named is not None and named.meta.rows_trained == 1 and again._since == kept[0]
    anew = make_checkpointer(tmp_path)
    assert anew.load(kept[0], anew=True) is None and anew._since is None
    anew.save(make_state(3), OFFSETS, encoder_version="e", dim=3, rows=3, rows_sha256="ab")  # it may write all the same


async def test_a_release_is_preceded_by_its_checkpoint_and_its_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ListedInput(vectors(*ALL), make_log(200))
    given.starts = {0: 17}
    thread = make_thread(given)
    await trained(make_loop(given, thread))
    assert thread.trainer is not None
    thread.trainer.intake.window.dropped_by_idle = {(0, 7): None}
    given.query_offsets = {0: 3}
    everything = ClusterTopics(LOG.cluster_id, LOG.topic_ids | {"queries": "q"}, LOG.partitions | {"queries": [0]})
    checkpointer = make_checkpointer(tmp_path, everything)
    checkpointer.load()
    assert await checkpointer.before_release(thread)
    current = checkpointer._store.current_id()
    assert current is not None
    kept_meta = checkpointer._store.load(current).meta
    assert (kept_meta.topic_ids, kept_meta.offsets["queries"]) == (everything.topic_ids, {0: 3})
    segment = thread.trainer.journal.segment()
    meta = checkpointer._journal.load(segment.name).meta
    assert (meta.begins, meta.ends, meta.fence, meta.rows) == ({0: 17}, {0: 200}, OLD, segment.rows)
    # a release is rebuilt without queries, whether its trainer read them or not
    assert (meta.cluster_id, meta.topic_ids, meta.dim) == (LOG.cluster_id, LOG.topic_ids, thread.trainer.catalogue.dim)
    assert (meta.root, meta.encoder_version, meta.overtaken) == (segment.root, "e", [(0, 7)])

    async def kept() -> set[str]:
        return set()

    await checkpointer.after_release(kept)
    assert list(checkpointer._journal.present().segments) == []

    def full(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("disk", "full")

    monkeypatch.setattr(JournalStore, "write", full)
    assert not await checkpointer.before_release(thread)
    monkeypatch.setattr(CheckpointStore, "write", full)
    assert not await checkpointer.before_release(thread)
