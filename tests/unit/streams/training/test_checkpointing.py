"""Checkpoints beside training: what is away puts one off, and ends nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.errors import BrokerUnavailable, Misconfigured, StoreUnavailable, Unavailable
from streams.broker.cluster import ClusterTopics
from streams.stores.artifacts.checkpoints import CheckpointStore
from streams.training.checkpointing import restore
from tests.factories.checkpoints import LOG, make_checkpointer, make_state
from tests.factories.training import ALL, ListedInput, make_loop, make_thread, trained, vectors
from trainer.online.progress import TrainProgress
from trainer.samples.catalogue import Catalogue


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


async def test_scores_go_on_behind_the_rows_that_were_scored_and_those_of_a_new_trainer_begin_anew() -> None:
    opened: list[int | None] = []
    scores = SimpleNamespace(open=opened.append)
    progress = TrainProgress(Catalogue(2))
    progress.rows, progress.corrected, progress.upgraded = 9, 2, 1
    for trainer in (None, SimpleNamespace(progress=progress)):
        thread: Any = SimpleNamespace(trainer=trainer, scores=scores)
        assert await restore(None, thread) is None
    assert opened == [None, 6]


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
