"""The sliding-window trainer without its surroundings: events and vectors in, optimiser steps and releases out.

Everything here is decided by what was read, never by when: the same records per partition give the same rows in the
same order, the same negatives and the same weights, however fetches interleave.

```text
trainer.intake ──> batches ──> memory, negatives ──> trainer.variants ──> trainer.learned, trainer.journal ──> Candidate
```
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from torch import Tensor

from schemas.behaviours import Behaviour
from schemas.items import ItemEmbedding
from trainer.metrics import ScoredRows
from trainer.negatives.memory_bank import SpaceTimeMemory
from trainer.negatives.sampler import SpaceTimeSampler, TakeCounts
from trainer.networks.collate import collate
from trainer.online.config import TrainerConfig
from trainer.online.intake import EventCounts, EventIntake
from trainer.online.progress import TrainProgress
from trainer.online.shadow_trial import ShadowEvaluation
from trainer.online.variants import CIUBM, Variants
from trainer.provenance.journal import Journal, Segment
from trainer.samples.catalogue import Catalogue
from trainer.samples.rows import Impression
from trainer.samples.window import ObserveResult
from trainer.state import State


@dataclass(frozen=True)
class Blocked:
    """Why the head of the stream waits: items whose vector or tombstone has not come yet."""

    missing: frozenset[str]


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    step: int
    rows: int
    takes: int
    losses: dict[str, float]
    contrastive_loss: float | None
    positives: int
    negatives: int
    """Distinct candidates that stood against the positives."""
    last_event_at: int


@dataclass(frozen=True)
class Candidate:
    """A model that may be released, with what it was trained on."""

    weights: dict[str, Tensor]
    rows_trained: int
    steps: int
    rows_sha256: str
    first_event_at: int | None
    last_event_at: int | None
    metrics: dict[str, float | None]
    config: dict[str, object]
    offsets: Mapping[int, int] = field(default_factory=dict)
    """Per partition of the click log, the offset after the last event learned from of which all before are settled."""
    segment: Segment | None = None
    """The rows learned since the candidate before."""


class OnlineTrainer:
    """Feed it with `hold`, `drop`, `observe`, `idle`; let it move with `advance` and `step`; take `candidate` when due,
    and `begin_next` once it is safe.

    No verb blocks, reads a clock or draws unseeded randomness. Scores of a row are made before anything is learned from
    it or from a row of its batch (prequential).
    """

    def __init__(
        self,
        config: TrainerConfig,
        *,
        encoder_version: str,
        dim: int,
        partitions: Collection[int],
        variants: Sequence[str] = (CIUBM,),
    ) -> None:
        """Raises `ValueError` if one of `variants` is unknown."""
        self.config = config
        self.encoder_version = encoder_version
        self._variants = Variants(config, variants, vector_width=dim)
        self.catalogue = Catalogue(dim)
        self._intake = EventIntake(config, self.catalogue, partitions)
        self._memory = SpaceTimeMemory(
            window_seconds=config.window_seconds,
            window_takes=config.window_takes,
            bank_takes=config.bank_takes,
            bank_seconds=config.bank_seconds,
        )
        self._sampler = SpaceTimeSampler(space=config.space_negatives, time=config.time_negatives)
        self._counts = TakeCounts(config.popularity_half_life_seconds)
        self._rng = np.random.default_rng(config.seed)
        self._learned = TrainProgress(self.catalogue)
        self._journal = Journal()
        self.trial: ShadowEvaluation | None = None
        """A candidate and the release that answers, scoring the same rows; changes nothing of what is learned."""

    # ---- vectors -------------------------------------------------------------------------------------------------

    def hold(self, embedding: ItemEmbedding) -> None:
        """Take over an item's newest vector. `ValueError` if it is another encoder's: two versions never meet."""
        if embedding.encoder_version != self.encoder_version:
            raise ValueError(
                f"item {embedding.item_id}: vector of {embedding.encoder_version}, not of {self.encoder_version}"
            )
        self.catalogue.hold(embedding)
        self._intake.vector_came(embedding.item_id)

    def drop(self, item_id: str) -> None:
        """The item was deleted: its vector, its place in the window and in the bank go."""
        self.catalogue.drop(item_id)
        number = self.catalogue.find(item_id)
        if number is not None:
            self._memory.purge(number)
        self._intake.deleted(item_id)

    # ---- behaviours ----------------------------------------------------------------------------------------------

    def observe(
        self, partition: int, offset: int, behaviour: Behaviour, *, written_at: float | None = None
    ) -> ObserveResult:
        """Take in one event of the click log; `written_at`: see `EventWindow.observe`."""
        return self._intake.observe(partition, offset, behaviour, written_at=written_at)

    def observe_broken(self, partition: int, offset: int) -> None:
        """Count an event that could not be read; somebody else writes its dead letter."""
        self._intake.observe_broken(partition, offset)

    def observe_erased(self, partition: int, offset: int) -> None:
        """Count an event of a user who wants to be forgotten, and look at nothing of it."""
        self._intake.observe_erased(partition, offset)

    def forget(self, user_id: str) -> int:
        """Remove a user: held events, history, waiting and ready impressions, scores, names; returns how many events.

        What was learned from him stays learned, and which items were taken stays known, but not by whom.
        """
        self._learned.forget(user_id)
        self._journal.forget(user_id)
        if self.trial is not None:
            self.trial.forget(user_id)
        return self._intake.forget(user_id)

    def idle(self, partitions: Collection[int]) -> None:
        """These partitions have nothing more to read now; the watermark does not wait for them."""
        self._intake.idle(partitions)

    def finish(self) -> None:
        """Nothing more will come: everything held is released, and the last batch may be a short one."""
        self._intake.finish()

    # ---- motion --------------------------------------------------------------------------------------------------

    def advance(self, *, give_up_on: Collection[str] = ()) -> Blocked:
        """Release what event time allows, and say which items' vectors the head of the stream waits for.

        `give_up_on` lets rows of these items pass without.
        """
        self._intake.advance(give_up_on=give_up_on)
        return Blocked(self._intake.missing())

    def step(self) -> StepReport | None:
        """Score the next full batch, learn from it; None while there is none (or its vectors are still awaited)."""
        rows = self._intake.next_batch()
        if not rows:
            return None
        self._remember_takes(until=rows[-1].second)
        return self._learn(rows)

    def _remember_takes(self, *, until: int) -> None:
        # the memory stands where the batch stands, not where reading has got to: else negatives would depend on fetches
        for take in self._intake.takes_until(until):
            self._memory.add(replace(take, user_id=""))  # who took it is nobody's business from here on
            self._counts.add(take.item, take.second)

    def _learn(self, rows: list[Impression]) -> StepReport:
        plan = self._sampler.plan(rows, self._memory, self._counts, self.catalogue, self._rng)
        collated = collate(rows, plan, self.catalogue, history_length=self.config.history_length)
        report = self._variants.step(collated, self.catalogue, in_time=self._learned.in_time)
        if self.trial is not None:
            self.trial.observe(rows, collated.batch)
        self._journal.record(self.steps, rows, plan, collated.items_U, self.catalogue)
        self._intake.learned(rows)
        self._learned.add(rows, plan, report.probabilities)
        return StepReport(
            step=self.steps,
            rows=len(rows),
            takes=sum(row.label for row in rows),
            losses=report.losses,
            contrastive_loss=report.contrastive_loss,
            positives=0 if plan is None else len(plan.positives),
            negatives=0 if plan is None else len(plan.candidates),
            last_event_at=rows[-1].second,
        )

    # ---- where it stands -----------------------------------------------------------------------------------------

    @property
    def accounts(self) -> EventCounts:
        """The balance, at any moment."""
        return self._intake.accounts

    @property
    def pending(self) -> int:
        """Events held in memory: not yet released, waiting for their label, or for a full batch."""
        return self._intake.pending

    @property
    def corrected(self) -> int:
        """Rows learned as not taken that a late take has corrected; they are rows, but no events of their own."""
        return self._learned.corrected

    def offsets(self) -> dict[int, int]:
        """Next offset to read per partition such that everything below it is settled (trained or counted)."""
        return self._intake.settled_below()

    def next_to_read(self) -> dict[int, int]:
        """Next offset to observe per partition; 0 for one of which nothing was observed yet."""
        return self._intake.next_to_read()

    def learned_offsets(self) -> dict[int, int]:
        """Per partition, the offset after the last event learned from of which all before are settled."""
        return self._intake.learned_below()

    @property
    def overtaken(self) -> list[tuple[int, int]]:
        """Partition and offset of events that were late only because the other partitions had gone on."""
        return self._intake.overtaken

    def forget_overtaken(self, below: Mapping[int, int]) -> None:
        """Let go of those that the log does not hold any more."""
        self._intake.forget_overtaken(below)

    # ---- results -------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimiser steps taken."""
        return self._learned.steps

    @property
    def rows(self) -> int:
        """Rows learned from."""
        return self._learned.rows

    @property
    def rows_since_candidate(self) -> int:
        """Rows learned from that the next candidate adds."""
        return self._learned.rows_since_release

    @property
    def rows_sha256(self) -> str:
        """Hash over every training row, a chain over the steps: ids, label, negatives, order."""
        return self._learned.rows_sha256

    def drain_scores(self) -> list[ScoredRows]:
        """Prequential scores made since the last call, one table per step."""
        return self._learned.drain_scores()

    def release_due(self) -> bool:
        """Whether enough was learned for the next candidate."""
        span = self.config.release_every_event_seconds
        enough = self._learned.rows_since_release >= self.config.release_every_rows
        return enough or (span is not None and self._learned.seconds_since_release >= span)

    def segment(self) -> Segment:
        """The journal of the rows that the next candidate adds, as far as they are learned."""
        return self._journal.segment()

    def candidate(self) -> Candidate:
        """A copy of the weights as they are now, with what they were trained on.

        Made again before anything more is learned it is the same; its `segment` grows with what is learned after it.
        """
        learned = self._learned
        return Candidate(
            weights={name: tensor.detach().clone() for name, tensor in self._variants.model.state_dict().items()},
            rows_trained=learned.rows,
            steps=learned.steps,
            rows_sha256=learned.rows_sha256,
            first_event_at=learned.first_event_at,
            last_event_at=learned.last_event_at,
            metrics=learned.metrics(),
            config=self.config.model_dump(mode="json"),
            offsets=self._intake.learned_below(),
            segment=self._journal.segment(),
        )

    def begin_next(self) -> None:
        """What was learned so far has been released, or is for nobody: the next candidate's rows begin here."""
        self._learned.release()
        self._journal.cut(rows=self.rows, steps=self.steps)

    # ---- all of it -----------------------------------------------------------------------------------------------

    def snapshot(self) -> State:
        """Everything, as a copy: `restore` on a trainer of the same configuration goes on to the last digit alike.

        Scores that were not drained are not part of it, nor a trial, whose weights are those of releases.
        """
        state = State(values={"rng": self._rng.bit_generator.state})
        for beside in (self._variants, self._intake, self._learned):
            state.add(beside.snapshot())
        for name, part in self._named_parts():
            state.put(name, part.snapshot())
        state.put("memory", State(dict(self._memory.snapshot())))
        return state

    def restore(self, state: State) -> None:
        """Stand where `snapshot` was taken. Raises `ValueError` if that was a trainer of another configuration."""
        for beside in (self._variants, self._intake, self._learned):
            beside.restore(state)
        for name, part in self._named_parts():
            part.restore(state.part(name))
        self._memory.restore(state.part("memory").arrays)
        self._rng.bit_generator.state = state.values["rng"]

    def _named_parts(self) -> Iterator[tuple[str, _Part]]:
        yield "catalogue", self.catalogue
        yield "counts", self._counts
        yield "journal", self._journal


class _Part(Protocol):
    def snapshot(self) -> State: ...

    def restore(self, state: State) -> None: ...
