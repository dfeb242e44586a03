"""The trainer and its turns: everything that touches it runs in a worker thread, one turn at a time.

The loop never computes. It says what the next turn is given (`streams.training.feed`), and between two turns
nothing changes: that is when releases and snapshots are made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import structlog

from schemas.errors import Misconfigured
from schemas.forgotten import ForgottenUser
from streams.training.feed import FeedBatch
from streams.training.input import TrainingInput
from streams.training.scores import ScoreFiles
from trainer.online.embedding_wait import EmbeddingWait
from trainer.samples.forgotten import ForgottenUsers

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.metrics import ScoredRows
    from trainer.online.trainer import OnlineTrainer

log = structlog.get_logger()

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """Let the trainer work beside the loop. Raises `Misconfigured` if training diverged."""
    try:
        return await asyncio.to_thread(work)
    except ArithmeticError as error:
        raise Misconfigured(
            f"training diverged: {error}. Nothing was released from it; lower MIM_TRAINER__LEARNER__LEARNING_RATE"
        ) from error


@dataclass(frozen=True, slots=True)
class StepResult:
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


class TrainerThread:
    """Holds the trainer, which is made when the first vector says how wide vectors are.

    `make_trainer` gets encoder version, width of its vectors and the partitions of `behaviours`. `vectors_anew` says
    that all vectors are read from the beginning although the trainer knows some: items that are not named are gone.
    """

    def __init__(
        self,
        reads: TrainingInput,
        waits: EmbeddingWait,
        make_trainer: Callable[[str, int, Sequence[int]], OnlineTrainer],
        *,
        gone: ForgottenUsers | None,
        scores: ScoreFiles | None,
        vectors_anew: bool,
    ) -> None:
        self._reads = reads
        self._waits = waits
        self._make_trainer = make_trainer
        self._gone = gone
        self._scores = scores
        self._named: set[str] | None = set() if vectors_anew else None
        self._to_forget: list[str] = []
        self.trainer: OnlineTrainer | None = None

    def make(self, encoder_version: str, dim: int) -> OnlineTrainer:
        """A trainer that was given nothing yet."""
        return self._make_trainer(encoder_version, dim, self._reads.partitions)

    # ---- in the worker thread ------------------------------------------------------------------------------------

    def take(self, trainer: OnlineTrainer, portion: FeedBatch, *, stop: asyncio.Event, releases: bool) -> StepResult:
        """Feed the trainer and let it do what it can; stop early where a release can be made, or to end the process."""
        self.hold_vectors()
        self.forget(trainer)
        for entry in portion.entries:
            if entry.behaviour is None:
                trainer.intake.observe_broken(entry.partition, entry.offset)
            elif self._gone is not None and self._gone.erases(entry.behaviour.user_id, entry.partition, entry.offset):
                trainer.intake.observe_erased(entry.partition, entry.offset)
            else:
                trainer.intake.observe(entry.partition, entry.offset, entry.behaviour, written_at=entry.written_at)
        trainer.intake.window.idle(portion.idle)
        if portion.finish:
            trainer.intake.finish()
        self._waits.timed_out(portion.give_up)
        missing = trainer.intake.advance(timed_out=portion.give_up)
        reports = []
        enough = False
        while not enough and (report := trainer.step()) is not None:
            reports.append(report)
            # which rows a release is made of is a matter of the rows alone: not one more, whatever holds it up
            due = trainer.release_due() if trainer.shadow is None else trainer.shadow.complete
            enough = stop.is_set() or (due and releases)
            missing = trainer.intake.advance()
        return StepResult(
            steps=len(reports),
            rows=sum(report.rows for report in reports),
            losses=reports[-1].losses if reports else {},
            last_event_at=reports[-1].last_event_at if reports else None,
            progressed=bool(reports),
            finishing=portion.finish,
            missing=missing,
            scored=trainer.progress.drain_scores(),
        )

    def hold_vectors(self) -> None:
        """Give the trainer the vectors and tombstones that were fetched."""
        for record in self._reads.take_vectors():
            if self._named is not None:
                self._named.add(record.item_id)
            embedding = record.embedding
            if embedding is None:
                self._waits.resolved(record.item_id, has_vector=False)
                if self.trainer is not None:
                    self.trainer.delete_item(record.item_id)
                continue
            if self.trainer is None:
                self.trainer = self.make(embedding.encoder_version, embedding.dim)
            try:
                self.trainer.put_embedding(embedding)
            except ValueError as error:
                log.warning("train.broken_vector", item_id=record.item_id, error=str(error))
            else:
                self._waits.resolved(record.item_id, has_vector=True)

    def drop_unnamed(self) -> None:
        """What the center does not hold any more was deleted, even where its tombstone is gone already."""
        named, self._named = self._named, None
        if named is not None and self.trainer is not None:
            for item_id in self.trainer.catalogue.items_with_vector:
                if item_id not in named:
                    self.trainer.delete_item(item_id)

    def forget(self, trainer: OnlineTrainer) -> None:
        """Take the users who asked for it out of trainer and scores."""
        users, self._to_forget = self._to_forget, []
        for user_id in users:
            log.info("train.user_forgotten", events=trainer.forget(user_id))
        if users and self._scores is not None:
            self._scores.forget(users)

    # ---- on the loop ---------------------------------------------------------------------------------------------

    async def to_forget(self, users: Sequence[ForgottenUser], source: str, next_offset: int) -> None:
        """Hear of users who want to be forgotten: `forgotten_users.Tell`."""
        self._to_forget += [user.user_id for user in users if self._gone is not None and self._gone.add(user)]

    @property
    def has_more(self) -> bool:
        """Whether a turn would have something to do that is in no portion: vectors, or users to forget."""
        return self._reads.has_vectors or bool(self._to_forget)

    def settled(self) -> dict[int, int]:
        """Per partition of `behaviours`, the offset from which something is owed."""
        settled = {} if self.trainer is None else self.trainer.intake.offsets.settled_below()
        return {number: max(settled.get(number, 0), first) for number, first in self._reads.beginnings.items()}

    def within_log(self, offsets: Mapping[int, int]) -> dict[int, int]:
        """Offsets as the trainer states them, none before the beginning of its partition of `behaviours`."""
        return {number: max(offsets[number], first) for number, first in self._reads.beginnings.items()}

    def vectors_read(self) -> dict[int, int]:
        """Per partition of `embeddings`, the offset after the last vector that was fetched."""
        return dict(self._reads.embedding_offsets)
