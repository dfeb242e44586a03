"""What a restart goes on from: the trainer and the loop around it, copied between two turns and put back at the start.

A snapshot carries the offsets that were read so far; a restart reads on from there, whatever the group's offsets say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

import structlog

from schemas.errors import StoreUnavailable
from streams.stores.artifacts.checkpoints import Checkpoint
from streams.training.checkpointing import Checkpointer
from streams.training.reports import LoopProgress
from streams.training.scores import ScoreFiles
from streams.training.trainer_thread import TrainerThread, in_thread
from trainer.online.embedding_wait import EmbeddingWait
from trainer.samples.forgotten import ForgottenUsers

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.online.trainer import OnlineTrainer
    from trainer.state import State

log = structlog.get_logger()


class Restore:
    """Copies and puts back one trainer's surroundings; `keeping` writes what it copies, where snapshots are wanted."""

    def __init__(
        self,
        turns: TrainerThread,
        waits: EmbeddingWait,
        figures: LoopProgress,
        *,
        gone: ForgottenUsers | None,
        scores: ScoreFiles | None,
    ) -> None:
        self._turns = turns
        self._waits = waits
        self._figures = figures
        self._gone = gone
        self._scores = scores
        self.keeping: Checkpointer | None = None

    async def begin(self, found: Checkpoint | None, beginnings: Mapping[int, int]) -> State | None:
        """Stand where the snapshot was taken, if there is one, and keep the scores up to there; its trial, if any.

        `beginnings` are the first offsets that there are of `behaviours`. Raises `Misconfigured` if the snapshot
        cannot be read by this version.
        """
        at, trial = None, None
        if found is not None:
            at = await self._put_back(found, beginnings)
            trial = found.state.part("trial") if "trial" in found.state.values else None
        if self._scores is not None:
            await asyncio.to_thread(self._scores.open, at)
        return trial

    async def _put_back(self, found: Checkpoint, beginnings: Mapping[int, int]) -> tuple[int, int] | None:
        """Put trainer and surroundings back; returns the place of the newest score."""
        meta, state = found.meta, found.state
        trainer = self._turns.make(meta.encoder_version, meta.dim)
        with found.restoring():
            await asyncio.to_thread(trainer.restore, state.part("trainer"))
            trainer.intake.window.forget_overtaken(beginnings)
            loop = state.part("loop").values
            self._waits.restore(loop["waits"], trainer.catalogue.items_with_vector)
            self._figures.last_event_at, self._figures.metrics = loop["last_event_at"], loop["metrics"]
            self._figures.rows = trainer.progress.rows
            if self._gone is not None:
                self._gone.restore(loop["gone"])
            if self.keeping is not None:
                self.keeping.stand_at(trainer, loop["begins"])
            at = loop["scores"]
            newest = at and (at[0], at[1])
        self._turns.trainer = trainer
        return newest

    async def snapshot(self) -> bool:
        """Copy everything between two turns; it is written beside what goes on. False if that cannot begin now."""
        trainer, keeping = self._turns.trainer, self.keeping
        if trainer is None or keeping is None:
            return True
        # who is forgotten is so on disk before a snapshot says it: nobody is told of it once more after that
        await in_thread(lambda: self._turns.forget(trainer))
        try:
            if self._scores is not None:
                await asyncio.to_thread(self._scores.flush)
        except StoreUnavailable as error:
            log.warning("snapshot.not_written", error=str(error))
            return False
        await keeping.snapshot(
            trainer,
            lambda: in_thread(lambda: self._copied(trainer)),
            lambda: {
                "behaviours": self._turns.within_log(trainer.intake.offsets.next_to_read()),
                "embeddings": self._turns.vectors_read(),
            },
        )
        return True

    def _copied(self, trainer: OnlineTrainer) -> State:
        from trainer.state import State  # torch's neighbours

        self._turns.hold_vectors()  # what was fetched lies before the offsets that are kept
        state = State()
        state.put("trainer", trainer.snapshot())
        if trainer.shadow is not None:
            state.put("trial", trainer.shadow.snapshot())
        state.values["loop"] = {
            "waits": self._waits.snapshot(),
            "last_event_at": self._figures.last_event_at,
            "metrics": dict(self._figures.metrics),
            "gone": {} if self._gone is None else self._gone.snapshot(),
            "begins": {} if self.keeping is None else {str(p): offset for p, offset in self.keeping.begins.items()},
            "scores": None if self._scores is None else self._scores.place,
        }
        return state
