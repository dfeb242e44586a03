"""Checkpoints beside training: what is away puts one off, and ends nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schemas.errors import BrokerUnavailable, Misconfigured, StoreUnavailable, Unavailable
from streams.broker.cluster import ClusterTopics
from streams.stores.artifacts.checkpoints import CheckpointStore
from tests.factories.checkpoints import LOG, make_checkpointer, make_state
from tests.factories.training import ALL, ListedInput, make_loop, make_thread, trained, vectors


@pytest.mark.parametrize("error", [BrokerUnavailable("Kafka", "nothing answers"), StoreUnavailable("disk", "full")])
async def test_a_checkpoint_that_cannot_be_written_now_is_logged_and_ends_nothing(
    error: Unavailable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = False

    def read_log() -> ClusterTopics:
        if away and isinstance(error, BrokerUnavailable):
            raise error
        return LOG

    def write(*_: Any, **__: Any) -> None:
        raise error

    checkpointer = make_checkpointer(tmp_path, read_log=read_log)
    assert checkpointer.load() is None
    given = ListedInput(vectors(*ALL), [])
    thread = make_thread(given)
    await trained(make_loop(given, thread))
    away = True
    if isinstance(error, StoreUnavailable):
        monkeypatch.setattr(CheckpointStore, "write", write)
    assert await checkpointer.checkpoint(thread)
    assert not await checkpointer.written()


def test_a_snapshot_of_an_earlier_build_lacks_newer_settings_and_is_resumed_with_their_defaults(tmp_path: Path) -> None:
    ours = make_checkpointer(tmp_path)
    ours.load()
    assert ours._config.pop("MIM_TRAINER__PURCHASE_CORRECTION_SECONDS") == 86_400.0
    ours._config["MIM_TRAINER__CORRECTION_ROWS"] = 10_000
    offsets = {"behaviours": {0: 7}, "embeddings": {0: 3}}
    meta = ours.save(make_state(1), offsets, encoder_version="enc.1", dim=3, rows=5, rows_sha256="ab")
    found = make_checkpointer(tmp_path).load()
    assert found is not None and found.meta == meta
    with pytest.raises(Misconfigured, match=r"PURCHASE_CORRECTION_SECONDS was 86400\.0, is 5\.0"):
        make_checkpointer(tmp_path, purchase_correction_seconds=5).load()
