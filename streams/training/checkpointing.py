"""Checkpoints: everything a restart continues from, copied between two calls of the trainer and put back at the start.

A checkpoint carries the offsets that were read so far; a restart reads on from there, whatever the group's offsets say.

```text
Checkpointer.load ──> restore ──> training ──> Checkpointer.checkpoint, every so many events and before each release
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from schemas.errors import Misconfigured, StoreUnavailable, Unavailable
from schemas.field_maps import FieldMap
from schemas.manifests import Fence, TopicOffsets
from streams.broker.cluster import TRAINING_TOPICS, ClusterTopics
from streams.stores.artifacts.checkpoints import BaseGone, Checkpoint, CheckpointMeta, CheckpointStore, code_hash
from streams.stores.artifacts.journal import JournalStore, SegmentMeta
from streams.training.config import ANEW
from streams.training.trainer_thread import TrainerThread, in_thread
from trainer.changed_rows import RowsHeld
from trainer.online.config import TrainerConfig
from trainer.samples.join_rules import JoinRules

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.state import State

log = structlog.get_logger()

HARMLESS = ("release_every_rows", "release_every_event_seconds", "pending_megabytes", "remembered_items")
"""Settings of the trainer that decide when something happens, not what is learned."""
_RETIRED = ("MIM_TRAINER__CORRECTION_ROWS",)
"""Settings of earlier builds that this one has replaced."""


def learning_config(trainer: Mapping[str, Any], variants: str, field_map: FieldMap) -> dict[str, Any]:
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


def of_earlier_build(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a snapshot as this build has them: what an earlier one did not have counts as its default."""
    defaults = learning_config(TrainerConfig().model_dump(mode="json"), "", {})
    return defaults | {name: value for name, value in config.items() if name not in _RETIRED}


