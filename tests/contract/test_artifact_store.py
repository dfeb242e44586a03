"""One suite for every artifact store."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import Misconfigured, StoreUnavailable
from streams.stores.artifacts.artifact_store import (
    ArtifactStore,
    FolderArtifactStore,
    InMemoryArtifactStore,
    NotFound,
    VersionedPointer,
)
from streams.stores.artifacts.object_store import S3ArtifactStore
from streams.stores.artifacts.pointer import update_pointer
from tests.factories.s3_server import s3_server

OpenStore = Callable[[], ArtifactStore]

NAMES = {"entries": "things", "pointer": "current.json", "named": "here"}


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    with s3_server("models") as address:
        yield address


@pytest.fixture(params=["folder", "memory", "fsspec-memory", "s3"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Opens the same place again each time it is called, as another process would."""
    where = uuid.uuid4().hex
    if request.param == "folder":
        return lambda: FolderArtifactStore(tmp_path, **NAMES)
    if request.param == "fsspec-memory":
        return lambda: S3ArtifactStore(f"memory://{where}", **NAMES)
    if request.param == "s3":
        access = {"key": "any", "secret": "any", "endpoint_url": request.getfixturevalue("s3_address")}
        options = access | {"client_kwargs": {"region_name": "us-east-1"}, "skip_instance_cache": True}
        return lambda: S3ArtifactStore(f"s3://models/{where}", options=options, **NAMES)
    only = InMemoryArtifactStore()
    return lambda: only


def pointed(store: ArtifactStore) -> bytes:
    held = store.pointer()
    assert held is not None
    return held.content


def side_by_side(work: Callable[[Any], None], *given: Any) -> None:
    """Do the work for each at the same time; what one of them raises comes out."""
    with ThreadPoolExecutor(len(given)) as pool:
        list(pool.map(work, given))


def test_an_entry_comes_back_from_another_process_and_never_changes(open_store: OpenStore) -> None:
    store, other = open_store(), open_store()
    assert store.names() == [] and store.pointer() is None and store.audit_trail() == []
    store.put("r1", {"a.bin": b"\x00" * 1000, "b.json": b"{}"})
    assert other.names() == ["r1"] and other.read("r1", "a.bin") == b"\x00" * 1000
    other.put("r1", {"a.bin": b"other", "c": b"more"})
    assert store.read("r1", "a.bin") == b"\x00" * 1000
    for absent in (("r1", "c"), ("r2", "a.bin")):
        with pytest.raises(NotFound):
            store.read(*absent)
    store.put("r0", {"a.bin": b"1"})
    assert other.names() == ["r0", "r1"]


def test_what_is_attached_is_written_once_and_goes_with_its_entry(open_store: OpenStore) -> None:
    store, other = open_store(), open_store()
    with pytest.raises(NotFound):
        store.attach("r1", "verdict.json", b"{}")
    store.put("r1", {"a": b"1"})
    with pytest.raises(NotFound):
        other.read("r1", "verdict.json")
    store.attach("r1", "verdict.json", b"first")
    other.attach("r1", "verdict.json", b"second")
    other.attach("r1", "a", b"second")
    store.sweep(-1)
    assert other.read("r1", "verdict.json") == b"first" and other.read("r1", "a") == b"1"
    assert other.names() == ["r1"]
    other.delete("r1")
    store.put("r1", {"a": b"2"})
    with pytest.raises(NotFound):
        store.read("r1", "verdict.json")


def test_a_deleted_entry_is_gone_and_its_name_is_free(open_store: OpenStore) -> None:
    store, other = open_store(), open_store()
    store.put("r1", {"a": b"1"})
    other.delete("r1")
    other.delete("r1")
    assert store.names() == []
    with pytest.raises(StoreUnavailable):
        store.read("r1", "a")
    store.put("r1", {"a": b"2"})
    store.sweep(0)
    assert other.read("r1", "a") == b"2"


