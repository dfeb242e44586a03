"""Which snapshot a trainer may go on from, and what is kept beside its own state: whose it is, and its journal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog

from schemas.errors import Misconfigured, Unavailable
from schemas.manifests import Fence, TopicOffsets
from streams.broker.cluster import ClusterTopics
from streams.stores.artifacts.checkpoints import Checkpoint, CheckpointMeta, CheckpointStore, code_hash
from streams.stores.artifacts.journal import JournalStore, Present, SegmentMeta
from streams.training.config import ANEW
from trainer.samples.join_rules import JoinRules

if TYPE_CHECKING:
    from trainer.online.trainer import OnlineTrainer
    from trainer.state import State


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


class Checkpoints:
    """Snapshots of one log, one configuration and one code, under the fence of the trainer that leads."""

    def __init__(
        self,
        store: CheckpointStore,
        journal: JournalStore,
        *,
        read_log: Callable[[], ClusterTopics],
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
        self._log: ClusterTopics | None = None

    def resume(self, snapshot_id: str | None = None, *, anew: bool = False) -> Checkpoint | None:
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
        self, state: State, offsets: TopicOffsets, *, encoder_version: str, dim: int, rows: int, rows_sha256: str
    ) -> CheckpointMeta:
        """Keep a snapshot. Blocking.

        Raises `Fenced`, `StoreUnavailable`, and `Misconfigured` if the log was replaced since the start.
        """
        if self._read_log() != self._log:
            raise Misconfigured(
                "a topic was deleted and created again, or got more partitions, while training: what was learned no "
                f"longer belongs to it. Start `mimstream train` again, with {ANEW}"
            )
        assert self._log is not None
        meta = CheckpointMeta(
            created_at=datetime.fromtimestamp(self._clock(), UTC),
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

    def _refuse_foreign(self, meta: CheckpointMeta) -> None:
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


log = structlog.get_logger()


class Checkpointer:
    """One snapshot is written at a time. A disk that is full costs the snapshot, not the one before it."""

    def __init__(self, snapshots: Checkpoints, *, every_events: int, begins: Mapping[int, int]) -> None:
        self._snapshots = snapshots
        self._every_events = every_events
        self._received = 0
        self._writing: asyncio.Task[None] | None = None
        self.begins = dict(begins)
        """Per partition of `behaviours`, where this lineage of snapshots began to read."""

    def stand_at(self, trainer: OnlineTrainer, begins: Mapping[str, int]) -> None:
        """The trainer stands where a snapshot was taken."""
        self._received = trainer.intake.counts.received
        self.begins = {int(number): offset for number, offset in begins.items()}

    def due(self, trainer: OnlineTrainer) -> bool:
        """Whether enough was read since the last snapshot, and none is being written."""
        return self._writing is None and trainer.intake.counts.received - self._received >= self._every_events

    async def snapshot(
        self, trainer: OnlineTrainer, copy: Callable[[], Awaitable[State]], offsets: Callable[[], TopicOffsets]
    ) -> None:
        """Copy everything between two turns, and write it beside what goes on."""
        await self.written()
        self._received = trainer.intake.counts.received
        state = await copy()
        about = (
            offsets(),
            trainer.encoder_version,
            trainer.catalogue.dim,
            trainer.progress.rows,
            trainer.progress.rows_sha256,
        )

        def write() -> None:
            at, version, dim, rows, rows_sha256 = about
            self._snapshots.write(state, at, encoder_version=version, dim=dim, rows=rows, rows_sha256=rows_sha256)

        self._writing = asyncio.create_task(asyncio.to_thread(write))

    @property
    def just_written(self) -> bool:
        """Whether a snapshot has come to its end that `written` has not told of."""
        return self._writing is not None and self._writing.done()

    async def written(self) -> bool:
        """Wait until the snapshot that is being written is written; False if it could not be.

        Raises `Fenced` if a later trainer writes here, `Misconfigured` if the log was replaced.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return True
        try:
            await writing
        except Unavailable as error:  # the broker counts too: it is asked whether the log is still the same
            log.warning("snapshot.not_written", error=str(error))
            return False
        return True

    async def segment(self, trainer: OnlineTrainer, ends: Mapping[int, int]) -> bool:
        """Keep the journal of the rows that the next release adds; False if it cannot be written now."""
        try:
            await asyncio.to_thread(
                self._snapshots.keep_segment,
                trainer.journal.segment(),
                begins=self.begins,
                ends=ends,
                overtaken=list(trainer.intake.window.overtaken),
                rules=JoinRules.of(trainer.config, self.begins).settings,
                encoder_version=trainer.encoder_version,
                dim=trainer.catalogue.dim,
            )
        except Unavailable as error:
            log.warning("journal.not_written", error=str(error))
            return False
        return True

    async def forget_segments_but(self, kept: Callable[[], Awaitable[Collection[str]]]) -> None:
        """Forget the journals of releases that are gone; `kept` asks for the others. Raises `StoreUnavailable`."""
        present = await asyncio.to_thread(self._snapshots.segments_present)
        await asyncio.to_thread(self._snapshots.forget_segments_but, await kept(), present)

    def cancel(self) -> None:
        """Wait for nothing any more."""
        if self._writing is not None:
            self._writing.cancel()
