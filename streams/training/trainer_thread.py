"""The trainer in its worker thread: everything that touches it runs there, one call at a time.

The loop never computes. It says what the trainer is given next (`streams.training.feed`), and nothing changes between
two calls: that is when candidates and checkpoints are copied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import structlog

from schemas.behaviours import BehaviourKind
from schemas.errors import Misconfigured
from schemas.forgotten import ForgottenUser
from schemas.manifests import TopicOffsets
from schemas.queries import QueryEmbedding
from streams.training.feed import FeedBatch
from streams.training.scores import ScoreFiles
from streams.training.vector_records import EmbeddingRecord
from trainer.online.embedding_wait import EmbeddingWait
from trainer.samples.forgotten import ForgottenUsers
from trainer.samples.searches import is_query

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.changed_rows import RowsHeld
    from trainer.metrics import ScoredRows
    from trainer.online.trainer import Candidate, OnlineTrainer
    from trainer.state import State

log = structlog.get_logger()

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """Run trainer work beside the event loop. Raises `Misconfigured` if training diverged."""
    try:
        return await asyncio.to_thread(work)
    except ArithmeticError as error:
        raise Misconfigured(
            f"training diverged: {error}. Nothing was released from it; lower MIM_TRAINER__LEARNER__LEARNING_RATE"
        ) from error


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one call of `run_once` did."""

    steps: int
    losses: Mapping[str, float]
    finishing: bool
    """Whether the trainer was told that nothing more will come."""
    missing: frozenset[str]
    """Items whose embedding the next batch waits for."""
    scored: Sequence[ScoredRows]


class TrainerReads(Protocol):
    """The part of `TrainingInput` that the trainer needs."""

    @property
    def partitions(self) -> Sequence[int]:
        """Partitions of `behaviours`."""
        ...

    @property
    def has_embeddings(self) -> bool:
        """Whether `next_embeddings` would return any."""
        ...

    def next_embeddings(self) -> Sequence[EmbeddingRecord]:
        """The embeddings and tombstones since the last call, oldest first."""
        ...

    starts: dict[int, int]
    """Offset of each partition of `behaviours` at which reading began."""
    beginnings: dict[int, int]
    """First offset there is of each."""
    embedding_offsets: dict[int, int]
    """Next offset to read of each partition of `embeddings`."""
    query_offsets: dict[int, int]
    """Next offset to read of each partition of `queries`; empty if they are not read."""


