"""Loads a snapshot with one file replaced and its checksum corrected, and restores a trainer from it.

python tests/fuzz/snapshots.py        writes the whole snapshot of today's trainer into the corpus
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent.parent))

from streams.stores.artifacts.artifact_store import FolderArtifactStore  # noqa: E402
from streams.stores.artifacts.checkpoints import META_FILE, STATE_FILE, VALUES_FILE, CheckpointStore  # noqa: E402
from tests.factories.feeding import observe_all, pump  # noqa: E402
from tests.factories.samples import click_log, make_trainer, small_config  # noqa: E402
from trainer.networks.config import CiUBMConfig, TreesConfig  # noqa: E402
from trainer.online.trainer import OnlineTrainer  # noqa: E402

POINTER_FILE = "current.json"
CORPUS_OF = {
    META_FILE: "snapshot-meta",
    STATE_FILE: "snapshot-state",
    VALUES_FILE: "snapshot-values",
    POINTER_FILE: "snapshot-pointer",
}
_SMALL = CiUBMConfig(
    id_width=2, id_rows=16, id_admit_after=1, content_width=4, hidden=(4,), attention_hidden=2,
    trees=TreesConfig(count=2, depth=2, leaves=4, leaf_rows=2, rows=24, first_rows=12),
)  # fmt: skip
_CONFIG = small_config(
    bank_takes=5, window_takes=4, space_negatives=2, time_negatives=2, max_users=4, model=_SMALL, batch_rows=4
)


def fresh() -> OnlineTrainer:
    """A trainer as small as they get."""
    return make_trainer(_CONFIG, items=6)


def _store(folder: Path) -> CheckpointStore:
    artifacts = FolderArtifactStore(folder, entries="snapshots", pointer=POINTER_FILE, named="here")
    pieces = FolderArtifactStore(folder, entries="pieces", pointer="pieces.json", named="here")
    return CheckpointStore(artifacts, pieces, keep=2, named="here")


@cache
def whole() -> dict[str, bytes]:
    """The files of the snapshot that the corpus keeps."""
    return {file: (HERE / "corpus" / corpus / "whole").read_bytes() for file, corpus in CORPUS_OF.items()}


def with_file(name: str) -> Callable[[bytes], None]:
    """Load and restore the snapshot that has this file instead. Raises `Misconfigured`."""

    def run(data: bytes) -> None:
        files = whole() | {name: data}
        packed, values = files[STATE_FILE], files[VALUES_FILE]
        if name in (STATE_FILE, VALUES_FILE):
            sums = {"state_sha256": hashlib.sha256(packed).hexdigest()}
            sums["values_sha256"] = hashlib.sha256(values).hexdigest()
            files[META_FILE] = json.dumps(json.loads(files[META_FILE]) | sums).encode()
        with tempfile.TemporaryDirectory() as folder:
            snapshot_id = json.loads(whole()[META_FILE])["snapshot_id"]
            entry = Path(folder) / "snapshots" / snapshot_id
            entry.mkdir(parents=True)
            for file in (META_FILE, STATE_FILE, VALUES_FILE):
                (entry / file).write_bytes(files[file])
            (Path(folder) / POINTER_FILE).write_bytes(files[POINTER_FILE])
            store = _store(Path(folder))
            found = store.load(store.current_id() or snapshot_id)
            trainer = fresh()
            with found.restoring():
                trainer.restore(found.state.part("trainer"))

    return run


def _write() -> None:
    from datetime import UTC, datetime

    from streams.stores.artifacts.checkpoints import CheckpointMeta
    from trainer.state import State

    trainer = fresh()
    observe_all(trainer, click_log(24, users=3, items=6)[0])
    pump(trainer)
    state = State()
    state.put("trainer", trainer.snapshot())
    meta = CheckpointMeta(
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        encoder_version=trainer.encoder_version,
        dim=trainer.catalogue.dim,
        offsets={"behaviours": {0: 24}, "embeddings": {0: 6}},
        cluster_id="cluster",
        topic_ids={"behaviours": "b", "embeddings": "e"},
        config={"MIM_TRAINER__BATCH_ROWS": 4},
        code_sha256="",
        rows_trained=trainer.progress.rows,
        rows_sha256=trainer.progress.rows_sha256,
    )
    with tempfile.TemporaryDirectory() as folder:
        store = _store(Path(folder))
        first = store.write(state, meta, None).snapshot_id
        whole = store.load(first).state  # rows of tables among the other arrays, so that one file holds all
        snapshot_id = store.write(whole, meta, None).snapshot_id
        for file, corpus in CORPUS_OF.items():
            place = Path(folder) if file == POINTER_FILE else Path(folder) / "snapshots" / snapshot_id
            target = HERE / "corpus" / corpus
            target.mkdir(parents=True, exist_ok=True)
            (target / "whole").write_bytes((place / file).read_bytes())


if __name__ == "__main__":
    _write()
