"""A folder of entries beside other writers: what each of them may replace, show and sweep."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from streams.stores.artifacts.artifact_store import FolderArtifactStore


def make_store(folder: Path, at_step: Callable[[str], None] = lambda step: None) -> FolderArtifactStore:
    return FolderArtifactStore(folder, entries="things", pointer="current.json", named="here", at_step=at_step)


def faster(folder: Path, at: str, act: Callable[[FolderArtifactStore], None]) -> FolderArtifactStore:
    """A store that another writer overtakes at a step."""
    done: list[str] = []

    def at_step(step: str) -> None:
        if step == at and not done:
            done.append(step)
            act(make_store(folder))

    return make_store(folder, at_step)


def test_an_entry_that_another_writer_made_meanwhile_stays_whole(tmp_path: Path) -> None:
    store = faster(tmp_path, "rename entry", lambda other: other.put("r1", {"a": b"theirs"}))
    store.put("r1", {"a": b"ours", "b": b"ours"})
    assert store.read("r1", "a") == b"theirs"
    assert [path.name for path in (tmp_path / "things").iterdir()] == ["r1"]
    assert [path.name for path in (tmp_path / "things" / "r1").iterdir()] == ["a"]


def test_a_file_or_record_that_another_writer_wrote_meanwhile_stays(tmp_path: Path) -> None:
    make_store(tmp_path).put("r1", {"a": b"1"})
    faster(tmp_path, "link file", lambda other: other.attach("r1", "verdict", b"theirs")).attach(
        "r1", "verdict", b"ours"
    )
    faster(tmp_path, "link file", lambda other: other.append_audit("1.json", b"theirs")).append_audit("1.json", b"ours")
    store = make_store(tmp_path)
    assert store.read("r1", "verdict") == b"theirs" and store.audit_trail() == [b"theirs"]
    assert not list(tmp_path.rglob(".unfinished*"))


def test_a_pointer_that_was_moved_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store.compare_and_swap(b"1", expected=None)
    seen = store.pointer()
    assert make_store(tmp_path).compare_and_swap(b"2", expected=seen)
    assert not store.compare_and_swap(b"3", expected=seen) and not store.compare_and_swap(b"3", expected=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current.json", "promote.lock"]


def test_a_sweep_takes_only_old_litter_wherever_a_killed_process_left_it(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.put("r1", {"a": b"1"})
    store.append_audit("1.json", b"1")
    litter: dict[str, list[Path]] = {"old": [], "young": []}
    for age, made in litter.items():
        for parent in (tmp_path / "things", tmp_path / "things" / "r1", tmp_path / "history"):
            made.append(parent / f".unfinished-{age}-file")
            made[-1].write_bytes(b"half")
        made.append(tmp_path / "things" / f".unfinished-{age}-entry")
        made[-1].mkdir()
        (made[-1] / "a").write_bytes(b"half")
    then = time.time() - 700
    for path in (*litter["old"], tmp_path / "things" / "r1", tmp_path / "history" / "1.json"):
        os.utime(path, (then, then))
    assert store.names() == ["r1"] and store.audit_names() == ["1.json"] and store.audit_trail() == [b"1"]
    store.sweep(600)
    assert [path for path in litter["old"] if path.exists()] == []
    assert [path for path in litter["young"] if not path.exists()] == []
    assert store.read("r1", "a") == b"1" and store.audit_names() == ["1.json"]


def test_a_deleted_entry_leaves_nothing_and_deleting_it_twice_is_harmless(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.delete("r1")
    store.put("r1", {"a": b"1"})
    faster(tmp_path, "drop entry", lambda other: other.delete("r1")).delete("r1")
    assert store.names() == [] and list((tmp_path / "things").iterdir()) == []


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "x" * 129])
def test_no_operation_takes_a_name_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path)
    store.put("r1", {"a": b"1"})
    for act in (
        lambda: store.put("r2", {name: b""}),
        lambda: store.attach("r1", name, b""),
        lambda: store.attach(name, "a", b""),
        lambda: store.read("r1", name),
        lambda: store.read(name, "a"),
        lambda: store.append_audit(name, b""),
    ):
        with pytest.raises(ValueError, match="not a name"):
            act()
