"""Training from topics alone: `embeddings` and `behaviours` into the sliding-window trainer.

```text
embeddings  ──> whole topic first, then on and on ──> put, delete ────┐
                                                                      ├─> advance, step ──> counts, scores, offsets
behaviours  ──> aligned by event time ──> observe, idle ──────────────┘                 └─> checkpoint, release
```

This is the loop: it reads, and calls the others in turn.

| module | decides |
| --- | --- |
| `feed.py` | what the trainer is given next |
| `trainer_thread.py` | what happens in the worker thread, where everything that touches the trainer runs |
| `checkpointing.py` | when a checkpoint is written, and how it is restored |
| `release_schedule.py` | when a release is made, and what has to come before it |
| `promotion_gate.py` | whether a candidate replaces the serving release |
| `release_publisher.py` | how a release becomes readable, announced and current |
| `offset_commits.py` | when offsets are committed for the consumer group |
| `state_publisher.py` | when states of items are written for servers |
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import structlog

from schemas.errors import Misconfigured, Unavailable
from streams.broker.forgotten import ForgottenFollower
from streams.runtime.interval import IntervalTimer
from streams.stores.artifacts.checkpoints import Checkpoint
from streams.training.checkpointing import Checkpointer, restore
from streams.training.click_log_watch import ClickLogWatch
from streams.training.feed import Feed
from streams.training.input import TrainingInput
from streams.training.offset_commits import OffsetCommits
from streams.training.release_schedule import ReleaseScheduler
from streams.training.reports import NO_COUNTS, TrainReport, TrainReports
from streams.training.state_publisher import StatePublisher
from streams.training.trainer_thread import StepResult, TrainerThread, in_thread

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.online.trainer import OnlineTrainer

log = structlog.get_logger()

_WAIT_SECONDS = 0.2
_POLL_SECONDS = 1.0
_WATCH_SECONDS = 60.0
_STEP_LINE_SECONDS = 1.0


class TrainingLoop:
    """Drives one trainer with what `reads` gives; checkpoints, releases, commits, states where it got what does so.

    A bounded input is trained to its end, finished, and the run returns; figures then depend on the topics alone.
    """

    def __init__(
        self,
        reads: TrainingInput,
        thread: TrainerThread,
        reports: TrainReports,
        *,
        checkpointer: Checkpointer | None = None,
        releases: ReleaseScheduler | None = None,
        commits: OffsetCommits | None = None,
        states: StatePublisher | None = None,
        follower: ForgottenFollower | None = None,
        clock: Callable[[], float],
    ) -> None:
        self._reads = reads
        self._thread = thread
        self._reports = reports
        self._checkpointer = checkpointer
        self._releases = releases
        self._commits = commits
        self._states = states
        self._follower = follower
        self._clock = clock
        self._feed = Feed(reads, thread.waits, clock=clock)
        self._stop = asyncio.Event()
        self._missing: frozenset[str] = frozenset()
        self._steps_not_logged = 0
        self._step_line = IntervalTimer(_STEP_LINE_SECONDS, clock)
        self._poll = IntervalTimer(_POLL_SECONDS, clock)
        self._watch = ClickLogWatch(IntervalTimer(_WATCH_SECONDS, clock))

    @property
    def trainer(self) -> OnlineTrainer | None:
        """The trainer; None before the first embedding."""
        return self._thread.trainer

    # ---- the loop ------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event, resume: Checkpoint | None = None) -> None:
        """Train, from a checkpoint if there is one, until `stop` is set, or to the end of a bounded input.

        Raises `Fenced` as soon as another trainer has taken over, `Misconfigured` if the log was replaced or cut off
        under the trainer or if training diverged, `BrokerUnavailable` if Kafka does not answer at the start.
        """
        self._stop = stop
        try:
            await self._reads.open()
            shadow = await restore(resume, self._thread)
            if self._releases is not None:
                self._releases.resume(shadow)
            if self._follower is not None:
                await self._follower.open()
                await self._follower.catch_up()
            if self._states is not None:
                await self._states.open()
            while not stop.is_set() and not await self._reads.all_embeddings_at_start_read():
                await self._read_embeddings()  # of all items that there are: old clicks need no waiting for them
            await in_thread(self._thread.delete_unnamed)
            log.info("train.ready", partitions=len(self._reads.partitions), encoder=self._reads.encoder_version)
            await self._wait_for_first_embedding()
            result = None
            while self.trainer is not None and not stop.is_set():
                result = await self._go_on(self.trainer, result)
                await self._catch_up()
                if result is not None and result.finishing and not result.steps and not self._missing:
                    break
            await self._leave()
        finally:
            if self._commits is not None:
                self._commits.cancel()
            if self._states is not None:
                await self._states.close()
            if self._checkpointer is not None:
                self._checkpointer.cancel()
            if self._follower is not None:
                await self._follower.close()
            await self._reads.close()

    async def _wait_for_first_embedding(self) -> None:
        """Without an embedding their width is not known, and there is nothing to learn about content."""
        if self.trainer is not None:
            return
        if self._reads.bounded:
            which = f" of encoder {self._reads.encoder_version}" if self._reads.encoder_version else ""
            raise Misconfigured(
                f"topic 'embeddings' holds no vector{which}: run 'mimstream index' first, or set "
                "MIM_TRAIN__ENCODER_VERSION"
            )
        log.info("train.waiting_for_first_vector")
        while self.trainer is None and not self._stop.is_set():
            await self._read_embeddings()

    async def _read_embeddings(self) -> None:
        await self._reads.fetch(embeddings=True, behaviours=False, wait_seconds=_WAIT_SECONDS)
        await in_thread(self._thread.put_embeddings)
        await self._catch_up()

    async def _go_on(self, trainer: OnlineTrainer, before: StepResult | None) -> StepResult | None:
        """Fetch, and run the trainer if there is anything for it to do."""
        if self._releases is None:
            if trainer.release_due():
                await in_thread(trainer.begin_next)  # no candidate is wanted, and the journal must not grow for ever
        elif not await self._releases.release_if_due(trainer):
            await in_thread(self._thread.forget)  # a release may wait for long; users who ask do not
            return before
        busy = before is not None and before.steps > 0
        await self._reads.fetch(
            embeddings=not self._reads.bounded,
            behaviours=True,
            wait_seconds=0 if busy or self._reads.has_embeddings else _WAIT_SECONDS,
        )
        batch = self._feed.next(trainer, self._missing)
        if batch.empty and not busy and not self._thread.has_more:
            return None
        stop, releases = self._stop, self._releases is not None
        result = await in_thread(lambda: self._thread.run_once(batch, stop=stop, releases=releases))
        self._missing = result.missing
        if result.scored:
            await self._reports.add_scores(result.scored)
        self._log_steps(trainer, result)
        if self._checkpointer is not None and self._checkpointer.due(self._thread) and not trainer.release_due():
            await self._checkpointer.checkpoint(self._thread)  # a release takes its own
        return result

    def _log_steps(self, trainer: OnlineTrainer, result: StepResult) -> None:
        self._steps_not_logged += result.steps
        if result.steps and self._step_line.passed:
            self._step_line.begin()
            losses = {name: round(loss, 5) for name, loss in result.losses.items()}
            log.info("train.stepped", steps=self._steps_not_logged, rows=trainer.progress.rows, loss=losses)
            self._steps_not_logged = 0

    async def _catch_up(self) -> None:
        """What goes on whatever else happens: leadership, a half-made release, checkpoints, offsets, reports."""
        if self._commits is not None:
            self._commits.confirm()
        if self._releases is not None:
            await self._releases.catch_up()
        just_written = self._checkpointer is not None and self._checkpointer.just_written
        if self._checkpointer is not None and just_written and await self._checkpointer.written() and self._commits:
            self._commits.commit_soon()
        if self._follower is not None and self._poll.passed:
            self._poll.begin()
            try:
                await self._follower.poll(wait_seconds=0)
            except Unavailable as error:
                log.warning("train.broker_away", error=str(error))
        if self._commits is not None:
            await self._commits.commit_if_due()
        if self._states is not None:
            await self._states.publish_if_due()
        if self._reports.due:
            report = self.report()
            draws = self.trainer is not None and self.trainer.config.draw_exposures > 0
            self._watch.look(report, draws=draws)
            await self._reports.write(report)

    async def _leave(self) -> None:
        """Release the rest of a bounded input, and write, commit and report for the last time."""
        if self._reads.bounded and self._releases is not None:
            await self._releases.release_rest(self._stop)
        if self._checkpointer is not None:
            await self._checkpointer.checkpoint(self._thread)
            await self._checkpointer.written()
        if self._states is not None:
            await self._states.publish_rest(self._stop)
        if self._commits is not None:
            await self._commits.commit_final()
        await self._reports.write(self.report())

    def report(self) -> TrainReport:
        """Where training stands."""
        trainer, thread = self.trainer, self._thread
        publisher = None if self._releases is None else self._releases.publisher
        return TrainReport(
            accounts=NO_COUNTS if trainer is None else asdict(trainer.intake.counts),
            kinds={} if trainer is None else dict(trainer.intake.kinds),
            late_by_partition={} if trainer is None else dict(trainer.intake.late.by_partition),
            late_events=() if trainer is None else tuple(trainer.intake.late.newest),
            offsets=thread.report_offsets(),
            corrected=0 if trainer is None else trainer.progress.corrected,
            upgraded=0 if trainer is None else trainer.progress.upgraded,
            takes={} if trainer is None else trainer.progress.taken.snapshot(),
            takes_too_late=0 if trainer is None else trainer.intake.takes_too_late,
            steps=0 if trainer is None else trainer.progress.steps,
            rows_trained=0 if trainer is None else trainer.progress.rows,
            rows_sha256="" if trainer is None else trainer.progress.rows_sha256,
            releases=0 if publisher is None else publisher.released,
            refused=0 if publisher is None else publisher.refused,
            held=0 if publisher is None else publisher.held,
            release_id=None if publisher is None else publisher.current_id,
            not_serving=None if publisher is None else publisher.not_serving,
            last_event_at=thread.last_event_at,
            waiting_for=len(self._missing),
            given_up=thread.waits.timeouts,
            trees=None if trainer is None else trainer.trees,
            ids_forgotten=0 if trainer is None else trainer.intake.window.ids_dropped,
            open_transactions=self._reads.transactions.open,
            broken_vectors=self._reads.broken_vectors,
            other_encoders=self._reads.other_encoders,
            prequential=thread.metrics,
            updated_at=self._clock(),
        )
