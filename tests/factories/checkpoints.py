"""Small trainer states, and stores of checkpoints and journals in a folder."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from schemas.manifests import Fence
from streams.broker.cluster import ClusterTopics
from streams.stores.artifacts.artifact_store import FolderArtifactStore
from streams.stores.artifacts.checkpoints import CheckpointMeta, CheckpointStore
from streams.stores.artifacts.journal import JournalStore
from streams.training.checkpointing import Checkpointer, learning_config
from trainer.changed_rows import RowsHeld
from trainer.online.config import TrainerConfig
from trainer.state import State

OLD, NEW = Fence(producer_id=4, epoch=1), Fence(producer_id=4, epoch=2)
LOG = ClusterTopics("cluster", {"behaviours": "b1", "embeddings": "e1"}, {"behaviours": [0], "embeddings": [0]})


def make_store(folder: Path, *, keep: int = 2, at_step: Callable[[str], None] = lambda step: None) -> CheckpointStore:
    artifacts, pieces = (
        FolderArtifactStore(folder, entries=entries, pointer=pointer, named="here", at_step=at_step)
        for entries, pointer in (("snapshots", "current.json"), ("pieces", "pieces.json"))
    )
    return CheckpointStore(artifacts, pieces, keep=keep, named="here")


def make_state(number: int) -> State:
    state = State(
        {"zero": np.array(number), "none": np.zeros((0, 3), np.float32), "flags": np.array([True, False])},
        {"number": number, "large": 2**127 + number, "exact": 0.1 + number},
    )
    state.put_texts("texts", ["", f"täxt {number}", "\t\n"])
    state.arrays["weights"] = np.full(3000, number, np.float32)
    return state


def make_meta(number: int, dim: int = 3) -> CheckpointMeta:
    return CheckpointMeta(
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        encoder_version="e",
        dim=dim,
        offsets={"behaviours": {0: number}},
        cluster_id="c",
        topic_ids={},
        config={},
        code_sha256="",
        rows_trained=number,
        rows_sha256="",
    )


def make_journal(folder: Path) -> JournalStore:
    stores = [
        FolderArtifactStore(folder, entries=name, pointer=f"{name}.json", named="here")
        for name in ("journal", "vectors")
    ]
    return JournalStore(*stores, named="here")


def make_checkpointer(
    folder: Path,
    log: ClusterTopics = LOG,
    encoder: str | None = None,
    *,
    read_log: Callable[[], ClusterTopics] | None = None,
    **trainer: object,
) -> Checkpointer:
    config = learning_config(TrainerConfig.model_validate(trainer).model_dump(mode="json"), "ciubm", {})
    return Checkpointer(
        make_store(folder),
        make_journal(folder),
        read_log=read_log or (lambda: log),
        config=config,
        encoder_version=encoder,
        fence=OLD,
        every_events=100_000,
        clock=lambda: 1e9,
    )


class SnapshotChain:
    """Snapshots one after the other, each of what changed since the one before it, as `Checkpointer` writes them."""

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self.since: str | None = None
        self._held: dict[str, RowsHeld] = {}

    def write(self, state: State, fence: Fence | None = OLD, *, erased: Collection[str] = ()) -> CheckpointMeta:
        """Write the next one from a state that was not frozen."""
        frozen = state.frozen(self._held)
        meta = self.store.write(frozen, make_meta(1), fence, since=self.since, erased=erased)
        self.since, self._held = meta.snapshot_id, {name: copy.held for name, copy in frozen.copies.items()}
        return meta

    def load(self) -> State:
        """What a restart finds; it goes on from there."""
        found = self.store.load(self.store.current_id() or "")
        tables = found.meta.tables
        self.since = found.meta.snapshot_id
        self._held = {name: RowsHeld(table.count, 0, table.lap, table.row) for name, table in tables.items()}
        return found.state
