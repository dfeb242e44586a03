"""Training from topics alone: `embeddings` and `behaviours` into the sliding-window trainer.

```text
embeddings  ──> whole topic first, then on and on ──> hold, drop ─┐
                                                                  ├─> advance, step ──> accounts, scores, offsets
behaviours  ──> aligned by event time ──> observe, idle ──────────┘                 └─> snapshot, release, if we lead
```

Everything is kept in snapshots, with the offsets that were read so far; a restart goes on from the newest, whatever the
group's offsets say. A release is preceded by a snapshot of the very state it is made of: what was released is never
learned again, whoever is killed when.

How far training has got is told to the consumer group `<prefix>train` (topic `behaviours`), although no group hands out
the data: lag tools and the back-pressure of a replay look there.

The loop never computes: everything that touches the trainer runs in a worker thread, one turn at a time. Snapshots on
the way are copied there and written beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import structlog
from aiokafka import TopicPartition

from schemas.errors import Misconfigured, StoreUnavailable, Unavailable
from schemas.forgotten import ForgottenUser
from schemas.manifests import Offsets
from streams.consumers.aligned_reading import Entry
from streams.consumers.forgotten import ForgottenUsers
from streams.consumers.forgotten_users import ForgottenFollower, Tell
from streams.consumers.gating import Gating
from streams.consumers.keeping import Keeping
from streams.consumers.leadership import Leadership
from streams.consumers.releasing import Releaser
from streams.consumers.snapshotting import Snapshots
from streams.consumers.train_config import TrainConsumerConfig
from streams.consumers.train_input import TrainingInput
from streams.consumers.train_ledger import NO_ACCOUNTS, ScoreFiles, TrainReport, write_accounts
from streams.consumers.vector_waits import VectorWaits
from streams.stores.snapshots import Snapshot
from trainer.gate import GateConfig

if TYPE_CHECKING:  # settings import this module for its configuration; no command should pay for torch because of that
    from trainer.evaluation import ScoredRows
    from trainer.online import Candidate, OnlineTrainer
    from trainer.state import State

log = structlog.get_logger()

T = TypeVar("T")

_CHUNK_EVENTS = 512
_WAIT_SECONDS = 0.2
_RETRY_SECONDS = 5.0
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What one visit to the worker thread did."""

    steps: int
    rows: int
    losses: Mapping[str, float]
    last_event_at: int | None
    progressed: bool
    """Whether another turn without new input may do more."""
    finishing: bool
    """Whether the trainer knows that nothing more will come."""
    missing: frozenset[str]
    scored: Sequence[ScoredRows]


