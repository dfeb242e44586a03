"""Files of rows without the snapshots that name them: whose they are, how long they are needed, what is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from schemas.errors import Fenced
from schemas.manifests import Fence
from streams.stores.artifacts import pieces as module
from streams.stores.artifacts.artifact_store import FolderArtifactStore
from streams.stores.artifacts.checkpoints import BaseGone
from streams.stores.artifacts.pieces import PieceRef, Pieces, TableHeld
from tests.factories.checkpoints import NEW, OLD, SnapshotChain, make_store
from trainer.changed_rows import ChangedRows
from trainer.state import State, Table

WRITERS = {
    "p1-none": b"null",
    "p2-old": OLD.model_dump_json().encode(),
    "p3-new": NEW.model_dump_json().encode(),
    "p4-damaged": b"{",
}


def make_artifacts(folder: Path) -> FolderArtifactStore:
    return FolderArtifactStore(folder, entries="pieces", pointer="pieces.json", named="here")


@pytest.mark.parametrize(
    ("fence", "left"),
    [
        (None, {"p2-old", "p3-new"}),
        (OLD, {"p3-new"}),
        (NEW, set[str]()),
    ],
    ids=["no trainer", "superseded", "newest"],
)
def test_a_trainer_deletes_files_that_nothing_needs_but_none_of_a_later_trainer(
    tmp_path: Path, fence: Fence | None, left: set[str]
) -> None:
    artifacts = make_artifacts(tmp_path)
    pieces = Pieces(artifacts)
    for name, writer in WRITERS.items():
        artifacts.put(name, {"writer.json": writer})
    artifacts.put("p5-without", {"a.safetensors": b""})
    artifacts.put("p6-needed", {"writer.json": b"null"})
    among = pieces.names()
    for name in ("p7-later", "other"):
        artifacts.put(name, {"writer.json": b"null"})
    pieces.retain({"p6-needed"}, among, fence)
    assert set(artifacts.names()) == left | {"p6-needed", "p7-later", "other"}
    assert set(pieces.names()) == left | {"p6-needed", "p7-later"}


@pytest.mark.parametrize(
    ("now", "needed"),
    [
        ({"a": (1, 50)}, True),
        ({"a": (2, 9)}, True),
        ({"a": (2, 10)}, False),
        ({"a": (2, 11)}, False),
        ({"a": (3, 0)}, False),
        ({"a": (3, 0), "b": (0, 6)}, True),  # one of several tables
        ({"a": (3, 0), "b": (1, 5)}, False),
        ({"c": (0, 0)}, False),  # its tables are no more
    ],
)
def test_a_file_is_needed_until_each_of_its_tables_went_once_around(
    now: dict[str, tuple[int, int]], needed: bool
) -> None:
    ref = PieceRef(entry="p", file="f", sha256="s", places={"a": (1, 10), "b": (0, 5)})
    tables = {name: TableHeld(count=99, lap=lap, row=row) for name, (lap, row) in now.items()}
    assert ref.is_needed(tables) is needed


def rows(count: int, *, changed_rows: int | None = None) -> State:
    values, changed = np.arange(count, dtype=np.float32), ChangedRows()
    changed.touch(np.arange(count if changed_rows is None else changed_rows))
    state = State()
    for name in ("kept.", "dropped."):
        state.put_table(name, Table(count, changed, lambda numbers: lambda part: State({"x": values[numbers][part]})))
    return state


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8])
def test_a_table_is_read_back_whatever_its_size_and_whatever_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(module, "_BLOCK_ROWS", 4)
    pieces, copies = Pieces(make_artifacts(tmp_path)), rows(count).frozen().copies
    del copies["dropped."]
    refs = pieces.write("p1", copies, after=(), erased=(), fence=None)
    tables = {"kept.": module.held_of(copies["kept."].held)}
    assert pieces.read(tables, refs)["kept.x"].tolist() == list(range(count))
    more = {"kept.": TableHeld(count=4 * len(refs) + 1, lap=0, row=0)}
    with pytest.raises(ValueError, match="more rows than its files can hold"):
        pieces.read(more, refs)


def test_columns_of_a_table_that_is_not_asked_for_are_passed_over(tmp_path: Path) -> None:
    pieces, copies = Pieces(make_artifacts(tmp_path)), rows(3).frozen().copies
    refs = pieces.write("p1", copies, after=(), erased=(), fence=None)
    assert set(pieces.read({"kept.": module.held_of(copies["kept."].held)}, refs)) == {"kept.x"}


@pytest.mark.parametrize("superseded", [True, False])
def test_who_misses_a_file_that_a_successor_deleted_is_told_of_the_successor(tmp_path: Path, superseded: bool) -> None:
    first = SnapshotChain(make_store(tmp_path))
    shared = first.write(rows(300)).pieces[0].entry

    def at_step(step: str) -> None:
        if step == "rename entry" and list(tmp_path.glob("snapshots/.unfinished-n*")):
            successor = make_store(tmp_path)
            assert not superseded or successor.claim(NEW, seen=successor.last_claim())
            shutil.rmtree(tmp_path / "pieces" / shared)

    late = SnapshotChain(make_store(tmp_path, at_step=at_step))
    late.load()
    with pytest.raises(Fenced if superseded else BaseGone):
        late.write(rows(300, changed_rows=1))
    assert late.store.current_id() == first.since
    assert [path.name for path in tmp_path.glob("*/[np]*")] == [first.since]


@pytest.mark.parametrize("harm", ["gone", "damaged", "never there"])
def test_a_snapshot_cannot_go_on_from_one_that_is_not_whole(tmp_path: Path, harm: str) -> None:
    chain = SnapshotChain(make_store(tmp_path))
    name = chain.write(rows(3)).snapshot_id
    meta = tmp_path / "snapshots" / name / "snapshot.json"
    if harm == "gone":
        shutil.rmtree(meta.parent)
    elif harm == "damaged":
        meta.write_text("{")
    else:
        chain.since = "n000009-0123456789ab"
    with pytest.raises(BaseGone, match="not whole any more"):
        chain.write(rows(3))
