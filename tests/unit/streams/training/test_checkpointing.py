"""Checkpoints beside training: what is away puts one off, and ends nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schemas.errors import BrokerUnavailable, StoreUnavailable, Unavailable
from streams.broker.cluster import ClusterTopics
from streams.stores.artifacts.checkpoints import CheckpointStore
from tests.factories.checkpoints import LOG, make_checkpointer
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

    def write(*_: Any) -> None:
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
