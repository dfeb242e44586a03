"""What lies in a registry is what it says, is found by its name, and is told from what lies beside it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from schemas.errors import Misconfigured, PipelineError
from schemas.manifests import Fence, PromotionDecision
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.artifacts.registry import (
    ModelRegistry,
    find_release,
    folder_registry,
    in_memory_registry,
    pack_weights,
    weights_checksum,
)
from tests.factories.releases import current_id, make_manifest, publish, release


@pytest.fixture
def store(tmp_path: Path) -> ModelRegistry:
    return folder_registry(ModelStoreConfig(folder=tmp_path))


def test_a_file_that_is_not_of_its_release_is_told_with_the_way_out(tmp_path: Path, store: ModelRegistry) -> None:
    first, second = publish(store, 1), publish(store, 2)
    store.record_decision(first, PromotionDecision(passed=True))
    folder = tmp_path / "releases" / first
    (folder / "verdict.json").write_text("{}")
    with pytest.raises(Misconfigured, match=rf"{first}/verdict\.json in .*MIM_MODELS__FOLDER.* is damaged"):
        store.decision(first)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "model.safetensors").write_bytes(b"nothing")
    manifest["weights_sha256"] = weights_checksum(b"nothing")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Misconfigured, match=rf"{first}/model\.safetensors .* is damaged"):
        store.load(first)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"release_id": second}))
    with pytest.raises(Misconfigured, match=f"it names release {second}"):
        store.manifest(first)


def test_what_else_lies_among_the_releases_is_passed_over(tmp_path: Path, store: ModelRegistry) -> None:
    kept = publish(store, 1)
    for other in ("notes", "r1-x", "s000000001-000000000000"):
        (tmp_path / "releases" / other).mkdir()
    (tmp_path / "releases" / make_manifest(2).release_id).mkdir()  # being deleted
    assert [manifest.release_id for manifest in store.list()] == [kept]
    for name in ("notes", "../releases", "r000001"):
        with pytest.raises(ValueError, match="not a release id"):
            store.manifest(name)


@pytest.mark.parametrize(("grace", "left"), [(0, 60), (600, 600)])
def test_unfinished_writes_go_after_the_time_of_grace_and_not_within_a_minute(
    tmp_path: Path, grace: float, left: float
) -> None:
    config = ModelStoreConfig(folder=tmp_path, keep_releases=2, grace_seconds=grace)
    store = folder_registry(config, clock=lambda: time.time() + 10**9)
    for number in (1, 2, 3):
        publish(store, number)
    store.promote(store.list()[-1].release_id, None)
    for number in (4, 5):
        publish(store, number)
    ages = [left - 30, left + 30]
    for age in ages:
        unfinished = tmp_path / "releases" / f".unfinished-{age}"
        unfinished.mkdir()
        os.utime(unfinished, (time.time() - age,) * 2)
    store.prune()
    assert [age for age in ages if (tmp_path / "releases" / f".unfinished-{age}").exists()] == [left - 30]


def test_equal_weights_have_equal_bytes_however_they_lie_in_memory() -> None:
    plain = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    other = {"b": torch.ones(4, requires_grad=True)[::2], "a": plain["a"].T.contiguous().T}
    assert pack_weights(plain) == pack_weights(other)
    assert pack_weights(plain) != pack_weights({"a": plain["a"], "b": torch.zeros(2)})
    shared = torch.ones(2)
    assert pack_weights({"a": shared, "b": shared}) == pack_weights({"a": torch.ones(2), "b": torch.ones(2)})


def test_a_state_of_the_pointer_that_was_kept_and_not_yet_replaced_is_told_once(tmp_path: Path) -> None:
    first = release(folder_registry(ModelStoreConfig(folder=tmp_path)), 1)

    def dies(step: str) -> None:
        if step == "compare pointer":
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        release(folder_registry(ModelStoreConfig(folder=tmp_path), at_step=dies), 2)
    store = folder_registry(ModelStoreConfig(folder=tmp_path))
    assert [pointer.release_id for pointer in store.history()] == [first] and store.been_current() == {first}
    second = release(store, 2)
    assert [pointer.sequence for pointer in store.history()] == [0, 1] and store.been_current() == {first, second}


def test_a_release_is_found_by_any_beginning_that_is_its_alone() -> None:
    store = in_memory_registry()
    with pytest.raises(PipelineError, match="nothing has been released yet"):
        find_release(store, None)
    with pytest.raises(PipelineError, match=r"no release .*'r1'"):
        find_release(store, "r1")
    first = release(store, 1)
    second = publish(store, 2)
    assert find_release(store, None).release_id == first
    for named in ("r000002", second[:-1], second):
        assert find_release(store, named).release_id == second
    with pytest.raises(PipelineError, match=r"more than one release .*'r00000'"):
        find_release(store, "r00000")
    for named in ("r00000x", first[1:]):
        with pytest.raises(PipelineError, match="no release"):
            find_release(store, named)


def test_no_term_so_far_is_above_the_last_one(store: ModelRegistry) -> None:
    assert store.last_term() == 0
    release(store, 1, Fence(producer_id=1, epoch=0, term=6))
    assert store.last_term() == 6
    store.take_over(Fence(producer_id=1, epoch=1, term=9))
    assert store.last_term() == 9 and current_id(store) == make_manifest(1).release_id


def test_a_choice_without_a_name_is_told_as_that_of_the_user_of_this_process(store: ModelRegistry) -> None:
    first = release(store, 1)
    release(store, 2)
    chosen = store.choose(first, seen=store.current(), rollback=False, why=None)
    assert not chosen.pinned and chosen.by is not None and "@" in chosen.by
    assert store.pin(True, why="sale") and not store.pin(True, why="sale")
    pinned = store.current()
    assert pinned is not None and (pinned.pinned, pinned.by, pinned.why) == (True, chosen.by, "sale")
