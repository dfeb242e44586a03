"""When a release is made: as soon as enough was learned, not before one can be made, and never in the middle of a call.

A release is preceded by a checkpoint of the very state it is made of: what was released is never learned again, at
whatever moment a trainer is killed. While one is due and cannot be made, nothing is learned, and the next one's rows
begin only once it is in the store: no row falls between two releases. One candidate at a time is in shadow evaluation.

```text
due ──> checkpoint, journal ──> candidate ──> PromotionGate.admit ──> the next candidate's rows begin
```

A log that ends is learned to its last rows; those are held back until the gate compares on them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from schemas.errors import Unavailable
from schemas.manifests import TopicOffsets
from streams.broker.leadership import Leadership
from streams.runtime.interval import IntervalTimer
from streams.training.checkpointing import Checkpointer
from streams.training.promotion_gate import PromotionGate
from streams.training.release_publisher import ReleasePublisher
from streams.training.trainer_thread import TrainerThread, in_thread
from trainer.samples.rows import plain_row_bytes

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.online.trainer import Candidate, OnlineTrainer
    from trainer.state import State

log = structlog.get_logger()

_WAIT_SECONDS = 0.2
_RETRY_SECONDS = 5.0


class ReleaseScheduler:
    """Acts between two calls of the trainer, under `leadership`.

    `every` is the wall time between two releases, where that comes before enough rows. Without a `checkpointer`
    releases are made of what no checkpoint holds. With `until_end` the log ends.
    """

    def __init__(
        self,
        thread: TrainerThread,
        publisher: ReleasePublisher,
        gate: PromotionGate,
        leadership: Leadership,
        *,
        checkpointer: Checkpointer | None = None,
        every: IntervalTimer | None = None,
        until_end: bool = False,
    ) -> None:
        self._thread = thread
        self.publisher = publisher
        self._gate = gate
        self._leadership = leadership
        self._checkpointer = checkpointer
        self._every = every
        if every is not None:
            every.begin()
        self._waiting: tuple[Candidate, TopicOffsets] | None = None
        """A candidate that checkpoint and journal hold, and the store does not have yet."""
        self._shadow: State | None = None
        self._until_end = until_end
        self._holds_back = self._at_last_rows = False
        self._compared_with: str | None = None

    def resume(self, shadow: State | None) -> None:
        """Continue this shadow evaluation of a checkpoint with the next `catch_up`."""
        self._shadow = shadow

    async def catch_up(self) -> None:
        """Take the store over once there is a trainer, and finish a half-made release; what is away is waited for."""
        trainer, publisher = self._thread.trainer, self.publisher
        try:
            if not publisher.taken_over and trainer is not None:
                await publisher.take_over(encoder_version=trainer.encoder_version, dim=trainer.catalogue.dim)
                if self._shadow is not None:
                    await self._gate.resume(trainer, self._shadow)
                    self._shadow = None
            if publisher.unfinished:
                await publisher.finish()
        except Unavailable as error:
            log.warning("train.release_delayed", error=str(error))
            await asyncio.sleep(_WAIT_SECONDS)

    async def release_if_due(self, trainer: OnlineTrainer) -> bool:
        """Release if enough was learned; False while it is due and has to wait: nothing may be learned meanwhile."""
        if not self.publisher.taken_over:
            return False  # a candidate of a checkpoint may be under comparison, on the rows that come next
        if self._until_end and not await self._reach_last_rows(trainer):
            return False
        if trainer.stand_in is not None:
            return True  # the last candidate of the log is the next one
        if trainer.shadow is not None:
            if trainer.shadow.complete and self._may_release():
                await self._decide(trainer)
            if trainer.shadow is not None:
                return True  # one candidate at a time: the next is taken once this one was decided about
        if not (trainer.release_due() or self._overdue(trainer) or self._waiting is not None):
            return True
        if not self._may_release():
            await asyncio.sleep(_WAIT_SECONDS)
            return False
        if not await self._release(trainer):
            return False
        return not self._until_end or await self._reach_last_rows(trainer)  # it may be the first to compare with

    async def release_rest(self, stop: asyncio.Event) -> None:
        """Release what was learned since the newest release, at the end of a log.

        A run that is stopped before its end releases nothing more: its checkpoint has what it learned.
        """
        trainer = self._thread.trainer
        while trainer is not None and trainer.progress.rows and not stop.is_set():
            await self.catch_up()
            self._leadership.confirm()  # an election may be going on; it ends, one way or the other
            if self._may_release() and await self._release_last(trainer):
                break
            await asyncio.sleep(_WAIT_SECONDS)
        while self.publisher.unfinished and not stop.is_set():
            await self.catch_up()

    async def _release_last(self, trainer: OnlineTrainer) -> bool:
        try:
            await self._gate.give_up(trainer, "the log ended before it was compared")
            if trainer.progress.rows_since_release and not self.publisher.beyond_current(
                self._thread.trained_offsets()
            ):
                await self.publisher.say_not_beyond(await in_thread(trainer.candidate))
        except Unavailable as error:
            log.warning("train.release_delayed", error=str(error))
            return False
        return await self._release(trainer, more_rows=False)

    async def _reach_last_rows(self, trainer: OnlineTrainer) -> bool:
        """Hold the last rows back, and begin to compare on them once they are reached; False if that has to wait."""
        if not self._holds_back:
            # not so many that reading, which pauses at that much memory, never comes to the end
            most = 1e6 * trainer.config.pending_megabytes / 2 / plain_row_bytes(trainer.config.history_length)
            trainer.intake.hold_back(min(self._gate.last_rows, max(1, int(most))))
            self._holds_back = True
        others = self._at_last_rows and self._compared_with != self.publisher.current_id  # a first release among them
        if not (trainer.intake.at_last_rows or others):
            return True
        try:
            if self._may_release():
                await self._gate.begin_last_rows(trainer)
                self._at_last_rows, self._compared_with = True, self.publisher.current_id
                return True
        except Unavailable as error:
            log.warning("train.release_delayed", error=str(error))
        await asyncio.sleep(_WAIT_SECONDS)
        return False

    def _overdue(self, trainer: OnlineTrainer) -> bool:
        return self._every is not None and bool(trainer.progress.rows_since_release) and self._every.passed

    def _may_release(self) -> bool:
        """Whether a release could be made now; where it cannot, it stays due."""
        return self.publisher.taken_over and self._leadership.settled and not self.publisher.unfinished

    async def _release(self, trainer: OnlineTrainer, *, more_rows: bool = True) -> bool:
        """Release what was learned; False if it has to wait, and nothing may be learned meanwhile."""
        if not self.publisher.beyond_current(self._thread.trained_offsets()):
            await in_thread(trainer.begin_next)  # learned again what was released before: go on to where it ended
            return True
        if self._waiting is None:
            if self._checkpointer is not None and not await self._checkpointer.before_release(self._thread):
                await asyncio.sleep(_RETRY_SECONDS)  # what cannot be restored, or rebuilt, is no release
                return False
            self._waiting = await in_thread(self._thread.candidate)
        candidate, offsets = self._waiting
        try:
            await self._gate.admit(trainer, candidate, offsets, more_rows=more_rows)
        except Unavailable as error:
            log.warning("train.release_delayed", error=str(error))
            await asyncio.sleep(_RETRY_SECONDS)
            return False
        self._waiting = None
        await in_thread(trainer.begin_next)
        if self._every is not None:
            self._every.begin()
        if self._checkpointer is not None:
            try:
                await self._checkpointer.after_release(self.publisher.segments)
            except Unavailable as error:
                log.warning("train.release_delayed", error=str(error))
        return True

    async def _decide(self, trainer: OnlineTrainer) -> None:
        """Decide about the candidate in shadow evaluation; one whose decision cannot be kept now stays in it."""
        try:
            await self._gate.decide(trainer)
        except Unavailable as error:
            log.warning("train.release_delayed", error=str(error))