def test_the_pointer_is_replaced_only_from_its_present_state(open_store: OpenStore) -> None:
    store, other = open_store(), open_store()
    assert store.compare_and_swap(b"1", expected=None)
    assert not other.compare_and_swap(b"x", expected=None)
    seen = other.pointer()
    assert seen is not None and seen.content == b"1"
    assert other.compare_and_swap(b"2", expected=seen)
    assert not store.compare_and_swap(b"3", expected=seen)  # seen is outdated: it slept since
    assert not store.compare_and_swap(b"3", expected=VersionedPointer(b"never", '"0"'))
    assert pointed(store) == b"2"


def test_of_two_racing_writers_no_change_is_lost(open_store: OpenStore) -> None:
    rounds = 25

    def count(name: str) -> None:
        store = open_store()
        for _ in range(rounds):
            update_pointer(store, lambda raw: json.dumps([*json.loads(raw or b"[]"), name]).encode())

    side_by_side(count, "a", "b")
    assert sorted(json.loads(pointed(open_store()))) == ["a"] * rounds + ["b"] * rounds


def test_a_refused_change_writes_nothing_and_a_change_is_repeated_after_a_conflict(open_store: OpenStore) -> None:
    store, other = open_store(), open_store()
    store.compare_and_swap(b"1", expected=None)
    asked: list[bytes | None] = []

    def change(before: bytes | None) -> bytes | None:
        asked.append(before)
        if len(asked) == 1:
            assert other.compare_and_swap(b"2", expected=other.pointer())  # faster than us
        return None if before == b"9" else (before or b"") + b"!"

    assert update_pointer(store, change) == b"2!" and asked == [b"1", b"2"]
    store.compare_and_swap(b"9", expected=store.pointer())
    assert update_pointer(store, change) is None
    assert pointed(other) == b"9"


def test_of_two_writers_of_one_name_the_first_wins_whole(open_store: OpenStore) -> None:
    def put(content: bytes) -> None:
        open_store().put("r1", {"a": content, "b": content})

    side_by_side(put, b"1", b"2")
    store = open_store()
    assert store.read("r1", "a") == store.read("r1", "b")


def test_audit_records_are_written_once_and_come_in_the_order_of_their_names(open_store: OpenStore) -> None:
    store, other = open_store(), open_store()
    for name in ("00000002.json", "00000001.json"):
        store.append_audit(name, name.encode())
    other.append_audit("00000001.json", b"another story")
    assert other.audit_trail() == [b"00000001.json", b"00000002.json"]
    assert other.audit_names() == ["00000001.json", "00000002.json"]


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden"])
def test_no_name_leads_out_of_the_store(open_store: OpenStore, name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        open_store().put(name, {"a": b""})


def test_an_entry_whose_writer_was_killed_is_not_there_and_is_swept(tmp_path: Path) -> None:
    import fsspec

    where = uuid.uuid4().hex
    store = S3ArtifactStore(f"memory://{where}", **NAMES)
    memory, half = fsspec.filesystem("memory"), f"/{where}/things/r1.0123456789ab/a"
    memory.pipe_file(half, b"half")
    store.put("r2", {"a": b"whole"})
    assert store.names() == ["r2"]
    store.sweep(3600)
    assert memory.exists(half)
    store.sweep(-1)
    assert not memory.exists(half) and store.read("r2", "a") == b"whole"


def test_a_store_without_conditional_puts_is_refused() -> None:
    with pytest.raises(Misconfigured, match="compared and swapped"):
        S3ArtifactStore("gs://bucket/x", **NAMES)


def test_an_object_store_that_does_not_answer_is_unavailable() -> None:
    pytest.importorskip("s3fs")
    access = {"key": "any", "secret": "any", "endpoint_url": "http://127.0.0.1:1"}
    options = access | {"config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 1}}
    store = S3ArtifactStore("s3://models/x", options=options, **NAMES | {"named": "MIM_MODELS__URL"})
    with pytest.raises(StoreUnavailable, match="MIM_MODELS__URL"):
        store.pointer()
