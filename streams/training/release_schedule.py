"""When a release is made: as soon as enough was learned, not before one can be made, and never in the middle of a turn.

A release is preceded by a snapshot of the very state it is made of: what was released is never learned again, whoever
is killed when. While one is due and cannot be made, nothing is learned, and the next one's rows begin only once it is
in the store: no row falls between two releases. One candidate is on trial at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from schemas.errors import Misconfigured, StoreUnavailable, Unavailable
from schemas.manifests import ModelManifest, PromotionDecision, TopicOffsets
from streams.broker.leadership import Leadership
from streams.runtime.interval import IntervalTimer
from streams.training.releaser import ReleasePublisher
from streams.training.reports import LoopProgress
from streams.training.resume import Restore
from streams.training.trainer_thread import TrainerThread, in_thread
from trainer.online.gate import NO_ROWS, GateConfig, judge

if TYPE_CHECKING:
    from trainer.online.trainer import Candidate, OnlineTrainer
    from trainer.state import State


if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.online.trainer import Candidate, OnlineTrainer
    from trainer.state import State

log = structlog.get_logger()

_WAIT_SECONDS = 0.2
_RETRY_SECONDS = 5.0


class ReleaseScheduler:
    """Acts between two turns. Without `make_releaser` nothing is released, and candidates are taken for nobody.

    `make_releaser` gets encoder version and width of the vectors; whoever gives it gives the leadership that releases
    are made under. `every` is the wall time between two releases, where that comes before enough rows.
    """

    def __init__(
        self,
        turns: TrainerThread,
        resuming: Restore,
        figures: LoopProgress,
        *,
        leadership: Leadership | None,
        make_releaser: Callable[[str, int], ReleasePublisher] | None,
        gate: GateConfig,
        every: IntervalTimer | None,
    ) -> None:
        self._turns = turns
        self._resuming = resuming
        self._figures = figures
        self._leadership = leadership
        self._make_releaser = make_releaser
        self._gate = gate
        self._every = every
        if every is not None:
            every.begin()
        self._gating: PromotionGate | None = None
        self._waiting: tuple[Candidate, TopicOffsets] | None = None
        """A candidate that snapshot and journal hold, and the store does not have yet."""
        self.releaser: ReleasePublisher | None = None
        """Once there is a trainer whose candidates it may release."""
        self.trial: State | None = None
        """A trial that a snapshot held, until it goes on."""

    @property
    def releases(self) -> bool:
        """Whether candidates become releases at all."""
        return self._make_releaser is not None

    async def keep_up(self) -> None:
        """Take the role up once there is a trainer, and finish a half-made release."""
        trainer = self._turns.trainer
        if self.releaser is None and self._make_releaser is not None and trainer is not None:
            releaser = self._make_releaser(trainer.encoder_version, trainer.catalogue.dim)
            await releaser.take_over()
            self.releaser, self._gating = releaser, PromotionGate(releaser, self._gate)
            if self.trial is not None:
                await self._gating.go_on(trainer, self.trial)
                self.trial = None
        if self.releaser is not None and self.releaser.unfinished:
            try:
                await self.releaser.finish()
            except Unavailable as error:
                log.warning("train.release_delayed", error=str(error))
                await asyncio.sleep(_WAIT_SECONDS)

    async def before_turn(self, trainer: OnlineTrainer) -> bool:
        """Release if enough was learned; False while it is due and has to wait: nothing is learned meanwhile."""
        if trainer.shadow is not None:
            if trainer.shadow.complete and self._may_release():
                await self._decide(trainer)
            if trainer.shadow is not None:
                return True  # one candidate at a time: the next is taken once this one was decided about
        if not self.releases and trainer.release_due():
            await in_thread(trainer.begin_next)  # for nobody: the journal begins anew, and does not grow for ever
        due = trainer.release_due() or self._overdue(trainer) or self._waiting is not None
        if not self.releases or not due:
            return True
        if not self._may_release():
            await asyncio.sleep(_WAIT_SECONDS)
            return False
        return await self._release(trainer)

    async def last(self, stop: asyncio.Event) -> None:
        """Release what was learned since the newest release, after a bounded run."""
        while self._leadership is not None and not self._leadership.settled and not stop.is_set():
            self._leadership.confirm()  # an election is going on; it ends, one way or the other
            await asyncio.sleep(_WAIT_SECONDS)
        trainer = self._turns.trainer
        if trainer is not None and self._figures.rows and self._may_release():
            await self._decide(trainer)
            await self._release(trainer, more_rows=False)

    def _overdue(self, trainer: OnlineTrainer) -> bool:
        return self._every is not None and bool(trainer.progress.rows_since_release) and self._every.passed

    def _may_release(self) -> bool:
        """Whether a release could be made now; where it can not, it stays due."""
        releaser, leadership = self.releaser, self._leadership
        return releaser is not None and leadership is not None and leadership.settled and not releaser.unfinished

    async def _release(self, trainer: OnlineTrainer, *, more_rows: bool = True) -> bool:
        """Release what was learned; False if it has to wait, and nothing may be learned meanwhile."""
        releaser, gating, turns = self.releaser, self._gating, self._turns
        assert releaser is not None
        assert gating is not None
        if not releaser.beyond_current(turns.within_log(trainer.intake.offsets.learned_below())):
            await in_thread(trainer.begin_next)  # learned again what was released before: go on to where it ended
            return True
        if self._waiting is None and not await self._prepare(trainer):
            await asyncio.sleep(_RETRY_SECONDS)  # what cannot be gone on from, or rebuilt, is no release
            return False
        assert self._waiting is not None
        candidate, offsets = self._waiting
        try:
            await gating.admit(trainer, candidate, offsets, more_rows=more_rows)
        except Unavailable as error:
            log.warning("train.release_delayed", error=str(error))
            await asyncio.sleep(_RETRY_SECONDS)
            return False
        self._waiting = None
        await in_thread(trainer.begin_next)
        if self._every is not None:
            self._every.begin()
        keeping = self._resuming.keeping
        if keeping is not None:
            try:
                await keeping.forget_segments_but(releaser.segments)
            except Unavailable as error:
                log.warning("train.release_delayed", error=str(error))
        return True

    async def _prepare(self, trainer: OnlineTrainer) -> bool:
        """Keep the state that the release is made of, and its journal; then take the candidate. False: not now."""
        turns, keeping = self._turns, self._resuming.keeping
        if keeping is not None:
            kept = await self._resuming.snapshot() and await keeping.written()
            if not kept or not await keeping.segment(trainer, turns.within_log(trainer.intake.offsets.next_to_read())):
                return False

        def copy() -> tuple[Candidate, TopicOffsets]:
            candidate = trainer.candidate()
            return candidate, {"behaviours": turns.within_log(candidate.offsets), "embeddings": turns.vectors_read()}

        self._waiting = await in_thread(copy)
        self._figures.metrics = self._waiting[0].metrics
        return True

    async def _decide(self, trainer: OnlineTrainer) -> None:
        """Decide about the candidate on trial."""
        assert self._gating is not None
        try:
            await self._gating.decide(trainer)
        except Unavailable as error:
            log.warning("train.release_delayed", error=str(error))


log = structlog.get_logger()


class PromotionGate:
    """Works on one trainer, between its turns."""

    def __init__(self, releaser: ReleasePublisher, config: GateConfig) -> None:
        self._releaser = releaser
        self._config = config
        self._on_trial: ModelManifest | None = None

    async def admit(
        self, trainer: OnlineTrainer, candidate: Candidate, offsets: TopicOffsets, *, more_rows: bool = True
    ) -> None:
        """Publish a candidate and put it on trial, or decide at once where there is nothing to try it on.

        Raises as `ReleasePublisher.publish` does.
        """
        published = await self._releaser.publish(candidate, offsets)
        manifest = published.manifest
        if published.verdict is not None:
            if published.verdict.passed and not published.was_current:
                await self._releaser.carry_out(manifest, published.verdict)
            return
        from trainer.online.shadow_evaluation import ShadowEvaluation, not_finite  # torch

        bad = not_finite(candidate.weights)
        slow = trainer.config.release_every_rows >= 2 * self._config.trial_rows
        serving = await self._releaser.serving() if more_rows and slow and not bad else None
        if serving is None:
            verdict = judge(NO_ROWS, self._config, against=None, not_finite=bad)
            if not slow:
                verdict = verdict.model_copy(update={"remarks": ["not compared: candidates follow faster than trials"]})
            await self._conclude(manifest, verdict)
            return
        try:
            trainer.shadow = ShadowEvaluation(
                (candidate.weights, manifest), serving, rows_needed=self._config.trial_rows
            )
        except Misconfigured as error:
            # what answers cannot be scored here: it must not keep what is sound away for ever
            log.warning("train.not_compared", release_id=manifest.release_id, error=str(error))
            await self._conclude(manifest, judge(NO_ROWS, self._config, against=None))
            return
        self._on_trial = manifest
        log.info("train.on_trial", release_id=manifest.release_id, against=trainer.shadow.against)

    async def decide(self, trainer: OnlineTrainer) -> None:
        """Give the verdict of the trial as it stands, and carry it out. Raises `StoreUnavailable`; the trial stays."""
        trial, manifest = trainer.shadow, self._on_trial
        if trial is None or manifest is None:
            return
        verdict = await asyncio.to_thread(judge, trial.compared, self._config, against=trial.against)
        verdict = await self._releaser.attach(manifest, verdict)
        trainer.shadow = self._on_trial = None  # only now: a store that is away is asked again
        await self._releaser.carry_out(manifest, verdict)

    async def go_on(self, trainer: OnlineTrainer, state: State) -> None:
        """Go on with the trial of a snapshot, unless it was decided since."""
        from trainer.online.shadow_evaluation import ShadowEvaluation  # torch

        release_id, against = state.values["release_id"], state.values["against"]
        try:
            candidate, serving = await self._releaser.both(release_id, against)
            published = await self._releaser.decided(candidate[1])
            if published is None:
                trial = ShadowEvaluation(candidate, serving, rows_needed=self._config.trial_rows)
                trial.restore(state)
                trainer.shadow, self._on_trial = trial, candidate[1]
            elif published.verdict is not None and published.verdict.passed and not published.was_current:
                await self._releaser.carry_out(published.manifest, published.verdict)
        except (StoreUnavailable, Misconfigured, KeyError, ValueError) as error:
            log.warning("train.trial_lost", release_id=release_id, against=against, error=str(error))

    async def _conclude(self, manifest: ModelManifest, verdict: PromotionDecision) -> None:
        await self._releaser.carry_out(manifest, await self._releaser.attach(manifest, verdict))
