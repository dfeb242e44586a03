"""The model registry keeps releases whole, and only the newest trainer moves its pointer."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from schemas.errors import Fenced, Misconfigured, PipelineError, StoreUnavailable
from schemas.manifests import Fence, PromotionDecision
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.artifacts.promotion import PointerAction, PromotionResult
from streams.stores.artifacts.registry import (
    ModelRegistry,
    folder_registry,
    in_memory_registry,
    open_registry,
)
from tests.factories.releases import NOW, current_id, make_manifest, make_weights, publish, release


def make_store(kind: str, folder: Path) -> ModelRegistry:
    if kind == "memory":
        return in_memory_registry()
    url = f"memory://{folder.name}-{uuid.uuid4().hex}" if kind == "object store" else None
    return open_registry(ModelStoreConfig(folder=folder, url=url))


@pytest.fixture(params=["folder", "memory", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ModelRegistry:
    return make_store(request.param, tmp_path)


def test_what_was_released_comes_back_equal(store: ModelRegistry) -> None:
    assert store.current() is None and store.list() == []
    release_id = release(store, 1, Fence(producer_id=5, epoch=0))

    pointer = store.current()
    assert pointer is not None and pointer.release_id == release_id
    weights, manifest = store.load(release_id)
    assert manifest == make_manifest(1, fence=Fence(producer_id=5, epoch=0))
    assert pointer.weights_sha256 == manifest.weights_sha256
    assert all(torch.equal(weights[name], tensor) for name, tensor in make_weights(1).items())


def test_a_published_release_is_not_current_before_its_promotion(store: ModelRegistry) -> None:
    first = release(store, 1)
    published(store, 2, 2)  # twice is harmless
    assert current_id(store) == first
    assert [manifest.rows_trained for manifest in store.list()] == [1, 2]


@pytest.mark.parametrize("older", [Fence(producer_id=7, epoch=2), Fence(producer_id=6, epoch=9), None])
def test_an_older_fence_is_refused_and_changes_nothing(store: ModelRegistry, older: Fence | None) -> None:
    current = release(store, 1, Fence(producer_id=7, epoch=3))
    with pytest.raises(Fenced, match=current):
        release(store, 2, older)
    pointer = store.current()
    assert pointer is not None and pointer.release_id == current and pointer.fence == Fence(producer_id=7, epoch=3)


@pytest.mark.parametrize(
    "newer", [Fence(producer_id=7, epoch=3), Fence(producer_id=7, epoch=4), Fence(producer_id=8, epoch=0)]
)
def test_the_same_or_a_newer_fence_may_promote(store: ModelRegistry, newer: Fence) -> None:
    release(store, 1, Fence(producer_id=7, epoch=3))
    second = release(store, 2, newer)
    pointer = store.current()
    assert pointer is not None and pointer.release_id == second and pointer.fence == newer


def test_promoting_what_was_never_published_is_refused(store: ModelRegistry) -> None:
    with pytest.raises(StoreUnavailable):
        store.promote(make_manifest(1).release_id, None)
    assert store.current() is None


def test_a_manifest_of_other_weights_is_refused(store: ModelRegistry) -> None:
    first, second = make_manifest(1), make_manifest(2)
    for manifest in (
        first,
        second.model_copy(update={"release_id": first.release_id}),
        second.model_copy(update={"weights_sha256": first.weights_sha256}),
    ):
        with pytest.raises(ValueError, match="does not belong"):
            store.publish(make_weights(2), manifest)
    assert store.list() == []


@pytest.mark.parametrize("position", [0, 100, -1])
def test_a_flipped_byte_is_found_on_load(tmp_path: Path, position: int) -> None:
    store = make_store("folder", tmp_path)
    release_id = release(store, 1)
    path = tmp_path / "releases" / release_id / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(Misconfigured, match="damaged"):
        store.load(release_id)


def test_a_truncated_manifest_or_pointer_is_reported_with_its_path(tmp_path: Path) -> None:
    store = make_store("folder", tmp_path)
    release_id = release(store, 1)
    manifest = tmp_path / "releases" / release_id / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:50])
    with pytest.raises(Misconfigured, match=r"manifest\.json"):
        store.load(release_id)
    (tmp_path / "current.json").write_text("{")
    with pytest.raises(Misconfigured, match=r"current\.json"):
        store.current()


def test_a_folder_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreUnavailable, match="MIM_MODELS__FOLDER"):
        release(make_store("folder", tmp_path / "file"), 1)


def _release_second_and_die(folder: Path, die_at: int) -> None:
    countdown = [die_at]

    def at_step(step: str) -> None:
        if countdown[0] == 0:
            os._exit(77)
        countdown[0] -= 1

    release(folder_registry(ModelStoreConfig(folder=folder), at_step=at_step), 2, Fence(producer_id=1, epoch=1))


def test_a_death_at_any_step_leaves_the_old_release_or_the_new_one(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    seen = []
    for die_at in range(100):
        folder = tmp_path / str(die_at)
        store = make_store("folder", folder)
        first = release(store, 1, Fence(producer_id=1, epoch=0))
        process = fork.Process(target=_release_second_and_die, args=(folder, die_at))
        process.start()
        process.join()
        assert process.exitcode in (0, 77)

        pointer = store.current()
        assert pointer is not None
        seen.append(pointer.release_id == first)
        weights, manifest = store.load(pointer.release_id)
        assert manifest.release_id == pointer.release_id
        assert torch.equal(weights["layer.bias"], make_weights(manifest.rows_trained)["layer.bias"])
        for kept in store.list():  # every release that has a name is whole
            store.load(kept.release_id)
        # the successor goes on as if nothing had happened
        third = release(store, 3, Fence(producer_id=1, epoch=2))
        assert current_id(store) == third
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and die_at >= 10  # each step had its death
    assert seen == sorted(seen, reverse=True) and seen[0] and not seen[-1]


def _promote_many(folder: Path, epochs: list[int], results: multiprocessing.Queue[tuple[int, bool]]) -> None:
    store = folder_registry(ModelStoreConfig(folder=folder))
    for epoch in epochs:
        try:
            store.promote(make_manifest(1 + epoch % 5).release_id, Fence(producer_id=1, epoch=epoch))
            results.put((epoch, True))
        except Fenced:
            results.put((epoch, False))


def test_of_two_processes_that_promote_at_once_the_larger_fence_stays(tmp_path: Path) -> None:
    store = make_store("folder", tmp_path)
    published(store, *range(1, 6))
    fork = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[int, bool]] = fork.Queue()
    rounds = [list(range(0, 200, 2)), list(range(1, 200, 2))]
    processes = [fork.Process(target=_promote_many, args=(tmp_path, epochs, results)) for epochs in rounds]
    for process in processes:
        process.start()
    outcomes = dict(results.get(timeout=60) for _ in range(200))
    for process in processes:
        process.join()
    pointer = store.current()
    assert pointer is not None and pointer.fence == Fence(producer_id=1, epoch=199)
    assert pointer.release_id == make_manifest(1 + 199 % 5).release_id
    assert outcomes[199]
    assert not list(tmp_path.glob(".current*"))


def test_a_lock_that_is_never_released_is_named(tmp_path: Path) -> None:
    store = folder_registry(ModelStoreConfig(folder=tmp_path, lock_timeout_seconds=0.1))
    release(store, 1)
    with (tmp_path / "promote.lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match=str(os.getpid())):
            store.promote(make_manifest(1).release_id, None)
    store.promote(make_manifest(1).release_id, None)


def test_only_old_releases_are_deleted_never_the_current_one(tmp_path: Path) -> None:
    config = ModelStoreConfig(folder=tmp_path, keep_releases=2, grace_seconds=60)
    now = [NOW.timestamp()]
    store = folder_registry(config, clock=lambda: now[0])
    first = release(store, 1, created_at=NOW)
    for number in range(2, 7):  # one release every 30 s
        now[0] += 30
        release(store, number, created_at=NOW + timedelta(seconds=30 * (number - 1)))
    # the newest two are kept, and 4 was superseded 30 s ago; 3 was 60 s ago
    assert [manifest.rows_trained for manifest in store.list()] == [4, 5, 6]
    with pytest.raises(StoreUnavailable):
        store.load(first)
    now[0] += 3600
    oldest = store.list()[0].release_id
    store.promote(oldest, None)  # a step back: what is current now is old, and stays
    published(store, 7, 8)
    store.promote(oldest, None)
    assert [manifest.rows_trained for manifest in store.list()] == [4, 7, 8]
    assert store.load(oldest)[1].rows_trained == 4
    store.promote(store.list()[-1].release_id, None)  # what was replaced just now is being loaded somewhere
    assert [manifest.rows_trained for manifest in store.list()] == [4, 7, 8]


def published(store: ModelRegistry, *numbers: int) -> list[str]:
    """Releases that are not current."""
    return [publish(store, number) for number in numbers]


def test_a_release_is_decided_once_and_one_that_was_not_has_no_verdict(store: ModelRegistry) -> None:
    refused = PromotionDecision(
        passed=False, reasons=["GAUC"], against="r000001-0", rows=7, figures={"ciubm_gauc": 0.5}
    )
    first, other = published(store, 1, 2)
    assert store.decision(first) is None
    assert store.record_decision(first, refused) == refused
    assert store.record_decision(first, PromotionDecision(passed=True)) == refused  # once
    assert store.decision(first) == refused and store.decision(other) is None
    with pytest.raises(StoreUnavailable):
        store.record_decision(make_manifest(3).release_id, refused)


def test_a_rollback_pins_and_a_trainer_with_a_larger_fence_leaves_it(store: ModelRegistry) -> None:
    first = release(store, 1, Fence(producer_id=1, epoch=0))
    release(store, 2, Fence(producer_id=1, epoch=0))
    back = store.choose(first, seen=store.current(), rollback=True, why="2 is bad", by="ann")
    assert back.pinned and back.fence == Fence(producer_id=1, epoch=0)  # outdated trainers stay outdated

    store.take_over(Fence(producer_id=1, epoch=1))
    (third,) = published(store, 3)
    assert store.promote(third, Fence(producer_id=1, epoch=1), against=first) is PromotionResult.PINNED
    current = store.current()
    assert current is not None and current.release_id == first
    with pytest.raises(Fenced):
        store.promote(third, Fence(producer_id=1, epoch=0))

    assert store.pin(False, why=None) and not store.pin(False, why=None)
    assert store.promote(third, Fence(producer_id=1, epoch=1), against=first) is PromotionResult.MOVED
    now = store.current()
    assert now is not None and now.release_id == third and not now.pinned


def test_a_candidate_compared_with_a_release_that_is_not_current_any_more_is_not_promoted(store: ModelRegistry) -> None:
    first, second = release(store, 1), release(store, 2)
    (third,) = published(store, 3)
    store.choose(first, seen=store.current(), rollback=False, why=None)
    assert store.promote(third, None, against=second) is PromotionResult.OVERTAKEN
    assert store.promote(third, None, against=first) is PromotionResult.MOVED


def test_a_choice_on_an_outdated_pointer_is_refused(store: ModelRegistry) -> None:
    first = release(store, 1)
    release(store, 2)
    seen = store.current()
    release(store, 3)  # the trainer, meanwhile: "back to the parent" would now be the bad one
    with pytest.raises(PipelineError, match="look again"):
        store.choose(first, seen=seen, rollback=True, why=None)
    with pytest.raises(PipelineError, match="already"):
        store.choose(make_manifest(3).release_id, seen=store.current(), rollback=False, why=None)
    with pytest.raises(StoreUnavailable):
        store.choose(make_manifest(9).release_id, seen=store.current(), rollback=False, why=None)


def test_the_audit_trail_has_every_change_once_with_who_when_and_why(store: ModelRegistry) -> None:
    first = release(store, 1, Fence(producer_id=1, epoch=0))
    second = release(store, 2, Fence(producer_id=1, epoch=0))
    store.take_over(Fence(producer_id=1, epoch=1))
    store.choose(first, seen=store.current(), rollback=True, why="worse on Sundays", by="ann")
    store.pin(False, why="Monday", by="bob")
    trail = store.history()
    assert [(p.sequence, p.action, p.release_id, p.by) for p in trail[2:]] == [
        (2, PointerAction.TAKEN_OVER, second, trail[2].by),
        (3, PointerAction.ROLLED_BACK, first, "ann"),
        (4, PointerAction.UNPINNED, first, "bob"),
    ]
    assert [p.action for p in trail[:2]] == [PointerAction.RELEASED] * 2 and trail[3].why == "worse on Sundays"
    assert all(p.at is not None for p in trail) and trail[-1] == store.current()
    published(store, 7)
    assert store.been_current() == {first, second}


def test_nothing_can_be_pinned_before_the_first_release(store: ModelRegistry) -> None:
    with pytest.raises(PipelineError, match="nothing"):
        store.pin(True, why=None)


def test_what_is_being_removed_cannot_come_back_and_a_pinned_release_is_never_removed(tmp_path: Path) -> None:
    now = [NOW.timestamp()]
    config = ModelStoreConfig(folder=tmp_path, keep_releases=2, grace_seconds=0)
    store = folder_registry(config, clock=lambda: now[0])
    first = release(store, 1)
    store.pin(True, why=None)
    numbers = published(store, 2, 3, 4, 5)
    now[0] += 10
    chosen_in_time = numbers[0]
    dropped: list[str] = []

    def drop(step: str) -> None:
        if step == "drop entry" and not dropped:
            dropped.append(step)
            with pytest.raises(PipelineError, match="being removed"):
                store.choose(chosen_in_time, seen=store.current(), rollback=False, why=None)

    folder_registry(config, clock=lambda: now[0], at_step=drop).prune()
    assert dropped and [m.rows_trained for m in store.list()] == [1, 4, 5]
    assert current_id(store) == first


def test_the_parent_of_the_current_release_is_kept_to_go_back_to(tmp_path: Path) -> None:
    config = ModelStoreConfig(folder=tmp_path, keep_releases=2, grace_seconds=0)
    store = folder_registry(config, clock=lambda: NOW.timestamp() + 10)
    (parent,) = published(store, 1)
    release(store, 2, parent=parent)
    published(store, 3, 4, 5)  # refused ones, say
    store.prune()
    assert [m.rows_trained for m in store.list()] == [1, 2, 4, 5]


def test_the_settings_name_a_folder_or_an_object_store(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    elsewhere = open_registry(ModelStoreConfig(folder=tmp_path, url=url))
    first = release(elsewhere, 1, Fence(producer_id=1, epoch=0))
    again = open_registry(ModelStoreConfig(folder=tmp_path, url=url))
    assert current_id(again) == first
    assert again.load(first)[1].rows_trained == 1
    assert not list(tmp_path.iterdir())
    release(open_registry(ModelStoreConfig(folder=tmp_path)), 1)
    assert (tmp_path / "current.json").exists()
