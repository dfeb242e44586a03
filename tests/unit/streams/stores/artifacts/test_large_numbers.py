"""Running numbers outgrow the six digits that names are padded to."""

from __future__ import annotations

from pathlib import Path

from streams.stores.artifacts.artifact_store import FolderArtifactStore, InMemoryArtifactStore, in_order
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.artifacts.registry import find_release, folder_registry, in_memory_registry
from tests.factories.checkpoints import OLD, make_meta, make_state, make_store
from tests.factories.releases import make_manifest, make_weights

LAST = 999_999


def test_the_release_after_the_last_of_six_digits_is_the_newest(tmp_path: Path) -> None:
    store = folder_registry(ModelStoreConfig(folder=tmp_path, keep_releases=2, grace_seconds=0))
    manifests = [make_manifest(number) for number in (LAST - 1, LAST, LAST + 1, LAST + 2)]
    for number, manifest in enumerate(manifests, LAST - 1):
        store.publish(make_weights(number), manifest)
        store.promote(manifest.release_id, OLD)
    assert [one.release_id for one in store.list()][-2:] == [one.release_id for one in manifests[-2:]]
    current = store.current()
    assert current is not None and current.release_id.startswith("r1000001-")
    assert store.load(current.release_id)[1] == manifests[-1]


def test_a_release_is_found_by_its_whole_number() -> None:
    store = in_memory_registry()
    for number in (100_000, 1_000_000):
        store.publish(make_weights(number), make_manifest(number))
    assert find_release(store, "r100000").rows_trained == 100_000


def test_the_snapshot_after_the_last_of_six_digits_is_resumed_from(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    first = store.write(make_state(1), make_meta(1), OLD).snapshot_id
    for entry in tmp_path.rglob(first):
        entry.rename(entry.with_name(first.replace("n000001", f"n{LAST}")))
    names = [store.write(make_state(number), make_meta(number), OLD).snapshot_id for number in (2, 3, 4)]
    assert [name.partition("-")[0] for name in names] == ["n1000000", "n1000001", "n1000002"]
    assert [meta.snapshot_id for meta in store.kept()] == names[-2:]
    assert store.load(names[-1]).meta.rows_trained == 4


def test_names_are_sorted_by_number_in_every_store(tmp_path: Path) -> None:
    names = ["r000007-a", "r000010-a", "r999999-a", "r1000000-a", "r1000001-a"]
    audit = ["00000009-r1.json", "99999999-r1.json", "100000000-r1.json"]
    folder = FolderArtifactStore(tmp_path, entries="e", pointer="p", named="x", lock_timeout_seconds=1.0)
    for store in (InMemoryArtifactStore(), folder):
        for name in reversed(names):
            store.put(name, {"file": b"x"})
        for name in reversed(audit):
            store.append_audit(name, b"x")
        assert (store.names(), store.audit_names()) == (names, audit)
    assert in_order(["other", "r1-x", ""]) == ["", "other", "r1-x"]