class Checkpointer:
    """Checkpoints and journal of one log, one configuration and one code, under the fence of the trainer that leads.

    One checkpoint is written at a time, beside training. A disk that is full costs that one, not the one before it.
    """

    def __init__(
        self,
        store: CheckpointStore,
        journal: JournalStore,
        *,
        read_log: Callable[[], ClusterTopics],
        config: Mapping[str, Any],
        encoder_version: str | None,
        fence: Fence | None,
        every_events: int,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._journal = journal
        self._read_log = read_log
        self._config = dict(config)
        self._encoder_version = encoder_version
        self._fence = fence
        self._every_events = every_events
        self._clock = clock
        self._code = code_hash()
        self._log: ClusterTopics | None = None
        self._writing: asyncio.Task[CheckpointMeta] | None = None
        self._since: str | None = None
        self._held: Mapping[str, RowsHeld] = {}
        self._to_erase: list[str] = []

    # ---- blocking ------------------------------------------------------------------------------------------------

    def load(self, snapshot_id: str | None = None, *, anew: bool = False) -> Checkpoint | None:
        """Load the checkpoint to go on from; None if there is none.

        `snapshot_id` names one that is kept; by default it is the current one. `anew` goes on from none.

        Raises `Misconfigured` if it belongs to another log, encoder or configuration.
        """
        self._log = self._read_log()
        chosen = snapshot_id or self._store.current_id()
        if anew or not chosen:
            return None
        found = self._store.load(chosen)
        self._refuse_foreign(found.meta, self._log)
        if found.meta.code_sha256 != self._code:
            log.warning("snapshot.other_code", snapshot=chosen, code_sha256=found.meta.code_sha256, ours=self._code)
        self._since = chosen
        self._held = {name: RowsHeld(table.count, 0, table.lap, table.row) for name, table in found.meta.tables.items()}
        log.info("snapshot.resumed", snapshot=chosen, rows=found.meta.rows_trained, offsets=found.meta.offsets)
        return found

    def save(
        self, state: State, offsets: TopicOffsets, *, encoder_version: str, dim: int, rows: int, rows_sha256: str
    ) -> CheckpointMeta:
        """Write a checkpoint; of tables that changed since the one before it, `state` has the changed rows alone.

        Raises `Fenced`, `StoreUnavailable`, and `Misconfigured` if the log was replaced since `load`.
        """
        before = self._loaded_log()
        before.refuse_replaced(self._read_log(), way_out=f"Start `mimstream train` again, with {ANEW}")
        meta = CheckpointMeta(
            created_at=datetime.fromtimestamp(self._clock(), UTC),
            encoder_version=encoder_version,
            dim=dim,
            offsets=offsets,
            cluster_id=before.cluster_id,
            topic_ids=before.topic_ids,
            config=self._config,
            code_sha256=self._code,
            rows_trained=rows,
            rows_sha256=rows_sha256,
        )
        erased = list(self._to_erase)
        try:
            written = self._store.write(state, meta, self._fence, since=self._since, erased=erased)
        except BaseGone:
            self._since, self._held = None, {}  # the next one holds everything
            raise
        self._since, self._held = written.snapshot_id, {name: copy.held for name, copy in state.copies.items()}
        del self._to_erase[: len(erased)]
        return written

    # ---- between two calls of the trainer ------------------------------------------------------------------------

    def due(self, thread: TrainerThread) -> bool:
        """Whether enough was read since the last checkpoint, and none is being written."""
        return self._writing is None and thread.events_since_snapshot >= self._every_events

    async def checkpoint(self, thread: TrainerThread) -> bool:
        """Copy everything, and write it beside what goes on; False if that cannot begin now.

        Raises as `written` does, about the checkpoint before.
        """
        trainer = thread.trainer
        if trainer is None:
            return True
        # users are forgotten on disk before a checkpoint says so: after it, their requests are not read again
        await in_thread(thread.forget)
        try:
            if thread.scores is not None:
                await asyncio.to_thread(thread.scores.flush)
        except StoreUnavailable as error:
            log.warning("snapshot.not_written", error=str(error))
            return False
        await self.written()
        state = await in_thread(partial(thread.snapshot, self._held))
        self._to_erase += thread.take_erased()
        save = partial(
            self.save,
            state,
            thread.read_offsets(),
            encoder_version=trainer.encoder_version,
            dim=trainer.catalogue.dim,
            rows=trainer.progress.rows,
            rows_sha256=trainer.progress.rows_sha256,
        )
        self._writing = asyncio.create_task(asyncio.to_thread(save))
        return True

    @property
    def just_written(self) -> bool:
        """Whether a checkpoint came to its end whose result `written` has not returned."""
        return self._writing is not None and self._writing.done()

    async def written(self) -> bool:
        """Wait for the checkpoint that is being written; False if it could not be.

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

    async def before_release(self, thread: TrainerThread) -> bool:
        """Write the state that a release is made of, and its journal; False if one of them cannot be written now."""
        return await self.checkpoint(thread) and await self.written() and await self._write_segment(thread)

    async def after_release(self, kept: Callable[[], Awaitable[Collection[str]]]) -> None:
        """Remove the journals of releases that are gone; `kept` asks for the others. Raises `StoreUnavailable`."""
        present = await asyncio.to_thread(self._journal.present)
        await asyncio.to_thread(self._journal.retain, await kept(), present, self._fence)

    def cancel(self) -> None:
        """Wait for no checkpoint any more."""
        if self._writing is not None:
            self._writing.cancel()

    async def _write_segment(self, thread: TrainerThread) -> bool:
        trainer, log_then = thread.trainer, self._loaded_log()
        assert trainer is not None, "nothing was trained"
        segment, begins = trainer.journal.segment(), thread.begins()
        meta = SegmentMeta(
            segment_id=segment.name,
            root=segment.root,
            rows=segment.rows,
            encoder_version=trainer.encoder_version,
            dim=trainer.catalogue.dim,
            cluster_id=log_then.cluster_id,
            topic_ids={name: of for name, of in log_then.topic_ids.items() if name in TRAINING_TOPICS},
            begins=begins,
            ends=thread.read_offsets()["behaviours"],
            overtaken=list(trainer.intake.window.dropped_by_idle),
            rules=JoinRules.of(trainer.config, begins).settings,
            fence=self._fence,
        )
        try:
            await asyncio.to_thread(self._journal.write, segment, meta)
        except Unavailable as error:
            log.warning("journal.not_written", error=str(error))
            return False
        return True

    def _loaded_log(self) -> ClusterTopics:
        assert self._log is not None, "load comes first"
        return self._log

    def _refuse_foreign(self, meta: CheckpointMeta, log_now: ClusterTopics) -> None:
        which = f"snapshot {meta.snapshot_id}"
        anew = "or train anew with an empty MIM_TRAIN__SNAPSHOT_FOLDER"
        log_now.refuse_other(which, meta.cluster_id, meta.topic_ids, or_else=f"train anew with {ANEW}")
        partitions = {name: sorted(parts) for name, parts in meta.offsets.items()}
        if partitions != {name: log_now.partitions[name] for name in partitions}:
            raise Misconfigured(
                f"{which} covers partitions {partitions}, the topics have {log_now.partitions} now: keys have moved. "
                f"Create the topics as they were, {anew}"
            )
        if self._encoder_version not in (None, meta.encoder_version):
            raise Misconfigured(
                f"{which} goes with vectors of encoder {meta.encoder_version}, this trainer is to read "
                f"{self._encoder_version}: set MIM_TRAIN__ENCODER_VERSION to the former, or train anew with {ANEW}"
            )
        then = of_earlier_build(meta.config)
        if then != self._config:
            names = sorted(then.keys() | self._config.keys())
            changed = [
                f"{name} was {then.get(name)!r}, is {self._config.get(name)!r}"
                for name in names
                if then.get(name) != self._config.get(name)
            ]
            raise Misconfigured(f"{which} was learned otherwise ({'; '.join(changed)}): set it back, {anew}")


async def restore(found: Checkpoint | None, thread: TrainerThread) -> State | None:
    """Put trainer and surroundings back where the checkpoint was taken, if there is one, with the scores up to there.

    Returns the shadow evaluation that was going on then, if any. Raises `Misconfigured` if the checkpoint cannot be
    read by this version.
    """
    shadow = None
    if found is not None:
        meta, state = found.meta, found.state
        with found.restoring():
            await asyncio.to_thread(thread.restore, state, encoder_version=meta.encoder_version, dim=meta.dim)
        shadow = state.part("trial") if "trial" in state.values else None
    if thread.scores is not None:
        scored = None if thread.trainer is None else thread.trainer.progress.scored
        await asyncio.to_thread(thread.scores.open, scored)
    return shadow