class TrainerThread:
    """The trainer, with all that a checkpoint holds beside it. It is made when the first embedding gives their width.

    `make_trainer` gets encoder version, width of its embeddings and the partitions of `behaviours`. `reread_embeddings`
    says that all of them are read from the beginning although the trainer has some: items that are not met are deleted.
    """

    def __init__(
        self,
        reads: TrainerReads,
        make_trainer: Callable[[str, int, Sequence[int]], OnlineTrainer],
        *,
        waits: EmbeddingWait,
        forgotten: ForgottenUsers | None = None,
        scores: ScoreFiles | None = None,
        reread_embeddings: bool = False,
    ) -> None:
        self._reads = reads
        self._make_trainer = make_trainer
        self._forgotten = forgotten
        self._refused_early: list[str] = []
        self._named: set[str] | None = set() if reread_embeddings else None
        self._to_forget: list[str] = []
        self._erased: list[str] = []
        self._begins: dict[int, int] | None = None
        self._copied_at = 0
        self._fits, self._fits_missed = 0, 0
        self._told_of_searches = self._told_of_kinds = False
        self.waits = waits
        self.scores = scores
        self.trainer: OnlineTrainer | None = None
        """None before the first embedding."""
        self.last_event_at: int | None = None
        """Event time of the last row that was scored, in seconds since 1970."""
        self.metrics: Mapping[str, float | None] = {}
        """Running prequential metrics at the newest candidate."""

    # ---- in the worker thread ------------------------------------------------------------------------------------

    def run_once(self, batch: FeedBatch, *, stop: asyncio.Event, releases: bool) -> StepResult:
        """Feed the trainer and step while it can; stop early where a release can be made, or to end the process."""
        trainer = self.trainer
        assert trainer is not None, "no embedding was put"
        self.put_embeddings()
        self.forget()
        for entry in batch.entries:
            if entry.behaviour is None:
                trainer.intake.observe_broken(entry.partition, entry.offset)
            elif self._erases(entry.behaviour.user_id, entry.partition, entry.offset):
                trainer.intake.observe_erased(entry.partition, entry.offset)
            else:
                trainer.intake.observe(entry.partition, entry.offset, entry.behaviour, written_at=entry.written_at)
        trainer.intake.window.idle(batch.idle)
        if batch.finish:
            trainer.intake.finish()
        self.waits.timed_out(batch.timed_out)
        missing = trainer.intake.advance(timed_out=batch.timed_out)
        reports = []
        enough = False
        while not enough and (report := trainer.step()) is not None:
            reports.append(report)
            # which rows a release is made of is a matter of the rows alone: not one more, whatever holds it up
            due = trainer.release_due() if trainer.shadow is None else trainer.shadow.complete
            enough = stop.is_set() or (due and releases)
            missing = trainer.intake.advance()
        self._tell_of_trees(trainer)
        self._tell_of_searches(trainer)
        self._tell_of_kinds(trainer)
        scored = trainer.progress.drain_scores()
        if scored:
            self.last_event_at = reports[-1].last_event_at
        return StepResult(
            steps=len(reports),
            losses=reports[-1].losses if reports else {},
            finishing=batch.finish and not trainer.intake.at_last_rows,
            missing=missing,
            scored=scored,
        )

    def _tell_of_trees(self, trainer: OnlineTrainer) -> None:
        trees = trainer.trees
        if trees is None:
            return
        made, missed = trees.fits - self._fits, trees.fits_missed - self._fits_missed
        self._fits, self._fits_missed = trees.fits, trees.fits_missed
        if made:
            log.info("train.trees_fitted", trees=trees.trees, rows=trainer.progress.rows)
        if missed:
            log.warning("train.trees_not_fitted", why="the newest rows have one label only", rows=trainer.progress.rows)

    def _tell_of_searches(self, trainer: OnlineTrainer) -> None:
        if self._told_of_searches or not trainer.intake.searched or trainer.config.features.queries:
            return
        self._told_of_searches = True
        log.warning(
            "train.searches_ignored",
            events=trainer.intake.searched,
            why="behaviours say what was searched, and rows do not see it",
            fix="set MIM_TRAINER__FEATURES__QUERIES=true and train anew",
        )

    def _tell_of_kinds(self, trainer: OnlineTrainer) -> None:
        known = {BehaviourKind.CLICK, *map(BehaviourKind, trainer.config.model.kinds)}
        seen = [kind for kind in trainer.intake.kinds if BehaviourKind(kind).is_take]
        unread = [kind for kind in seen if kind not in known]
        if self._told_of_kinds or not unread or len(seen) < 2:
            return
        self._told_of_kinds = True
        log.warning(
            "train.kinds_ignored",
            kinds=sorted(unread),
            why="behaviours tell kinds of takes apart, and the click model has one output for all",
            fix="set MIM_TRAINER__MODEL__KINDS to them and train anew",
        )

    def put_embeddings(self) -> None:
        """Give the trainer the embeddings and tombstones that were fetched."""
        for record in self._reads.next_embeddings():
            if self._named is not None:
                self._named.add(record.item_id)
            embedding = record.embedding
            if embedding is None:
                self.waits.resolved(record.item_id)
                if self.trainer is not None:
                    self.trainer.delete_item(record.item_id)
                elif is_query(record.item_id):
                    self._refused_early.append(record.item_id)
                continue
            if self.trainer is None:
                self.trainer = self._make_trainer(embedding.encoder_version, embedding.dim, self._reads.partitions)
                for refused in self._refused_early:  # no record will say again that rows need not wait for it
                    self.trainer.delete_item(refused)
                self._refused_early.clear()
            try:
                if isinstance(embedding, QueryEmbedding):
                    self.trainer.put_query(record.item_id, np.frombuffer(embedding.vector or b"", "<f4"))
                else:
                    self.trainer.put_embedding(embedding)
            except ValueError as error:
                log.warning("train.broken_vector", item_id=record.item_id, error=str(error))
            else:
                self.waits.resolved(record.item_id)

    def delete_unnamed(self) -> None:
        """Delete items that the center does not hold any more, even where their tombstones are gone already."""
        named, self._named = self._named, None
        if named is not None and self.trainer is not None:
            for item_id in self.trainer.catalogue.items_with_vector:
                if item_id not in named:
                    self.trainer.delete_item(item_id)

    def forget(self) -> None:
        """Remove the users who asked for it from trainer and scores."""
        if self.trainer is None:
            return
        users, self._to_forget = self._to_forget, []
        for user_id in users:
            log.info("train.user_forgotten", events=self.trainer.forget(user_id))
        self._erased += users
        if users and self.scores is not None:
            self.scores.forget(users)

    def candidate(self) -> tuple[Candidate, TopicOffsets]:
        """A candidate as the trainer is now, and the offsets up to which it was trained."""
        assert self.trainer is not None, "nothing was trained"
        candidate = self.trainer.candidate()
        self.metrics = candidate.metrics
        return candidate, {"behaviours": self._within_log(candidate.offsets), "embeddings": self._embedding_offsets()}

    def snapshot(self, since: Mapping[str, RowsHeld] | None = None) -> State:
        """The trainer and what is beside it, as a copy; of the tables in `since` the rows that changed after it."""
        from trainer.state import State  # torch's neighbours

        assert self.trainer is not None, "nothing was trained"
        self.put_embeddings()  # what was fetched lies before the offsets that are kept
        self._copied_at = self.trainer.intake.counts.received
        state = State()
        state.put("trainer", self.trainer.state())
        if self.trainer.shadow is not None:
            state.put("trial", self.trainer.shadow.snapshot())
        state.values["loop"] = {
            "waits": self.waits.snapshot(),
            "last_event_at": self.last_event_at,
            "metrics": dict(self.metrics),
            "gone": {} if self._forgotten is None else self._forgotten.snapshot(),
            "begins": {str(partition): offset for partition, offset in self.begins().items()},
        }
        return state.frozen(since)

    def take_erased(self) -> list[str]:
        """Users who were forgotten since the last call."""
        erased, self._erased = self._erased, []
        return erased

    def restore(self, state: State, *, encoder_version: str, dim: int) -> None:
        """Return to the state of `snapshot`. The input is open.

        Events that only idle partitions made late are dropped where the log does not hold them any more.
        """
        trainer = self._make_trainer(encoder_version, dim, self._reads.partitions)
        trainer.restore(state.part("trainer"))
        trainer.intake.window.forget_dropped_by_idle(self._reads.beginnings)
        loop = state.part("loop").values
        self.waits.restore(loop["waits"])
        self.last_event_at, self.metrics = loop["last_event_at"], loop["metrics"]
        self._begins = {int(number): offset for number, offset in loop["begins"].items()}
        if self._forgotten is not None:
            self._forgotten.restore(loop["gone"])
        self.trainer, self._copied_at = trainer, trainer.intake.counts.received

    def _erases(self, user_id: str, partition: int, offset: int) -> bool:
        return self._forgotten is not None and self._forgotten.erases(user_id, partition, offset)

    # ---- on the loop ---------------------------------------------------------------------------------------------

    async def to_forget(self, users: Sequence[ForgottenUser], source: str, next_offset: int) -> None:
        """Forget these users with the next call in the thread: `streams.broker.forgotten.ForgetUsers`."""
        self._to_forget += [user.user_id for user in users if self._forgotten is not None and self._forgotten.add(user)]

    @property
    def has_more(self) -> bool:
        """Whether there is work that is in no batch: embeddings to put, or users to forget."""
        return self._reads.has_embeddings or bool(self._to_forget)

    @property
    def events_since_snapshot(self) -> int:
        """Events read since the newest `snapshot` or `restore`."""
        return 0 if self.trainer is None else self.trainer.intake.counts.received - self._copied_at

    # ---- offsets, none before the beginning of its partition -----------------------------------------------------

    def begins(self) -> dict[int, int]:
        """Per partition of `behaviours`, where this lineage of checkpoints began to read."""
        return self._reads.starts if self._begins is None else self._begins

    def committed_offsets(self) -> dict[int, int]:
        """Per partition of `behaviours`, the offset from which a restart without a checkpoint has to read."""
        committed = {} if self.trainer is None else self.trainer.intake.offsets.committed_offsets()
        return {number: max(committed.get(number, 0), first) for number, first in self._reads.beginnings.items()}

    def trained_offsets(self) -> dict[int, int]:
        """Per partition of `behaviours`, the offset after the last event trained on of which all before are done."""
        assert self.trainer is not None, "nothing was trained"
        return self._within_log(self.trainer.intake.offsets.trained_offsets())

    def read_offsets(self) -> TopicOffsets:
        """Per topic and partition, the next offset to read."""
        assert self.trainer is not None, "nothing was read"
        behaviours = self._within_log(self.trainer.intake.offsets.read_offsets())
        return {"behaviours": behaviours, "embeddings": self._embedding_offsets(), **self._query_offsets()}

    def report_offsets(self) -> TopicOffsets:
        """Per topic and partition, the next offset to read such that everything below it is settled."""
        vectors = {"embeddings": self._embedding_offsets(), **self._query_offsets()}
        return {"behaviours": self.committed_offsets(), **vectors}

    def _within_log(self, offsets: Mapping[int, int]) -> dict[int, int]:
        return {number: max(offsets[number], first) for number, first in self._reads.beginnings.items()}

    def _embedding_offsets(self) -> dict[int, int]:
        return dict(self._reads.embedding_offsets)

    def _query_offsets(self) -> TopicOffsets:
        return {"queries": dict(self._reads.query_offsets)} if self._reads.query_offsets else {}
