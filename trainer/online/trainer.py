"""The sliding-window trainer without its surroundings: events and embeddings in, optimiser steps and candidates out.

Everything here is decided by what was read, never by when: the same records per partition give the same rows in the
same order, the same negatives and the same weights, however fetches interleave.

```text
trainer.intake ──> batches ──> memory, negatives ──> variants ──> trainer.progress, trainer.journal ──> Candidate
```
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from schemas.items import ItemEmbedding
from trainer.features.state import FeatureState
from trainer.features.states import ItemStates
from trainer.negatives.memory_bank import SpaceTimeMemory
from trainer.negatives.sampler import SpaceTimeSampler, TakeCounts
from trainer.networks.ciubm import CtrBatch
from trainer.networks.collate import collate, weighed_by_value
from trainer.networks.trees import TreesReport
from trainer.online.config import TrainerConfig
from trainer.online.intake import EventIntake
from trainer.online.progress import TrainProgress
from trainer.online.shadow_evaluation import ShadowEvaluation
from trainer.online.uncounted_takes import UncountedTakes
from trainer.online.variants import CIUBM, Variants
from trainer.provenance.journal import Journal, Segment
from trainer.samples.catalogue import ITEM_BYTES, Catalogue
from trainer.samples.id_hashes import hash_columns, id_hashes
from trainer.samples.rows import Impression, Take
from trainer.state import State


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    rows: int
    losses: dict[str, float]
    last_event_at: int
    """Second of the newest row."""


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
    features: str | None = None
    """Version of the features that it reads."""
    offsets: Mapping[int, int] = field(default_factory=dict)
    """Per partition of the click log, the offset after the last event trained on of which all before are done."""
    segment: Segment | None = None
    """The rows learned since the candidate before."""


class BatchObserver(Protocol):
    """Sees each batch as it is scored, and changes nothing of what is learned."""

    def observe(self, rows: Sequence[Impression], batch: CtrBatch) -> None:
        """Called once a step, before the next one is made."""
        ...


class OnlineTrainer:
    """Feed it with `put_embedding`, `delete_item` and the verbs of `intake`; call `intake.advance` and `step` in turn;
    copy a `candidate` when one is due, and `begin_next` once it is stored.

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
        most_items = int(1e6 * config.item_megabytes / (ITEM_BYTES + 4 * dim)) + 1
        self.catalogue = Catalogue(dim, config.features, most_items=most_items)
        self.intake = EventIntake(config, self.catalogue, partitions)
        """Events on their way to rows, and the counts and offsets of all that were read."""
        self.progress = TrainProgress(self.catalogue, config.model.kinds, learns_kinds=config.learns_kinds)
        """What was learned from so far."""
        self.journal = Journal(kinds=config.learns_kinds)
        """Which rows, negatives and vectors the next candidate adds."""
        self.shadow: ShadowEvaluation | None = None
        """A candidate and the serving release that score the same rows; changes nothing of what is learned."""
        self.stand_in: ShadowEvaluation | None = None
        """The same, of the weights before the last rows of the log: no rows come after them that could be compared."""
        self.observers: list[BatchObserver] = []
        """Called for each batch; no part of a snapshot."""
        self._variants = Variants(config, variants, vector_width=dim)
        self._memory = SpaceTimeMemory(
            window_seconds=config.window_seconds,
            window_takes=config.window_takes,
            bank_takes=config.bank_takes,
            bank_seconds=config.bank_seconds,
        )
        self._moment = FeatureState(config.features, self.catalogue)
        self._uncounted = UncountedTakes()
        self._sampler = SpaceTimeSampler(space=config.space_negatives, time=config.time_negatives)
        self._take_counts = TakeCounts(config.popularity_half_life_seconds, most_items=most_items)
        self._rng = np.random.default_rng(config.seed)

    @property
    def moment(self) -> FeatureState:
        """What features are computed from: the takes of the steps so far."""
        return self._moment

    @property
    def trees(self) -> TreesReport | None:
        """Trees of the real model; None where it has none."""
        return self._variants.trees

    def held_states(self, item_ids: Sequence[str]) -> ItemStates:
        """What features read of these items, from the state that `moment` was told to `hold`; an empty row first."""
        hashes_U2 = np.concatenate([np.zeros((1, 2), np.int64), hash_columns(item_ids)])
        return self._moment.held_states(hashes_U2, self.catalogue.facts_by_id(item_ids))

    def put_embedding(self, embedding: ItemEmbedding) -> None:
        """Use an item's newest embedding. Raises `ValueError` if it is another encoder's: two versions never meet."""
        if embedding.encoder_version != self.encoder_version:
            raise ValueError(
                f"item {embedding.item_id}: vector of {embedding.encoder_version}, not of {self.encoder_version}"
            )
        self.catalogue.put_embedding(embedding)
        self.intake.embedding_came(embedding.item_id)

    def put_query(self, item_id: str, vector: NDArray[np.float32]) -> None:
        """Use the vector of a query, named as `query_item` does. Raises `ValueError` on another width."""
        self.catalogue.put_query(item_id, vector)
        self.intake.embedding_came(item_id)

    def delete_item(self, item_id: str) -> None:
        """Remove a deleted item's vector, and the item from window and bank."""
        numbers = self.catalogue.numbers_of(item_id)
        self.catalogue.delete_item(item_id)
        for number in numbers:
            self._memory.purge(number)
        self._moment.delete(item_id)
        self.intake.item_deleted(item_id)

    def forget(self, user_id: str) -> int:
        """Remove a user: held events, history, waiting and ready impressions, scores, names; returns how many events.

        What was learned from their rows stays learned, and which items were taken stays known, but not by whom.
        """
        self.progress.forget(user_id)
        self.journal.forget(user_id)
        for evaluation in self._evaluations:
            evaluation.forget(user_id)
        self._moment.forget(id_hashes(user_id)[0])
        self._uncounted.forget(user_id)
        return self.intake.forget(user_id)

    def step(self) -> StepReport | None:
        """Score the next full batch and learn from it; None while there is none, or while it waits for embeddings."""
        for surplus, waiting in self.intake.surplus_takes():
            self._remember(surplus)
            self._uncounted.add(surplus)
            self._count_beyond(waiting)
            self._release_numbers()  # without rows no candidate is ever due
        rows = self.intake.next_batch()
        if not rows:
            return None
        newest = max(row.second for row in rows)  # a correction is as old as its impression
        # the memory stands where the batch stands, not where reading has got to: else negatives would depend on fetches
        takes = self.intake.takes_until(newest)
        self._remember(takes)
        self._uncounted.add(takes)
        kinds, learner = self.config.model.kinds, self.config.learner
        plan = None
        if learner.contrastive:
            plan = self._sampler.plan(rows, self._memory, self._take_counts, self.catalogue, self._rng)
        length, moment = self.config.history_length, self._moment
        collated = collate(rows, plan, self.catalogue, history_length=length, moment=moment, kinds=kinds)
        if learner.value_weight:
            collated = weighed_by_value(collated, rows, usual=self.progress.usual_value, power=learner.value_weight)
        self.intake.note_features(rows)
        self._moment.add(self._uncounted.pop(newest), before=newest)
        report = self._variants.step(collated, self.catalogue, in_time=self.progress.in_time(kinds))
        for observer in (*self._evaluations, *self.observers):
            observer.observe(rows, collated.batch)
        dense_BF = collated.batch.dense_BF.numpy()
        self.journal.record(self.progress.steps, rows, plan, collated.items_U, self.catalogue, dense_BF)
        self.intake.trained(rows)
        self.progress.add(rows, plan, report.probabilities, kinds_BK=report.kinds_BK, dense_BF=dense_BF)
        return StepReport(rows=len(rows), losses=report.losses, last_event_at=newest)

    def _count_beyond(self, waiting: Sequence[Impression]) -> None:
        """Count takes that no step has counted for long; older rows that wait get their features before that."""
        while (before := self._uncounted.due(self.config.batch_rows)) is not None:
            if new := [row for row in waiting if not row.moment.features]:
                collate(new, None, self.catalogue, history_length=self.config.history_length, moment=self._moment)
                self.intake.note_features(new)
            self._moment.add(self._uncounted.pop(before), before=before)

    def _remember(self, takes: Iterable[Take]) -> None:
        for take in takes:
            self._memory.add(replace(take, user_id=""))  # who took it is not needed from here on
            self._take_counts.add(take.item, take.second)

    @property
    def _evaluations(self) -> list[ShadowEvaluation]:
        return [evaluation for evaluation in (self.shadow, self.stand_in) if evaluation is not None]

    # ---- candidates ----------------------------------------------------------------------------------------------

    def release_due(self) -> bool:
        """Whether enough was learned for the next candidate."""
        span = self.config.release_every_event_seconds
        enough = self.progress.rows_since_release >= self.config.release_every_rows
        return enough or (span is not None and self.progress.seconds_since_release >= span)

    def candidate(self) -> Candidate:
        """A copy of the weights as they are now, with what they were trained on.

        Made again before anything more is learned it is the same; its `segment` grows with what is learned after it.
        """
        progress = self.progress
        return Candidate(
            weights=self._variants.released(),
            rows_trained=progress.rows,
            steps=progress.steps,
            rows_sha256=progress.rows_sha256,
            first_event_at=progress.first_event_at,
            last_event_at=progress.last_event_at,
            metrics=progress.metrics(),
            config=self.config.model_dump(mode="json"),
            features=self.config.features.version,
            offsets=self.intake.offsets.trained_offsets(),
            segment=self.journal.segment(),
        )

    def begin_next(self) -> None:
        """Begin the next candidate's rows here: the one before is stored, or is not wanted."""
        self.progress.begin_next()
        self.journal.cut(rows=self.progress.rows, steps=self.progress.steps)
        self.intake.offsets.trained_offsets()  # settles them: without releases nobody else asks
        self._release_numbers()

    def _release_numbers(self) -> None:
        if self.catalogue.releases:
            parts = (self._memory, self._variants, self._uncounted)
            self.catalogue.release(chain(self.intake.items_in_use(), *(part.items() for part in parts)))

    # ---- snapshots -----------------------------------------------------------------------------------------------

    def snapshot(self) -> State:
        """`state`, as a copy of everything."""
        return self.state().frozen()

    def state(self) -> State:
        """Everything, before it is frozen: after `restore`, a trainer of the same configuration continues with the same
        digits.

        Scores that were not drained are not part of it, nor a shadow evaluation, whose weights are those of releases.
        """
        state = State(values={"rng": self._rng.bit_generator.state})
        for beside in (self._variants, self.intake, self.progress):
            state.add(beside.snapshot())
        for name, part in self._named_parts():
            state.put(name, part.snapshot())
        state.put("memory", State(dict(self._memory.snapshot())))
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`. Raises `ValueError` if it is of another configuration."""
        for beside in (self._variants, self.intake, self.progress):
            beside.restore(state)
        for name, part in self._named_parts():
            part.restore(state.part(name))
        self._memory.restore(state.part("memory").arrays)
        self._rng.bit_generator.state = state.values["rng"]

    def _named_parts(self) -> Iterator[tuple[str, _Part]]:
        yield "catalogue", self.catalogue
        yield "counts", self._take_counts
        yield "journal", self.journal
        yield "moment", self._moment
        yield "uncounted", self._uncounted


class _Part(Protocol):
    def snapshot(self) -> State: ...

    def restore(self, state: State) -> None: ...
