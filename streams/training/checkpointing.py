"""Which snapshot a trainer may go on from, and what is kept beside its own state: whose it is, and its journal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import structlog

from schemas.errors import Misconfigured
from schemas.manifests import Fence, Offsets
from streams.stores.artifacts.checkpoints import Snapshot, SnapshotMeta, SnapshotStore, code_hash, moment
from streams.stores.artifacts.journal import JournalStore, Present, SegmentMeta
from streams.training.config import ANEW
from streams.training.input import InputTopics

if TYPE_CHECKING:
    from trainer.provenance.journal import Segment
    from trainer.state import State

log = structlog.get_logger()

HARMLESS = ("release_every_rows", "release_every_event_seconds", "max_pending")
"""Settings of the trainer that decide when something happens, not what is learned."""


def learning_config(trainer: Mapping[str, Any], variants: str, field_map: Mapping[str, str]) -> dict[str, Any]:
    """All settings that decide what is learned from a log, flat, under the names people set them by."""
    flat: dict[str, Any] = {}

    def walk(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{name.upper()}__")
            else:
                flat[f"{prefix}{name.upper()}"] = list(value) if isinstance(value, tuple) else value

    walk({name: value for name, value in trainer.items() if name not in HARMLESS}, "MIM_TRAINER__")
    flat["MIM_TRAIN__VARIANTS"] = variants
    flat["MIM_RECORD__FIELD_MAP"] = dict(field_map)
    return flat


class Snapshots:
    """Snapshots of one log, one configuration and one code, under the fence of the trainer that leads."""

    def __init__(
        self,
        store: SnapshotStore,
        journal: JournalStore,
        *,
        read_log: Callable[[], InputTopics],
        config: Mapping[str, Any],
        encoder_version: str | None,
        fence: Fence | None,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._journal = journal
        self._read_log = read_log
        self._config = dict(config)
        self._encoder_version = encoder_version
        self._fence = fence
        self._clock = clock
        self._code = code_hash()
        self._log: InputTopics | None = None

    def resume(self, snapshot_id: str | None = None, *, anew: bool = False) -> Snapshot | None:
        """Take the snapshots over, and load the one to go on from; None if there is none. Blocking.

        `snapshot_id` names one that is kept; by default it is the current one. `anew` goes on from none.

        Raises `Misconfigured` if it belongs to another log, encoder or configuration, `Fenced` if a later trainer
        writes here.
        """
        self._log = self._read_log()
        if self._fence is not None:
            self._store.take_over(self._fence)
        chosen = snapshot_id or self._store.current_id()
        if anew or not chosen:
            return None
        found = self._store.load(chosen)
        self._refuse_foreign(found.meta)
        if found.meta.code_sha256 != self._code:
            log.warning("snapshot.other_code", snapshot=chosen, code_sha256=found.meta.code_sha256, ours=self._code)
        log.info("snapshot.resumed", snapshot=chosen, rows=found.meta.rows_trained, offsets=found.meta.offsets)
        return found

    def write(
        self, state: State, offsets: Offsets, *, encoder_version: str, dim: int, rows: int, rows_sha256: str
    ) -> SnapshotMeta:
        """Keep a snapshot. Blocking.

        Raises `Fenced`, `StoreUnavailable`, and `Misconfigured` if the log was replaced since the start.
        """
        if self._read_log() != self._log:
            raise Misconfigured(
                "a topic was deleted and created again, or got more partitions, while training: what was learned no "
                f"longer belongs to it. Start `mimstream train` again, with {ANEW}"
            )
        assert self._log is not None
        meta = SnapshotMeta(
            created_at=moment(self._clock()),
            encoder_version=encoder_version,
            dim=dim,
            offsets=offsets,
            cluster_id=self._log.cluster_id,
            topic_ids=self._log.topic_ids,
            config=self._config,
            code_sha256=self._code,
            rows_trained=rows,
            rows_sha256=rows_sha256,
        )
        return self._store.write(state, meta, self._fence)

    def keep_segment(
        self,
        segment: Segment,
        *,
        begins: Mapping[int, int],
        ends: Mapping[int, int],
        overtaken: Sequence[tuple[int, int]],
        rules: Mapping[str, float],
        encoder_version: str,
        dim: int,
    ) -> None:
        """Keep the journal of the rows of a release, and the vectors they saw. Blocking. Raises `StoreUnavailable`."""
        assert self._log is not None
        meta = SegmentMeta(
            segment_id=segment.name,
            root=segment.root,
            rows=segment.rows,
            encoder_version=encoder_version,
            dim=dim,
            cluster_id=self._log.cluster_id,
            topic_ids=self._log.topic_ids,
            begins=dict(begins),
            ends=dict(ends),
            overtaken=list(overtaken),
            rules=dict(rules),
            fence=self._fence,
        )
        self._journal.write(segment, meta)

    def segments_present(self) -> Present:
        """The journals that there are. Blocking."""
        return self._journal.present()

    def forget_segments_but(self, kept: Collection[str], among: Present) -> None:
        """Forget the journals `among` these whose releases are gone. Blocking."""
        self._journal.retain(kept, among, self._fence)

    def _refuse_foreign(self, meta: SnapshotMeta) -> None:
        assert self._log is not None
        which = f"snapshot {meta.snapshot_id}"
        anew = "or train anew with an empty MIM_TRAIN__SNAPSHOT_FOLDER"
        if (meta.cluster_id, meta.topic_ids) != (self._log.cluster_id, self._log.topic_ids):
            raise Misconfigured(
                f"{which} was taken from other topics, in cluster {meta.cluster_id}: its offsets mean nothing in "
                f"cluster {self._log.cluster_id}. Set MIM_KAFKA__BOOTSTRAP_SERVERS and MIM_TOPICS__PREFIX to where it "
                f"came from, or train anew with {ANEW}"
            )
        partitions = {name: sorted(parts) for name, parts in meta.offsets.items()}
        if partitions != {name: self._log.partitions[name] for name in partitions}:
            raise Misconfigured(
                f"{which} covers partitions {partitions}, the topics have {self._log.partitions} now: keys have moved. "
                f"Create the topics as they were, {anew}"
            )
        if self._encoder_version not in (None, meta.encoder_version):
            raise Misconfigured(
                f"{which} goes with vectors of encoder {meta.encoder_version}, this trainer is to read "
                f"{self._encoder_version}: set MIM_TRAIN__ENCODER_VERSION to the former, or train anew with {ANEW}"
            )
        if meta.config != self._config:
            names = sorted(meta.config.keys() | self._config.keys())
            changed = [
                f"{name} was {meta.config.get(name)!r}, is {self._config.get(name)!r}"
                for name in names
                if meta.config.get(name) != self._config.get(name)
            ]
            raise Misconfigured(f"{which} was learned otherwise ({'; '.join(changed)}): set it back, {anew}")
