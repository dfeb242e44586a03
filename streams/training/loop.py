"""Training from topics alone: `embeddings` and `behaviours` into the sliding-window trainer.

```text
embeddings  ──> whole topic first, then on and on ──> hold, drop ─┐
                                                                  ├─> advance, step ──> accounts, scores, offsets
behaviours  ──> aligned by event time ──> observe, idle ──────────┘                 └─> snapshot, release, if we lead
```

This is the loop: it reads, and in turns lets the others act.

| module | decides |
| --- | --- |
| `portions.py` | what the trainer is given next |
| `turns.py` | what happens in the worker thread, where everything that touches the trainer runs |
| `release_cadence.py` | when a release is made, and what has to come before it |
| `resuming.py` | what is copied into a snapshot, and how it is put back |
| `group_offsets.py` | when the consumer group is told how far training has got |
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from schemas.errors import Misconfigured, StoreUnavailable, Unavailable
from streams.broker.forgotten import ForgetUsers, ForgottenFollower
from streams.broker.leadership import Leadership
from streams.runtime.interval import IntervalTimer
from streams.stores.artifacts.checkpoints import Checkpoint
from streams.training.checkpointing import Checkpointer, Checkpoints
from streams.training.config import TrainConsumerConfig
from streams.training.feed import Feed
from streams.training.input import TrainingInput
from streams.training.offset_commits import GroupOffsets
from streams.training.release_schedule import ReleaseScheduler
from streams.training.releaser import ReleasePublisher
from streams.training.reports import NO_ACCOUNTS, LoopProgress, TrainReport, write_accounts
from streams.training.resume import Restore
from streams.training.scores import ScoreFiles
from streams.training.trainer_thread import StepResult, TrainerThread, in_thread
from trainer.online.embedding_wait import EmbeddingWait
from trainer.online.gate import GateConfig
from trainer.samples.forgotten import ForgottenUsers

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.metrics import ScoredRows
    from trainer.online.trainer import OnlineTrainer

log = structlog.get_logger()

_WAIT_SECONDS = 0.2
_LOOK_SECONDS = 1.0
_STEP_LINE_SECONDS = 1.0


class TrainOnBehaviours:
    """Drives one trainer with what `reads` gives, and releases if it was given a releaser's maker.

    `bounded` trains to the end of a bounded input, finishes and returns; figures then depend on the topics alone.
    `make_trainer`, `vectors_anew`: see `TrainerThread`; `make_releaser`, `leadership`: see `ReleaseScheduler`.
    """

    def __init__(
        self,
        config: TrainConsumerConfig,
        reads: TrainingInput,
        *,
        behaviours_topic: str,
        make_trainer: Callable[[str, int, Sequence[int]], OnlineTrainer],
        clock: Callable[[], float],
        leadership: Leadership | None = None,
        make_releaser: Callable[[str, int], ReleasePublisher] | None = None,
        snapshots: Checkpoints | None = None,
        resume: Checkpoint | None = None,
        vectors_anew: bool = False,
        gone: ForgottenUsers | None = None,
        follow_forgotten: Callable[[ForgetUsers], ForgottenFollower] | None = None,
        gate: GateConfig | None = None,
        bounded: bool = False,
        state_folder: Path | None = None,
        scores: ScoreFiles | None = None,
        on_scored: Callable[[Sequence[ScoredRows]], None] = lambda scored: None,
        on_report: Callable[[TrainReport], None] = lambda report: None,
    ) -> None:
        self._reads = reads
        self._clock = clock
        self._leadership = leadership
        self._snapshots = snapshots
        self._snapshot_every_events = config.snapshot_every_events
        self._resume = resume
        self._bounded = bounded
        self._state_folder = state_folder
        self._scores = scores
        self._on_scored = on_scored
        self._on_report = on_report

        self._figures = LoopProgress()
        self._waits = EmbeddingWait(timeout_seconds=config.hold_seconds)
        self._portions = Feed(reads, self._waits, bounded=bounded, clock=clock)
        self._turns = TrainerThread(
            reads, self._waits, make_trainer, gone=gone, scores=scores, vectors_anew=vectors_anew
        )
        self._resuming = Restore(self._turns, self._waits, self._figures, gone=gone, scores=scores)
        every = config.release_every_seconds
        self._cadence = ReleaseScheduler(
            self._turns,
            self._resuming,
            self._figures,
            leadership=leadership,
            make_releaser=make_releaser,
            gate=gate or GateConfig(),
            every=None if every is None else IntervalTimer(every, clock),
        )
        self._follower = None if follow_forgotten is None else follow_forgotten(self._turns.to_forget)
        self._group: GroupOffsets | None = None
        if leadership is not None:
            seconds = config.commit_interval_seconds
            self._group = GroupOffsets(leadership, topic=behaviours_topic, interval_seconds=seconds, clock=clock)
        self._stop = asyncio.Event()
        self._missing: frozenset[str] = frozenset()
        self._steps_not_logged = 0
        self._step_line = IntervalTimer(_STEP_LINE_SECONDS, clock)
        self._look = IntervalTimer(_LOOK_SECONDS, clock)
        self._report_interval = IntervalTimer(config.report_interval_seconds, clock)

    @property
    def trainer(self) -> OnlineTrainer | None:
        """The trainer; None before the first vector."""
        return self._turns.trainer

    # ---- the loop ------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Train until `stop` is set, or to the end of a bounded run.

        Raises `Fenced` as soon as another trainer has taken over, `Misconfigured` if the log was replaced or cut off
        under the trainer or if training diverged, `BrokerUnavailable` if Kafka does not answer at the start.
        """
        self._stop = stop
        try:
            await self._reads.open()
            await self._begin()
            if self._follower is not None:
                await self._follower.open()
                await self._follower.catch_up()
            await self._read_vectors_first()
            await in_thread(self._turns.drop_unnamed)
            log.info("train.ready", partitions=len(self._reads.partitions), encoder=self._reads.encoder_version)
            await self._wait_for_first_vector()
            turn = None
            while self.trainer is not None and not stop.is_set():
                turn = await self._go_on(self.trainer, turn)
                await self._keep_up()
                if turn is not None and turn.finishing and not turn.progressed and not self._missing:
                    break
            await self._leave()
        finally:
            if self._group is not None:
                self._group.cancel()
            if self._resuming.keeping is not None:
                self._resuming.keeping.cancel()
            if self._follower is not None:
                await self._follower.close()
            await self._reads.close()

    async def _begin(self) -> None:
        if self._snapshots is not None:
            every = self._snapshot_every_events
            self._resuming.keeping = Checkpointer(self._snapshots, every_events=every, begins=self._reads.starts)
        found, self._resume = self._resume, None
        self._cadence.trial = await self._resuming.begin(found, self._reads.beginnings)

    async def _read_vectors_first(self) -> None:
        """Everything the center holds now comes before the first behaviour: old clicks need no waiting for it."""
        while not self._stop.is_set() and not await self._reads.read_all_vectors_of_the_start():
            await self._read_vectors()

    async def _wait_for_first_vector(self) -> None:
        """Without a vector nobody knows how wide vectors are, and there is nothing to learn about content."""
        if self.trainer is not None:
            return
        if self._bounded:
            which = f" of encoder {self._reads.encoder_version}" if self._reads.encoder_version else ""
            raise Misconfigured(
                f"topic 'embeddings' holds no vector{which}: run 'mimstream index' first, or set "
                "MIM_TRAIN__ENCODER_VERSION"
            )
        log.info("train.waiting_for_first_vector")
        while self.trainer is None and not self._stop.is_set():
            await self._read_vectors()

    async def _read_vectors(self) -> None:
        await self._reads.fetch(embeddings=True, behaviours=False, wait_seconds=_WAIT_SECONDS)
        await in_thread(self._turns.hold_vectors)
        await self._keep_up()

    async def _go_on(self, trainer: OnlineTrainer, before: StepResult | None) -> StepResult | None:
        """Fetch, and give the trainer a turn if there is anything for it to do."""
        if not await self._cadence.before_turn(trainer):
            await in_thread(lambda: self._turns.forget(trainer))  # a release may wait for long; who asked does not
            return before
        busy = before is not None and before.progressed
        await self._reads.fetch(
            embeddings=not self._bounded,
            behaviours=True,
            wait_seconds=0 if busy or self._reads.has_vectors else _WAIT_SECONDS,
        )
        portion = self._portions.next(trainer, self._missing)
        if portion.empty and not busy and not self._turns.has_more:
            return None
        stop, releases = self._stop, self._cadence.releases
        turn = await in_thread(lambda: self._turns.take(trainer, portion, stop=stop, releases=releases))
        await self._after(trainer, turn)
        return turn

    async def _after(self, trainer: OnlineTrainer, turn: StepResult) -> None:
        self._missing = turn.missing
        self._figures.rows += turn.rows
        self._steps_not_logged += turn.steps
        if turn.scored:
            self._figures.last_event_at = turn.last_event_at
            self._on_scored(turn.scored)
            if self._scores is not None:
                await asyncio.to_thread(self._scores.add, turn.scored)
        if turn.steps and self._step_line.passed:
            self._step_line.begin()
            losses = {name: round(loss, 5) for name, loss in turn.losses.items()}
            log.info("train.stepped", steps=self._steps_not_logged, rows=self._figures.rows, loss=losses)
            self._steps_not_logged = 0
        keeping = self._resuming.keeping
        if keeping is not None and keeping.due(trainer) and not trainer.release_due():
            await self._resuming.snapshot()  # a release takes its own

    async def _keep_up(self) -> None:
        """Look after what goes on whatever else happens: role, half-made release, offsets, reports."""
        if self._leadership is not None:
            self._leadership.confirm()
        await self._cadence.keep_up()
        keeping, group = self._resuming.keeping, self._group
        if keeping is not None and keeping.just_written and await keeping.written() and group is not None:
            group.tell_soon()
        if self._follower is not None and self._look.passed:
            self._look.begin()
            try:
                await self._follower.poll(wait_seconds=0)
            except Unavailable as error:
                log.warning("train.broker_away", error=str(error))
        if group is not None:
            await group.keep_up(self._turns.settled)
        if self._report_interval.passed:
            await self._report()

    async def _leave(self) -> None:
        """Say for the last time how far training has got."""
        if self._bounded:
            await self._cadence.last(self._stop)
        await self._resuming.snapshot()
        if self._resuming.keeping is not None:
            await self._resuming.keeping.written()
        if self._group is not None:
            await self._group.last(self._turns.settled)
        await self._report()

    # ---- what is told --------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        self._report_interval.begin()
        report = self.standing()
        try:
            if self._state_folder is not None:
                await asyncio.to_thread(write_accounts, self._state_folder, report)
            if self._scores is not None:
                await asyncio.to_thread(self._scores.flush)
        except StoreUnavailable as error:
            log.warning("train.not_reported", error=str(error))
        self._on_report(report)

    def standing(self) -> TrainReport:
        """Where training stands."""
        trainer, releaser = self.trainer, self._cadence.releaser
        return TrainReport(
            accounts=NO_ACCOUNTS if trainer is None else asdict(trainer.intake.counts),
            offsets={"behaviours": self._turns.settled(), "embeddings": self._turns.vectors_read()},
            corrected=0 if trainer is None else trainer.progress.corrected,
            steps=0 if trainer is None else trainer.progress.steps,
            rows_trained=self._figures.rows,
            rows_sha256="" if trainer is None else trainer.progress.rows_sha256,
            releases=0 if releaser is None else releaser.released,
            refused=0 if releaser is None else releaser.refused,
            held=0 if releaser is None else releaser.held,
            release_id=None if releaser is None else releaser.current_id,
            last_event_at=self._figures.last_event_at,
            waiting_for=len(self._missing),
            given_up=self._waits.timeouts,
            broken_vectors=self._reads.broken_vectors,
            other_encoders=self._reads.other_encoders,
            prequential=self._figures.metrics,
            updated_at=self._clock(),
        )
