"""Snapshots that share files of rows: each can be loaded as if it held everything, and no file is kept for nothing."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from schemas.errors import Fenced, Misconfigured, StoreUnavailable
from streams.stores.artifacts import pieces
from streams.stores.artifacts.artifact_store import FolderArtifactStore, InMemoryArtifactStore
from streams.stores.artifacts.checkpoints import BaseGone
from tests.factories.checkpoints import NEW, OLD, SnapshotChain, make_store
from trainer.changed_rows import ChangedRows
from trainer.state import State, Table, ragged, unragged
from trainer.tables import Slots

Row = tuple[str, tuple[int, ...]]


class Part:
    """A part with a table of numbers that grows and one of rows that come and go, beside a value."""

    def __init__(self) -> None:
        self.numbers = np.zeros((0, 2), np.float32)
        self.changed = ChangedRows()
        self.people: Slots[Row] = Slots()
        self.rows: dict[str, int] = {}
        self.steps = 0

    def set(self, number: int, value: float) -> None:
        if number >= len(self.numbers):
            self.numbers = np.concatenate([self.numbers, np.zeros((number + 1 - len(self.numbers), 2), np.float32)])
        self.numbers[number] = value
        self.changed.touch(number)
        self.steps += 1

    def add(self, name: str, values: tuple[int, ...]) -> None:
        if name in self.rows:
            self.people[self.rows[name]] = (name, values)
        else:
            self.rows[name] = self.people.add((name, values))

    def remove(self, name: str) -> None:
        if name in self.rows:
            self.people.pop(self.rows.pop(name))

    def state(self) -> State:
        state = State({"steps": np.array([self.steps])}, {"steps": self.steps})
        state.put_table("numbers.", Table(len(self.numbers), self.changed, self._copied))
        state.put_table("people.", self.people.table(_packed, user_column="names"))
        return state

    def _copied(self, numbers: NDArray[np.int64]) -> Callable[[slice], State]:
        values = self.numbers[numbers]
        return lambda part: State({"values": values[part]})

    @classmethod
    def restored(cls, state: State) -> Part:
        part = cls()
        part.numbers, part.steps = state.arrays["numbers.values"].copy(), state.values["steps"]
        columns = zip(state.texts("people.names"), unragged("people.values", state), strict=True)
        rows = [(name, tuple(values)) if name else None for name, values in columns]
        part.people = Slots(rows)
        part.rows = {row[0]: number for number, row in enumerate(rows) if row}
        return part

    def act(self, rng: random.Random, most: int = 12) -> None:
        for _ in range(rng.randrange(most)):
            name = f"person-{rng.randrange(40)}"
            match rng.randrange(4):
                case 0:
                    self.remove(name)
                case 1:
                    self.set(rng.randrange(len(self.numbers) + 2), rng.random())
                case _:
                    self.add(name, tuple(rng.randrange(99) for _ in range(rng.randrange(4))))


def _packed(rows: Sequence[Row | None]) -> State:
    state = State()
    state.put_texts("names", (row[0] if row else "" for row in rows))
    state.add(ragged("values", [row[1] if row else () for row in rows]))
    return state


def assert_is(state: State, part: Part) -> None:
    expected = part.state().frozen().arrays
    assert state.arrays.keys() == expected.keys() and state.values == part.state().values
    for name, array in expected.items():
        assert state.arrays[name].dtype == array.dtype and state.arrays[name].shape == array.shape, name
        assert state.arrays[name].tobytes() == array.tobytes(), name


def grown(seed: int = 0) -> tuple[Part, random.Random]:
    part, rng = Part(), random.Random(seed)
    for number in range(60):
        part.set(number, rng.random())
        part.add(f"person-{rng.randrange(40)}", (number, number))
    return part, rng


class Died(Exception):
    pass


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(5, 15))
def test_whatever_is_written_failed_or_killed_the_newest_snapshot_equals_a_plain_copy(seed: int, count: int) -> None:
    part, rng = grown(seed)
    die_at = [-1]
    error: list[Exception] = [Died()]

    def at_step(step: str) -> None:
        die_at[0] -= 1
        if die_at[0] == 0:
            raise error[0]

    with tempfile.TemporaryDirectory() as folder:
        chain = SnapshotChain(make_store(Path(folder), at_step=at_step))
        written = part.state().frozen()
        chain.write(part.state())
        for _ in range(count):
            part.act(rng)
            expected, before = part.state().frozen(), chain.store.current_id()
            die_at[0] = rng.choice([-1, -1, -1, rng.randrange(1, 40)])
            error[0] = rng.choice([Died(), OSError(28, "No space left on device")])
            try:
                chain.write(part.state())
            except (Died, StoreUnavailable):
                die_at[0] = -1
                if isinstance(error[0], Died) or chain.store.current_id() != before:  # a new process goes on
                    part = Part.restored(chain.load())
            die_at[0] = -1
            if chain.store.current_id() != before:
                written = expected
            found = chain.store.load(chain.store.current_id() or "").state
            assert found.values == written.values
            assert {name: array.tobytes() for name, array in found.arrays.items()} == {
                name: array.tobytes() for name, array in written.arrays.items()
            }
            if rng.randrange(4) == 0:
                part = Part.restored(chain.load())
            for meta in chain.store.kept():
                chain.store.load(meta.snapshot_id)


def test_a_snapshot_writes_what_changed_and_in_time_nothing_older_is_needed(tmp_path: Path) -> None:
    part, rng = grown()
    for number in range(5_000):
        part.set(number, number)
    chain = SnapshotChain(make_store(tmp_path))
    first = chain.write(part.state())
    sizes, present = [], []
    for _ in range(140):
        part.set(rng.randrange(5_000), 7.0)
        meta = chain.write(part.state())
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "pieces").glob(f"p{meta.snapshot_id[1:7]}-*/*")))
        present.append({path.name for path in (tmp_path / "pieces").iterdir()})
        assert {ref.entry for ref in meta.pieces} <= present[-1]
    assert_is(chain.load(), part)
    first_entries = {ref.entry for ref in first.pieces}
    whole = sum(len(array.tobytes()) for array in part.state().frozen().arrays.values())
    assert max(sizes) < whole / 10
    assert first_entries & present[100] and not first_entries & present[-1]
    assert (
        len({name.removesuffix("-users") for name in present[-1]}) <= 128 + 3
    )  # and those of the two snapshots kept before


@pytest.mark.parametrize("where", ["before the next", "while the next is written"])
def test_without_a_shared_file_a_snapshot_is_refused_and_the_next_one_holds_everything(
    tmp_path: Path, where: str
) -> None:
    part, rng = grown()
    entries = tmp_path / "pieces"
    at: list[Callable[[], None]] = [lambda: None]

    def at_step(step: str) -> None:
        if step == "rename entry" and not list(entries.glob(".unfinished-p*")):
            at[0]()

    chain = SnapshotChain(make_store(tmp_path, at_step=at_step))
    shared = chain.write(part.state()).pieces[0].entry
    part.act(rng)
    if where == "before the next":
        shutil.rmtree(entries / shared)
        with pytest.raises(Misconfigured, match=f"a part of it is gone .*{shared}.*--from-snapshot"):
            chain.load()
    else:
        at[0] = lambda: shutil.rmtree(entries / shared, ignore_errors=True)
    before = chain.store.current_id()
    with pytest.raises(BaseGone, match=r"not .*any more"):
        chain.write(part.state())
    at[0] = lambda: None
    assert chain.store.current_id() == before  # nobody is pointed to what cannot be read
    anew = SnapshotChain(chain.store)
    anew.write(part.state())
    assert_is(anew.load(), part)


def test_rows_on_another_snapshot_than_the_one_that_they_changed_since_are_refused_or_complete(tmp_path: Path) -> None:
    part, rng = grown()
    chain = SnapshotChain(make_store(tmp_path, keep=5))
    first = chain.write(part.state())
    part.add("someone new", (1, 2))
    chain.write(part.state())
    chain.since = None  # changed rows, and nothing that they are a change of
    part.act(rng)
    wrong = chain.write(part.state())
    with pytest.raises(Misconfigured, match="rows are in no piece"):
        chain.store.load(wrong.snapshot_id)
    chain.since = first.snapshot_id  # rows lie between: the table is longer than what the two of them hold
    part.act(rng)
    wrong = chain.write(part.state())
    with pytest.raises(Misconfigured, match="rows are in no piece"):
        chain.store.load(wrong.snapshot_id)


def test_a_superseded_trainer_deletes_no_file_of_its_successor(tmp_path: Path) -> None:
    part, rng = grown()
    old = SnapshotChain(make_store(tmp_path))
    old.write(part.state())
    successor: list[SnapshotChain] = []

    def takes_over(step: str) -> None:
        if step == "rename entry" and list(tmp_path.glob("snapshots/.unfinished-n*")) and not successor:
            successor.append(SnapshotChain(make_store(tmp_path)))
            other = Part.restored(successor[0].load())
            assert successor[0].store.claim(NEW, seen=successor[0].store.last_claim())
            other.act(rng)
            successor[0].write(other.state(), NEW)

    late = SnapshotChain(make_store(tmp_path, at_step=takes_over))
    part = Part.restored(late.load())
    part.act(rng)
    with pytest.raises(Fenced):
        late.write(part.state(), OLD)
    state = successor[0].load()
    part = Part.restored(state)
    part.act(rng)
    successor[0].write(part.state(), NEW)
    assert_is(successor[0].load(), part)


def test_files_that_no_snapshot_needs_go_unless_a_later_trainer_wrote_them() -> None:
    files = pieces.Pieces(InMemoryArtifactStore())
    for entry, fence in (("p000001-0", None), ("p000002-0", OLD), ("p000003-0", NEW), ("p000004-0", OLD)):
        files.write(entry, {}, after=(), erased=(), fence=fence)
    files.retain({"p000004-0"}, files.names(), OLD)
    assert files.names() == ["p000003-0", "p000004-0"]
    files.retain((), files.names(), NEW)
    assert files.names() == []


@pytest.mark.parametrize("file_bytes", [1 << 24, 1], ids=["one-file", "many-files"])
def test_an_erased_user_is_in_no_file_that_later_snapshots_need(
    tmp_path: Path, file_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_FILE_BYTES", file_bytes)
    part, _ = grown()
    part.remove("person-1")
    part.add("secret one", (5, 6))
    part.add("other", (8,))
    chain = SnapshotChain(make_store(tmp_path, keep=1))
    chain.write(part.state())
    part.add("other", (9,))
    part.remove("secret one")  # they left for another reason first, and their row went to another user
    part.add("newcomer", (7,))
    chain.write(part.state())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"secret one" in path.read_bytes() for path in files)
    chain.write(part.state(), erased=["secret one"])
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"secret one" not in path.read_bytes()
    assert_is(chain.load(), part)


def test_erasing_many_users_looks_at_each_name_once_and_reads_no_file_without_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_BLOCK_ROWS", 16)
    part, _ = grown()
    chain = SnapshotChain(make_store(tmp_path))
    before = chain.write(part.state()).pieces
    with_names = {ref.file for ref in before if "people." in ref.places}
    read: list[str] = []

    class Users(list[str]):
        def __contains__(self, name: object) -> bool:
            raise AssertionError("a list is gone through for each row")

    plain = FolderArtifactStore.read

    def counted(store: FolderArtifactStore, name: str, file: str) -> bytes:
        read.append(file)
        return plain(store, name, file)

    monkeypatch.setattr(FolderArtifactStore, "read", counted)
    part.remove("person-1")
    after = chain.write(part.state(), erased=Users(["person-1", *(f"nobody-{n}" for n in range(1000))])).pieces
    assert with_names < {ref.file for ref in before}
    assert with_names <= set(read) and not ({ref.file for ref in before} - with_names) & set(read)
    assert {ref.file for ref in before} - {ref.file for ref in after} <= with_names
    assert_is(chain.load(), part)


@pytest.mark.parametrize("content", ["{", "[]", '{"pieces": 3}', '{"pieces": [{}]}'])
def test_a_damaged_manifest_of_an_earlier_snapshot_keeps_no_later_one_from_being_written(
    tmp_path: Path, content: str
) -> None:
    part, rng = grown()
    chain = SnapshotChain(make_store(tmp_path, keep=3))
    first = chain.write(part.state())
    part.act(rng)
    chain.write(part.state())
    (tmp_path / "snapshots" / first.snapshot_id / "snapshot.json").write_text(content)
    part.act(rng)
    chain.write(part.state())
    assert_is(chain.load(), part)


@pytest.mark.parametrize("full_at", ["write state.safetensors", "rename entry", "sync entries"])
def test_a_snapshot_that_a_full_disk_has_no_room_for_leaves_none_of_its_rows(tmp_path: Path, full_at: str) -> None:
    part, rng = grown()
    is_full = [False]

    def at_step(step: str) -> None:
        if step == full_at and is_full[0] and list((tmp_path / "pieces").glob("p000002-*")):
            raise OSError(28, "No space left on device")

    chain = SnapshotChain(make_store(tmp_path, at_step=at_step))
    chain.write(part.state())
    before, is_full[0] = sorted(tmp_path.glob("*/*")), True
    for _ in range(2):
        part.act(rng)
        with pytest.raises(StoreUnavailable):
            chain.write(part.state())
        assert sorted(tmp_path.glob("*/*")) == before
    is_full[0] = False
    chain.write(part.state())
    assert_is(chain.load(), part)


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path, harm: str) -> None:
    part, _ = grown()
    chain = SnapshotChain(make_store(tmp_path))
    ref = chain.write(part.state()).pieces[0]
    path = tmp_path / "pieces" / ref.entry / ref.file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content if harm == "flip" else content[: len(content) // 2])
    with pytest.raises(Misconfigured, match=f"checksum of {ref.entry}/{ref.file} .*--from-snapshot"):
        chain.load()


def test_a_number_of_rows_that_no_file_can_hold_takes_no_memory(tmp_path: Path) -> None:
    part, _ = grown()
    chain = SnapshotChain(make_store(tmp_path))
    name = chain.write(part.state()).snapshot_id
    path = tmp_path / "snapshots" / name / "snapshot.json"
    path.write_text(path.read_text().replace('"count":60', '"count": 60').replace('"count": 60', f'"count": {1 << 60}'))
    with pytest.raises(Misconfigured, match="more rows than its files can hold"):
        chain.load()


def test_large_tables_are_written_in_files_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_BLOCK_ROWS", 16)
    part, _ = grown()
    chain = SnapshotChain(make_store(tmp_path))
    meta = chain.write(part.state())
    assert len(meta.pieces) >= 4
    assert_is(chain.load(), part)
    assert set(os.listdir(tmp_path / "pieces")) == {ref.entry for ref in meta.pieces}
