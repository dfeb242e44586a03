"""An error that ends a process names every setting that has to change, so that the next start is not the next error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from schemas.errors import Fenced, Misconfigured, StoreUnavailable
from schemas.manifests import Fence
from streams.settings import load_settings
from streams.stores.artifacts.registry import folder_registry, in_memory_registry
from streams.wiring.preflight import _CheckFailed, _model
from streams.wiring.serving import LazyEncoder
from tests.factories.checkpoints import LOG as SNAPSHOT_LOG
from tests.factories.checkpoints import make_checkpointer, make_state
from tests.factories.promotion import LOG, Scene
from tests.factories.releases import make_manifest, make_weights
from tests.factories.serving import WordEncoder
from trainer.networks.scorer import Scorer

MODELS = ("MIM_MODELS__FOLDER", "MIM_MODELS__URL")
ANEW = (*MODELS, "MIM_TRAIN__SNAPSHOT_FOLDER")


def names_all(error: BaseException, *names: str) -> bool:
    return all(name in str(error) for name in names)


async def test_a_topic_that_was_replaced_needs_both_folders_new_whoever_notices_first(tmp_path: Path) -> None:
    scene = await Scene(in_memory_registry()).start()
    scene.log = replace(LOG, topic_ids={"embeddings": "e", "behaviours": "another"})
    with pytest.raises(Misconfigured, match="deleted and created again") as told:
        await scene.candidate()
    assert names_all(told.value, *ANEW)

    snapshots = make_checkpointer(tmp_path)
    assert snapshots.load() is None
    offsets = {"behaviours": {0: 7}, "embeddings": {0: 3}}
    state = make_state(1)
    snapshots.save(state, offsets, encoder_version="enc.1", dim=3, rows=5, rows_sha256="ab")
    snapshots._read_log = lambda: replace(SNAPSHOT_LOG, cluster_id="another")
    with pytest.raises(Misconfigured, match="deleted and created again") as kept:
        snapshots.save(state, offsets, encoder_version="enc.1", dim=3, rows=6, rows_sha256="cd")
    assert names_all(kept.value, *ANEW)
    for other in (
        make_checkpointer(tmp_path, replace(SNAPSHOT_LOG, cluster_id="another")),
        make_checkpointer(tmp_path, encoder="enc.2"),
    ):
        with pytest.raises(Misconfigured) as refused:
            other.load()
        assert names_all(refused.value, *ANEW)


@pytest.mark.parametrize("about", [{"cluster_id": "another"}, {"encoder_version": "enc-2"}])
async def test_a_current_release_of_another_log_or_encoder_needs_both_folders_new(about: dict[str, str]) -> None:
    store = in_memory_registry()
    ours = {"cluster_id": LOG.cluster_id, "topic_ids": LOG.topic_ids, "encoder_version": "enc-1"}
    manifest = make_manifest(1).model_copy(update=ours | about)
    store.publish(make_weights(1), manifest)
    store.promote(manifest.release_id, None)
    with pytest.raises(Misconfigured) as told:
        await Scene(store).start()
    assert names_all(told.value, *ANEW)


async def test_messages_about_the_model_store_name_both_settings_of_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIM_MODELS__FOLDER", str(tmp_path))
    settings = load_settings()
    store = folder_registry(settings.models)
    manifest = make_manifest(1)
    store.publish(make_weights(1), manifest)
    store.promote(manifest.release_id, Fence(producer_id=9, epoch=1))
    with pytest.raises(Fenced) as outdated:
        store.promote(manifest.release_id, Fence(producer_id=8, epoch=1))
    with pytest.raises(_CheckFailed) as wrong:
        await _model(settings, "another-encoder", writes=True)
    assert "it claims the next term" in str(outdated.value)
    assert all(name in wrong.value.fix for name in MODELS)
    for file in (tmp_path / "releases" / manifest.release_id).iterdir():
        file.unlink()
    with pytest.raises(StoreUnavailable, match="remove the pointer") as lost:
        await Scene(store).start()  # type: ignore[arg-type]
    assert names_all(lost.value, *MODELS)


async def test_an_encoder_of_queries_that_is_not_the_centers_is_told_where_to_set_the_right_one() -> None:
    encoder = LazyEncoder(WordEncoder)  # type: ignore[arg-type]
    encoder.expected_version = "center-1"
    with pytest.raises(Misconfigured, match="set MIM_ENCODER__BUNDLE to the bundle of the former"):
        await encoder.get()


def test_a_release_of_another_version_is_told_with_what_to_do() -> None:
    with pytest.raises(Misconfigured, match="train again, or serve with the version that made it"):
        Scorer.from_release(make_weights(1), make_manifest(1))
