"""Checkpoints exist as a whole or not at all, belong to the newest trainer, and contain no code."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from schemas.errors import Fenced, Misconfigured, StoreUnavailable
from schemas.manifests import Fence
from streams.stores.artifacts.checkpoints import CheckpointStore, hash_sources
from streams.training.checkpointing import Checkpointer
from tests.factories.checkpoints import LOG, NEW, OLD, make_checkpointer, make_meta, make_state, make_store


def write(store: CheckpointStore, number: int, fence: Fence | None = OLD) -> str:
    return store.write(make_state(number), make_meta(number), fence).snapshot_id


def assert_is(store: CheckpointStore, snapshot_id: str | None, number: int) -> None:
    assert snapshot_id is not None
    found, expected = store.load(snapshot_id), make_state(number)
    assert found.meta.rows_trained == number and found.state.values == expected.values
    assert found.state.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert found.state.arrays[name].dtype == array.dtype and found.state.arrays[name].shape == array.shape
        np.testing.assert_array_equal(found.state.arrays[name], array)
    assert found.state.texts("texts") == expected.texts("texts")


def test_the_newest_is_current_and_a_few_are_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store.current_id() is None and store.kept() == []
    names = [write(store, number) for number in range(1, 5)]
    assert [meta.snapshot_id for meta in store.kept()] == names[-2:]
    assert store.current_id() == names[-1]
    for name, number in zip(names[-2:], (3, 4), strict=True):
        assert_is(store, name, number)


@pytest.mark.parametrize("fence", [OLD, None])
def test_an_earlier_trainer_can_neither_write_nor_move_the_pointer(tmp_path: Path, fence: Fence | None) -> None:
    store = make_store(tmp_path)
    kept = write(store, 1, OLD)
    assert store.claim(NEW, seen=store.last_claim())
    with pytest.raises(Fenced, match="later trainer"):
        write(store, 2, fence)
    assert store.current_id() == kept and [meta.snapshot_id for meta in store.kept()] == [kept]
    assert_is(store, write(store, 3, NEW), 3)


def test_a_superseded_trainer_deletes_nothing_of_its_successor(tmp_path: Path) -> None:
    write(make_store(tmp_path), 1, OLD)
    written: list[str] = []

    def successor(step: str) -> None:
        if step == "rename entry" and not written:
            later = make_store(tmp_path)
            assert later.claim(NEW, seen=later.last_claim())
            written.append(write(make_store(tmp_path), 2, NEW))  # it came to the same rows

    with pytest.raises(Fenced):
        write(make_store(tmp_path, at_step=successor), 2, OLD)
    store = make_store(tmp_path)
    assert store.current_id() == written[0]
    assert_is(store, written[0], 2)
    assert [meta.fence for meta in store.kept()] == [OLD, NEW]  # what the late one had written is gone


def test_a_full_disk_costs_another_writer_nothing(tmp_path: Path) -> None:
    written: list[str] = []

    def full(step: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def other_fails(step: str) -> None:
        if step == "rename entry":
            with pytest.raises(StoreUnavailable):
                write(make_store(tmp_path, at_step=full), 3, OLD)

    written.append(write(make_store(tmp_path, at_step=other_fails), 2, NEW))
    assert_is(make_store(tmp_path), written[0], 2)


def write_and_die(folder: Path, die_at: int) -> None:
    countdown = [die_at]

    def at_step(step: str) -> None:
        if countdown[0] == 0:
            os._exit(77)
        countdown[0] -= 1

    write(make_store(folder, at_step=at_step), 2)


def test_a_death_at_any_step_leaves_the_old_snapshot_or_the_new_one(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    seen = []
    for die_at in range(100):
        store = make_store(tmp_path / str(die_at))
        write(store, 1)
        process = fork.Process(target=write_and_die, args=(tmp_path / str(die_at), die_at))
        process.start()
        process.join()
        current = store.current_id()
        number = 2 if current and store.load(current).meta.rows_trained == 2 else 1
        assert_is(store, current, number)
        for meta in store.kept():
            store.load(meta.snapshot_id)
        seen.append(number)
        assert_is(store, write(store, 3, NEW), 3)
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and die_at >= 10
    assert seen == sorted(seen) and seen[0] == 1 and seen[-1] == 2


def test_a_disk_that_is_full_at_any_step_leaves_the_old_snapshot_and_no_litter(tmp_path: Path) -> None:
    for full_at in range(100):
        folder = tmp_path / str(full_at)
        first = write(make_store(folder), 1)
        countdown = [full_at]

        def at_step(step: str, countdown: list[int] = countdown) -> None:
            countdown[0] -= 1
            if countdown[0] < 0 and not step.startswith("drop"):
                raise OSError(errno.ENOSPC, "No space left on device")

        store = make_store(folder, at_step=at_step)
        try:
            current = write(store, 2)
        except StoreUnavailable:
            current = store.current_id() or ""
        number = 1 if current == first else 2
        assert_is(store, current, number)
        assert not list((folder / "snapshots").glob(".unfinished-*"))
        assert_is(make_store(folder), write(make_store(folder), 3), 3)
        if countdown[0] >= 0:
            break
    assert full_at >= 10 and number == 2


@pytest.mark.parametrize("file", ["state.safetensors", "values.json", "snapshot.json"])
@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_damaged_snapshot_is_named_with_the_way_out(tmp_path: Path, file: str, harm: str) -> None:
    store = make_store(tmp_path)
    name = write(store, 1)
    path = tmp_path / "snapshots" / name / file
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 64
    path.write_bytes(content if harm == "flip" else content[: len(content) // 2])
    with pytest.raises(Misconfigured, match=f"{name} .*(damaged|format).*--from-snapshot"):
        store.load(name)


def test_who_may_go_on_from_a_snapshot(tmp_path: Path) -> None:
    ours = make_checkpointer(tmp_path)
    assert ours.load() is None
    offsets = {"behaviours": {0: 7}, "embeddings": {0: 3}}
    meta = ours.save(make_state(1), offsets, encoder_version="enc.1", dim=3, rows=5, rows_sha256="ab")
    found = make_checkpointer(tmp_path, encoder="enc.1", release_every_rows=3, pending_megabytes=9).load()
    assert found is not None and found.meta == meta and found.meta.offsets == offsets

    def refused(checkpointer: Checkpointer) -> str:
        with pytest.raises(Misconfigured) as caught:
            checkpointer.load()
        return str(caught.value)

    for log, told in (
        (replace(LOG, cluster_id="elsewhere"), "cluster elsewhere"),
        (replace(LOG, topic_ids={"behaviours": "b2", "embeddings": "e1"}), "other topics"),
        (replace(LOG, partitions={"behaviours": [0, 1], "embeddings": [0]}), "keys have moved"),
    ):
        assert told in refused(make_checkpointer(tmp_path, log))
    assert "MIM_TRAIN__ENCODER_VERSION" in refused(make_checkpointer(tmp_path, encoder="enc.2"))
    told = refused(make_checkpointer(tmp_path, model={"hidden": (5, 4)}, seed=3))
    assert "MIM_TRAINER__MODEL__HIDDEN was [96, 48], is [5, 4]" in told and "MIM_TRAINER__SEED" in told
    with pytest.raises(Misconfigured, match="no id of a snapshot"):
        ours.load("../../etc")


@pytest.mark.parametrize("name", ["window.py", "online/trainer.py", "a/b/c.py"])
def test_a_change_in_any_package_that_decides_what_is_learned_changes_the_code_hash(tmp_path: Path, name: str) -> None:
    root = tmp_path / "trainer"
    for other in ("window.py", "online/trainer.py", "a/b/c.py", "offline/trees.py", "datasets/folder.py"):
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).write_text("x = 1\n")
    before = hash_sources([root])
    (root / "offline/trees.py").write_text("x = 2\n")
    (root / "datasets/folder.py").write_text("x = 2\n")
    assert hash_sources([root]) == before
    (root / name).write_text("x = 2\n")
    assert hash_sources([root]) != before


def rewrite(folder: Path, written: str, changes: dict[str, object]) -> None:
    """Change fields of a snapshot's own description behind the store's back."""
    path = folder / "snapshots" / written / "snapshot.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": 4}, "has format 4, this version reads 5"),
        ({"format": 6}, "has format 6, this version reads 5"),
        ({"state_sha256": "0" * 64}, "its checksums differ"),
        ({"values_sha256": "0" * 64}, "its checksums differ"),
        ({"snapshot_id": "n000009-0123456789ab"}, "it names itself n000009"),
        ({"rows_trained": -1}, r"1 fields of snapshot\.json are wrong"),
    ],
    ids=["older", "newer", "state", "values", "renamed", "field"],
)
def test_a_snapshot_of_another_format_or_a_damaged_one_is_refused_with_the_way_out(
    tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    store = make_store(tmp_path)
    written = store.write(make_state(1), make_meta(1), None)
    assert store.load(written.snapshot_id).meta == written
    rewrite(tmp_path, written.snapshot_id, changes)
    with pytest.raises(Misconfigured, match=f"{told}.*--from-snapshot ID"):
        store.load(written.snapshot_id)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_snapshots_are_kept_and_numbers_go_on(tmp_path: Path, keep: int) -> None:
    store = make_store(tmp_path, keep=keep)
    written = [store.write(make_state(n), make_meta(n), None).snapshot_id for n in range(5)]
    assert [name[:7] for name in written] == [f"n{number:06d}" for number in range(1, 6)]
    assert [meta.snapshot_id for meta in store.kept()] == written[-keep:] and store.current_id() == written[-1]


FITTING_SUMS = [
    ("values.json", b"[]", "is no object"),
    ("values.json", b"{", "contents are not what they should be"),
    ("values.json", b"[" * 100_000, "contents are not what they should be"),
    ("values.json", b"\xff", "contents are not what they should be"),
    ("state.safetensors", b"nothing of the kind", "not arrays"),
    ("state.safetensors", b"", "not arrays"),
]


@pytest.mark.parametrize(("file", "content", "told"), FITTING_SUMS, ids=range(len(FITTING_SUMS)))
def test_contents_that_do_not_fit_are_refused_though_their_checksums_agree(
    tmp_path: Path, file: str, content: bytes, told: str
) -> None:
    store = make_store(tmp_path)
    name = write(store, 1)
    (tmp_path / "snapshots" / name / file).write_bytes(content)
    rewrite(tmp_path, name, {f"{file.partition('.')[0]}_sha256": hashlib.sha256(content).hexdigest()})
    with pytest.raises(Misconfigured, match=f"{name} .*damaged: .*{told}.*--from-snapshot"):
        store.load(name)


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), ValueError("x"), TypeError("x"), AttributeError("x"), OverflowError("x"), RuntimeError("x")],
)
def test_a_part_that_cannot_take_its_contents_names_the_snapshot_and_the_way_out(
    tmp_path: Path, error: Exception
) -> None:
    store = make_store(tmp_path)
    found = store.load(write(store, 1))
    with (
        pytest.raises(Misconfigured, match=f"{found.meta.snapshot_id} .*MIM_TRAIN__SNAPSHOT_FOLDER"),
        found.restoring(),
    ):
        raise error
    with pytest.raises(StoreUnavailable), found.restoring():
        raise StoreUnavailable("store", "away")
    with found.restoring():
        pass


@pytest.mark.parametrize("before", [2, 3])
def test_a_snapshot_of_an_earlier_format_is_refused_with_the_way_out(tmp_path: Path, before: int) -> None:
    store = make_store(tmp_path)
    name = write(store, 1)
    rewrite(tmp_path, name, {"format": before})
    with pytest.raises(
        Misconfigured, match=f"has format {before}, this version reads .*remove the folder to train anew"
    ):
        store.load(name)
    with pytest.raises(StoreUnavailable, match="not there"):
        store.load("n000009-0123456789ab")


def test_a_damaged_pointer_is_told_with_the_way_out_and_replaced_by_nobody(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store, 1)
    (tmp_path / "current.json").write_text("{")
    for act in (store.current_id, store.last_claim, lambda: write(store, 2)):
        with pytest.raises(Misconfigured, match=r"pointer to snapshots in here is damaged .*restore it"):
            act()
    assert (tmp_path / "current.json").read_text() == "{"


def test_a_file_that_is_renamed_changes_the_code_hash(tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("schemas", "trainer")]
    for root in roots:
        root.mkdir()
        (root / "a.py").write_text(f"{root.name} = 1\n")
    before = hash_sources(roots)
    (roots[1] / "a.txt").write_text("no code")
    assert hash_sources(roots) == before
    (roots[1] / "a.py").rename(roots[1] / "b.py")
    assert hash_sources(roots) != before


def test_equal_states_of_two_trainers_have_two_names(tmp_path: Path) -> None:
    names = {
        make_store(tmp_path / str(n)).write(make_state(1), make_meta(1), fence).snapshot_id
        for n, fence in enumerate((None, OLD, NEW, OLD.model_copy(update={"term": 3})))
    }
    assert len(names) == 4


def test_a_superseded_trainer_leaves_neither_its_snapshot_nor_a_moved_pointer(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    current = store.write(make_state(1), make_meta(1), NEW).snapshot_id
    with pytest.raises(Fenced, match="here belongs to"):
        store.write(make_state(2), make_meta(2), OLD)
    assert store.current_id() == current and [meta.snapshot_id for meta in store.kept()] == [current]
    assert list((tmp_path / "pieces").iterdir()) == []


def test_a_claim_holds_only_against_the_pointer_it_has_seen_and_keeps_the_snapshot(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    before = store.last_claim()
    assert before.term == 0 and store.claim(OLD, seen=before)
    assert not store.claim(NEW, seen=before) and store.current_id() is None
    written = store.write(make_state(1), make_meta(1), OLD).snapshot_id
    seen = store.last_claim()
    assert seen.term == 1 and store.claim(NEW.model_copy(update={"term": 8}), seen=seen)
    assert store.current_id() == written and store.last_claim().term == 8


@pytest.mark.parametrize("number", range(1, 7))
def test_the_current_snapshot_stays_beside_one_of_the_same_number_by_a_superseded_trainer(
    tmp_path: Path, number: int
) -> None:
    def predecessor(step: str) -> None:
        if step == "rename entry" and not make_store(tmp_path, keep=1).kept():
            write(make_store(tmp_path, keep=1), number + 10, OLD)  # it is slow, and was not stopped

    current = write(make_store(tmp_path, keep=1, at_step=predecessor), number, NEW)
    store = make_store(tmp_path, keep=1)
    assert store.current_id() == current
    assert_is(store, current, number)