class TrainOnBehaviours:
    """Drives one trainer with what `reads` gives, and releases if it was given a releaser's maker.

    `bounded` trains to the end of a bounded input, finishes and returns; figures then depend on the topics alone.
    `make_trainer` gets encoder version, width of its vectors and the partitions of `behaviours`; `make_releaser` gets
    the first two. Whoever gives a releaser gives the leadership that it acts under. `vectors_anew` says that `reads`
    gives all vectors from the beginning although there is a snapshot: items that it does not name are gone.
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
        make_releaser: Callable[[str, int], Releaser] | None = None,
        snapshots: Snapshots | None = None,
        resume: Snapshot | None = None,
        vectors_anew: bool = False,
        gone: ForgottenUsers | None = None,
        follow_forgotten: Callable[[Tell], ForgottenFollower] | None = None,
        gate: GateConfig | None = None,
        bounded: bool = False,
        state_folder: Path | None = None,
        scores: ScoreFiles | None = None,
        on_scored: Callable[[Sequence[ScoredRows]], None] = lambda scored: None,
        on_report: Callable[[TrainReport], None] = lambda report: None,
    ) -> None:
        self._config = config
        self._reads = reads
        self._topic = behaviours_topic
        self._make_trainer = make_trainer
        self._clock = clock
        self._leadership = leadership
        self._make_releaser = make_releaser
        self._snapshots = snapshots
        self._keeping: Keeping | None = None
        self._resume = resume
        self._told: set[str] | None = set() if vectors_anew else None
        self._gone = gone
        self._follower = None if follow_forgotten is None else follow_forgotten(self._take_forgotten)
        self._to_forget: list[str] = []
        self._released_at = clock()
        self._gate = gate or GateConfig()
        self._bounded = bounded
        self._state_folder = state_folder
        self._scores = scores
        self._on_scored = on_scored
        self._on_report = on_report

        self.trainer: OnlineTrainer | None = None
        self._releaser: Releaser | None = None
        self._gating: Gating | None = None
        self._waits = VectorWaits(hold_seconds=config.hold_seconds)
        self._chunk: list[Entry] = []
        self._stop = asyncio.Event()
        self._missing: frozenset[str] = frozenset()
        self._metrics: Mapping[str, float | None] = {}
        self._rows = 0
        self._steps_not_logged = 0
        self._last_event_at: int | None = None
        self._last_step_log = self._last_commit = self._last_report = self._last_look = float("-inf")
        self._commit: asyncio.Task[None] | None = None
        self._trial: State | None = None

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
            await self._in_thread(self._drop_untold)
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
            if self._commit is not None:
                self._commit.cancel()
            if self._keeping is not None:
                self._keeping.cancel()
            if self._follower is not None:
                await self._follower.close()
            await self._reads.close()

    async def _begin(self) -> None:
        """Stand where the snapshot was taken, if there is one, and keep the scores up to there."""
        found, at = self._resume, None
        if self._snapshots is not None:
            every = self._config.snapshot_every_events
            self._keeping = Keeping(self._snapshots, every_events=every, begins=self._reads.starts)
        if found is not None:
            meta, state, self._resume = found.meta, found.state, None
            trainer = self._make_trainer(meta.encoder_version, meta.dim, self._reads.partitions)
            try:
                await asyncio.to_thread(trainer.restore, state.part("trainer"))
            except (KeyError, ValueError) as error:
                raise Misconfigured(
                    f"snapshot {meta.snapshot_id} cannot be read by this version: {error!r}. Use the version that took "
                    "it, or train anew with an empty MIM_TRAIN__SNAPSHOT_FOLDER"
                ) from error
            trainer.forget_overtaken(self._reads.beginnings)
            loop = state.part("loop")
            self._waits.restore(loop.values["waits"], trainer.catalogue.items_with_vector)
            self._last_event_at, self._metrics = loop.values["last_event_at"], loop.values["metrics"]
            self._rows = trainer.rows
            at = loop.values["scores"]
            if self._gone is not None:
                self._gone.restore(loop.values["gone"])
            if self._keeping is not None:
                self._keeping.stand_at(trainer, loop.values["begins"])
            self._trial = state.part("trial") if "trial" in state.values else None
            self.trainer = trainer
        if self._scores is not None:
            await asyncio.to_thread(self._scores.open, at and (at[0], at[1]))

    async def _read_vectors_first(self) -> None:
        """Everything the center holds now comes before the first behaviour: old clicks need no waiting for it."""
        while not self._stop.is_set() and not await self._reads.read_all_vectors_of_the_start():
            await self._reads.fetch(embeddings=True, behaviours=False, wait_seconds=_WAIT_SECONDS)
            await self._in_thread(self._hold_vectors)
            await self._keep_up()

    def _drop_untold(self) -> None:
        """What the center does not hold any more was deleted, even where its tombstone is gone already."""
        told, self._told = self._told, None
        if told is not None and self.trainer is not None:
            for item_id in self.trainer.catalogue.items_with_vector:
                if item_id not in told:
                    self.trainer.drop(item_id)

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
            await self._reads.fetch(embeddings=True, behaviours=False, wait_seconds=_WAIT_SECONDS)
            await self._in_thread(self._hold_vectors)
            await self._keep_up()

    async def _go_on(self, trainer: OnlineTrainer, before: Turn | None) -> Turn | None:
        """Fetch, and give the trainer a turn if there is anything for it to do."""
        if not await self._release_if_due(trainer):
            return before
        busy = before is not None and before.progressed
        await self._reads.fetch(
            embeddings=not self._bounded,
            behaviours=True,
            wait_seconds=0 if busy or self._reads.has_vectors else _WAIT_SECONDS,
        )
        if self._may_feed(trainer):
            self._fill_chunk()
        idle = self._reads.newly_idle(except_for={entry.partition for entry in self._chunk})
        give_up = self._overdue()
        finish = self._bounded and self._reads.all_handed_out and not self._chunk
        entries: list[Entry] = []
        if self._chunk_is_due():
            entries, self._chunk = self._chunk, []
        if not (busy or entries or idle or give_up or finish or self._reads.has_vectors or self._to_forget):
            return None
        turn = await self._in_thread(lambda: self._turn(trainer, entries, idle, give_up, finish=finish))
        await self._after(turn)
        return turn

    def _may_feed(self, trainer: OnlineTrainer) -> bool:
        most = trainer.config.max_pending
        if trainer.pending < most:
            return True
        if self._missing or self._reads.waits_for_silence:
            return False
        # full, and nothing else to wait for: only later events can move the window on
        if trainer.pending < 2 * most:
            return True
        raise Misconfigured(
            f"{trainer.pending} events wait in memory and event time does not move on: raise "
            "MIM_TRAINER__MAX_PENDING, or lower MIM_TRAINER__LATENESS_SECONDS and MIM_TRAINER__ATTRIBUTION_SECONDS"
        )

    def _fill_chunk(self) -> None:
        taken = self._reads.take_behaviours(_CHUNK_EVENTS - len(self._chunk))
        for entry in taken:
            if entry.behaviour is not None:
                self._waits.needed(entry.behaviour.item_id, entry.produced_at)
        self._chunk.extend(taken)

    def _chunk_is_due(self) -> bool:
        # a bounded run feeds chunks of one size, so that nothing at all depends on how the broker answers
        if not self._bounded or self._reads.all_handed_out:
            return bool(self._chunk)
        return len(self._chunk) >= _CHUNK_EVENTS

    def _overdue(self) -> set[str]:
        if self._bounded:
            return set(self._missing)  # all vectors were read before: no other will come
        if not self._missing or not self._reads.vectors_are_current:
            return set()
        return self._waits.overdue(self._missing, self._clock())

    # ---- in the worker thread ------------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(work)
        except ArithmeticError as error:
            raise Misconfigured(
                f"training diverged: {error}. Nothing was released from it; lower MIM_TRAINER__LEARNER__LEARNING_RATE"
            ) from error

    def _hold_vectors(self) -> None:
        for record in self._reads.take_vectors():
            if self._told is not None:
                self._told.add(record.item_id)
            embedding = record.embedding
            if embedding is None:
                self._waits.answered(record.item_id, has_vector=False)
                if self.trainer is not None:
                    self.trainer.drop(record.item_id)
                continue
            if self.trainer is None:
                self.trainer = self._make_trainer(embedding.encoder_version, embedding.dim, self._reads.partitions)
            try:
                self.trainer.hold(embedding)
            except ValueError as error:
                log.warning("train.broken_vector", item_id=record.item_id, error=str(error))
            else:
                self._waits.answered(record.item_id, has_vector=True)

    def _forget(self, trainer: OnlineTrainer) -> None:
        users, self._to_forget = self._to_forget, []
        for user_id in users:
            log.info("train.user_forgotten", events=trainer.forget(user_id))
        if users and self._scores is not None:
            self._scores.forget(users)

    def _turn(
        self,
        trainer: OnlineTrainer,
        entries: Sequence[Entry],
        idle: Collection[int],
        give_up: Collection[str],
        *,
        finish: bool,
    ) -> Turn:
        """Feed the trainer and let it do what it can; stop early where a release can be made, or to end the process."""
        self._hold_vectors()
        self._forget(trainer)
        for entry in entries:
            if entry.behaviour is None:
                trainer.observe_broken(entry.partition, entry.offset)
            elif self._gone is not None and self._gone.erases(entry.behaviour.user_id, entry.partition, entry.offset):
                trainer.observe_erased(entry.partition, entry.offset)
            else:
                trainer.observe(entry.partition, entry.offset, entry.behaviour)
        trainer.idle(idle)
        if finish:
            trainer.finish()
        self._waits.give_up(give_up)
        missing = trainer.advance(give_up_on=give_up).missing
        reports = []
        progressed = enough = False
        while not enough and (report := trainer.step()) is not None:
            reports.append(report)
            progressed = True
            # which rows a release is made of is a matter of the rows alone: not one more, whatever holds it up
            due = trainer.release_due() if trainer.trial is None else trainer.trial.complete
            enough = self._stop.is_set() or (due and self._make_releaser is not None)
            missing = trainer.advance().missing
        return Turn(
            steps=len(reports),
            rows=sum(report.rows for report in reports),
            losses=reports[-1].losses if reports else {},
            last_event_at=reports[-1].last_event_at if reports else None,
            progressed=progressed,
            finishing=finish,
            missing=missing,
            scored=trainer.drain_scores(),
        )

    def _settled(self) -> dict[int, int]:
        settled = {} if self.trainer is None else self.trainer.offsets()
        return {p: max(settled.get(p, 0), first) for p, first in self._reads.beginnings.items()}

    def _offsets(self) -> Offsets:
        return {"behaviours": self._settled(), "embeddings": dict(self._reads.embedding_offsets)}

    # ---- releases ------------------------------------------------------------------------------------------------

    async def _after(self, turn: Turn) -> None:
        self._missing = turn.missing
        self._rows += turn.rows
        self._steps_not_logged += turn.steps
        if turn.scored:
            self._last_event_at = turn.last_event_at
            self._on_scored(turn.scored)
            if self._scores is not None:
                await asyncio.to_thread(self._scores.add, turn.scored)
        if turn.steps and self._passed(1.0, self._last_step_log):
            self._last_step_log = self._clock()
            losses = {name: round(loss, 5) for name, loss in turn.losses.items()}
            log.info("train.stepped", steps=self._steps_not_logged, rows=self._rows, loss=losses)
            self._steps_not_logged = 0
        trainer, keeping = self.trainer, self._keeping
        if trainer is not None and keeping is not None and keeping.due(trainer) and not trainer.release_due():
            await self._take_snapshot()  # a release takes its own

    async def _release_if_due(self, trainer: OnlineTrainer) -> bool:
        """Release if enough was learned; False while it is due and has to wait: nothing is learned meanwhile."""
        if trainer.trial is not None:
            if trainer.trial.complete and self._may_release():
                await self._decide(trainer)
            if trainer.trial is not None:
                return True  # one candidate at a time: the next is taken once this one was decided about
        if self._make_releaser is None and trainer.release_due():
            await self._in_thread(trainer.candidate)  # for nobody: the journal begins anew, and does not grow for ever
        if self._make_releaser is None or not (trainer.release_due() or self._overdue_release(trainer)):
            return True
        if not self._may_release():
            await asyncio.sleep(_WAIT_SECONDS)
            return False
        return await self._release(trainer)

    def _overdue_release(self, trainer: OnlineTrainer) -> bool:
        every = self._config.release_every_seconds
        if every is None or not trainer.rows_since_candidate:
            return False
        return self._passed(every, self._released_at)

    def _may_release(self) -> bool:
        """Whether a release could be made now; where it can not, it stays due."""
        releaser, leadership = self._releaser, self._leadership
        return releaser is not None and leadership is not None and leadership.settled and not releaser.unfinished

    async def _release(self, trainer: OnlineTrainer, *, more_rows: bool = True) -> bool:
        """Release what was learned; False if it has to wait, and nothing may be learned meanwhile."""
        releaser, gating = self._releaser, self._gating
        assert releaser is not None
        assert gating is not None
        if not releaser.beyond_current(self._learned(trainer.learned_offsets())):
            await self._in_thread(trainer.candidate)  # learned again what was released before: go on to where it ended
            return True
        # first the state that the release is made of: whoever is killed after it goes on from here, and releases it
        keeping = self._keeping
        if keeping is not None:
            kept = await self._take_snapshot() and await keeping.written()
            if not kept or not await keeping.segment(trainer, self._to_read(trainer)):
                await asyncio.sleep(_RETRY_SECONDS)  # what cannot be gone on from, or rebuilt, is no release
                return False

        def copy() -> tuple[Candidate, Offsets]:
            candidate = trainer.candidate()
            return candidate, {"behaviours": self._learned(candidate.offsets), "embeddings": self._vectors_read()}

        candidate, offsets = await self._in_thread(copy)
        self._released_at = self._clock()
        self._metrics = candidate.metrics
        try:
            await gating.admit(trainer, candidate, offsets, more_rows=more_rows)
            if keeping is not None:
                await keeping.forget_segments_but(await releaser.segments())
        except Unavailable as error:
            log.warning("train.release_delayed", error=str(error))
        return True

    async def _decide(self, trainer: OnlineTrainer) -> None:
        """Decide about the candidate on trial."""
        assert self._gating is not None
        try:
            await self._gating.decide(trainer)
        except Unavailable as error:
            log.warning("train.release_delayed", error=str(error))

    async def release_last(self) -> None:
        """Release what was learned since the newest release, after a bounded run."""
        while self._leadership is not None and not self._leadership.settled and not self._stop.is_set():
            self._leadership.confirm()  # an election is going on; it ends, one way or the other
            await asyncio.sleep(_WAIT_SECONDS)
        if self.trainer is not None and self._rows and self._may_release():
            await self._decide(self.trainer)
            await self._release(self.trainer, more_rows=False)

    # ---- snapshots -----------------------------------------------------------------------------------------------

    async def _take_snapshot(self) -> bool:
        """Copy everything between two turns; it is written beside what goes on. False if that cannot begin now."""
        trainer, keeping = self.trainer, self._keeping
        if trainer is None or keeping is None:
            return True
        try:
            if self._scores is not None:
                await asyncio.to_thread(self._scores.flush)
        except StoreUnavailable as error:
            log.warning("snapshot.not_written", error=str(error))
            return False
        await keeping.snapshot(
            trainer,
            lambda: self._in_thread(lambda: self._copied(trainer)),
            lambda: {"behaviours": self._to_read(trainer), "embeddings": self._vectors_read()},
        )
        return True

    def _copied(self, trainer: OnlineTrainer) -> State:
        from trainer.state import State  # torch's neighbours

        self._hold_vectors()  # what was fetched lies before the offsets that are kept
        self._forget(trainer)  # and who is known to be forgotten is so
        state = State()
        state.put("trainer", trainer.snapshot())
        if trainer.trial is not None:
            state.put("trial", trainer.trial.snapshot())
        state.values["loop"] = {
            "waits": self._waits.snapshot(),
            "last_event_at": self._last_event_at,
            "metrics": dict(self._metrics),
            "gone": {} if self._gone is None else self._gone.snapshot(),
            "begins": {} if self._keeping is None else {str(p): offset for p, offset in self._keeping.begins.items()},
            "scores": None if self._scores is None else self._scores.place,
        }
        return state

    def _to_read(self, trainer: OnlineTrainer) -> dict[int, int]:
        """Where reading goes on after what the trainer holds."""
        read = trainer.next_to_read()
        return {number: max(read[number], first) for number, first in self._reads.beginnings.items()}

    def _learned(self, offsets: Mapping[int, int]) -> dict[int, int]:
        return {number: max(offsets[number], first) for number, first in self._reads.beginnings.items()}

    def _vectors_read(self) -> dict[int, int]:
        return dict(self._reads.embedding_offsets)

    # ---- at intervals --------------------------------------------------------------------------------------------

    def _passed(self, seconds: float, since: float) -> bool:
        """Whether so many seconds have passed; they have where the clock was set back, too."""
        return not 0 <= self._clock() - since < seconds

    async def _keep_up(self) -> None:
        """Look after what goes on whatever else happens: role, half-made release, offsets, reports."""
        if self._leadership is not None:
            self._leadership.confirm()
        if self._releaser is None and self._make_releaser is not None and self.trainer is not None:
            releaser = self._make_releaser(self.trainer.encoder_version, self.trainer.catalogue.dim)
            await releaser.take_over()
            self._releaser, self._gating = releaser, Gating(releaser, self._gate)
            if self._trial is not None:
                await self._gating.go_on(self.trainer, self._trial)
                self._trial = None
        if self._releaser is not None and self._releaser.unfinished:
            try:
                await self._releaser.finish()
            except Unavailable as error:
                log.warning("train.release_delayed", error=str(error))
                await asyncio.sleep(_WAIT_SECONDS)
        if self._keeping is not None and self._keeping.just_written and await self._keeping.written():
            self._last_commit = float("-inf")  # lag tools are told at once
        if self._follower is not None and self._passed(_LOOK_SECONDS, self._last_look):
            self._last_look = self._clock()
            try:
                await self._follower.poll(wait_seconds=0)
            except Unavailable as error:
                log.warning("train.broker_away", error=str(error))
        await self._tell_group()
        if self._passed(self._config.report_interval_seconds, self._last_report):
            await self._report()

    async def _take_forgotten(self, users: Sequence[ForgottenUser], source: str, next_offset: int) -> None:
        self._to_forget += [user.user_id for user in users if self._gone is not None and self._gone.add(user)]

    async def _tell_group(self) -> None:
        if self._leadership is None:
            return
        if self._commit is not None and self._commit.done():
            finished, self._commit = self._commit, None
            try:
                finished.result()
            except Unavailable as error:
                log.warning("train.commit_delayed", error=str(error))
        if self._commit is None and self._passed(self._config.commit_interval_seconds, self._last_commit):
            self._last_commit = self._clock()
            # not awaited: a broker that is away must not hold up what can be learned meanwhile
            self._commit = asyncio.create_task(self._leadership.transact(offsets=self._commit_offsets()))

    def _commit_offsets(self) -> dict[TopicPartition, int]:
        return {TopicPartition(self._topic, number): offset for number, offset in self._settled().items()}

    async def _leave(self) -> None:
        """Say for the last time how far training has got."""
        if self._bounded:
            await self.release_last()
        await self._take_snapshot()
        if self._keeping is not None:
            await self._keeping.written()
        if self._leadership is not None:
            if self._commit is not None:
                await asyncio.gather(self._commit, return_exceptions=True)  # the next line says it again
            await self._leadership.transact(offsets=self._commit_offsets())
        await self._report()

    async def _report(self) -> None:
        self._last_report = self._clock()
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
        trainer = self.trainer
        return TrainReport(
            accounts=NO_ACCOUNTS if trainer is None else asdict(trainer.accounts),
            offsets=self._offsets(),
            corrected=0 if trainer is None else trainer.corrected,
            steps=0 if trainer is None else trainer.steps,
            rows_trained=self._rows,
            rows_sha256="" if trainer is None else trainer.rows_sha256,
            releases=0 if self._releaser is None else self._releaser.released,
            refused=0 if self._releaser is None else self._releaser.refused,
            held=0 if self._releaser is None else self._releaser.held,
            release_id=None if self._releaser is None else self._releaser.current_id,
            last_event_at=self._last_event_at,
            waiting_for=len(self._missing),
            given_up=self._waits.given_up,
            broken_vectors=self._reads.broken_vectors,
            other_encoders=self._reads.other_encoders,
            prequential=self._metrics,
            updated_at=self._clock(),
        )
