"""The sliding-window trainer without its surroundings: events and vectors in, optimiser steps and releases out.

Everything here is decided by what was read, never by when: the same records per partition give the same rows in the
same order, the same negatives and the same weights, however fetches interleave.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.behaviours import Behaviour
from schemas.items import ItemEmbedding
from trainer.batches import collate
from trainer.catalogue import Catalogue
from trainer.config import TrainerConfig
from trainer.ctr import Learner
from trainer.evaluation import DAY, ScoredRows, log_loss, user_auc
from trainer.impressions import Impression, ImpressionJoin, Take
from trainer.memory import SpaceTimeMemory
from trainer.negatives import ContrastivePlan, SpaceTimeSampler, TakeCounts
from trainer.rival import Rival
from trainer.window import EventWindow, Observed, Verdict

CIUBM, DIN, SHUFFLED = "ciubm", "din", "ciubm_shuffled"
VARIANTS = (CIUBM, DIN, SHUFFLED)
"""What can be trained side by side on the same rows: the model, its id-only form, and the shuffled-vector control."""


@dataclass(frozen=True)
class Accounts:
    """Where every event went: received = trained + late + duplicate + dead_lettered + pending."""

    received: int
    trained: int
    late: int
    duplicate: int
    dead_lettered: int
    pending: int

    @property
    def balanced(self) -> bool:
        """Whether nothing is missing and nothing was counted twice."""
        return self.received == self.trained + self.late + self.duplicate + self.dead_lettered + self.pending


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


class OnlineTrainer:
    """Feed it with `hold`, `drop`, `observe`, `idle`; let it move with `advance` and `step`; take `candidate` when due.

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
        unknown = set(variants) - set(VARIANTS)
        if unknown or CIUBM not in variants:
            raise ValueError(f"variants are {sorted(variants)}, expected {CIUBM} and any of {DIN}, {SHUFFLED}")
        self.config = config
        self.encoder_version = encoder_version
        self.catalogue = Catalogue(dim)
        self._dropped: set[str] = set()
        self._given_up: set[str] = set()
        self._window = EventWindow(
            partitions,
            lateness_seconds=config.lateness_seconds,
            horizon_seconds=config.duplicate_horizon_seconds,
        )
        self._join = ImpressionJoin(
            self.catalogue,
            history_length=config.history_length,
            attribution_seconds=config.attribution_seconds,
            max_users=config.max_users,
        )
        self._memory = SpaceTimeMemory(
            window_seconds=config.window_seconds,
            window_takes=config.window_takes,
            bank_takes=config.bank_takes,
            bank_seconds=config.bank_seconds,
        )
        self._sampler = SpaceTimeSampler(space=config.space_negatives, time=config.time_negatives)
        self._counts = TakeCounts(config.popularity_half_life_seconds)
        self._rng = np.random.default_rng(config.seed)
        self._learners = {
            name: Learner(
                config.model.without_content() if name == DIN else config.model,
                config.learner,
                vector_width=dim,
                seed=config.seed,
            )
            for name in variants
        }
        self._shuffle = _Shuffle(np.random.default_rng(config.seed + 1)) if SHUFFLED in variants else None
        self._ready: deque[Impression] = deque()
        self._takes: deque[Take] = deque()
        self._offsets = _Offsets(partitions)
        self._finished = False
        self._received = self._trained = self._late = self._duplicate = self._dead_lettered = 0
        self._steps = self._rows = self._rows_at_release = 0
        self._first_event_at: int | None = None
        self._last_event_at: int | None = None
        self._rows_hash = hashlib.sha256()
        self._scored: list[ScoredRows] = []
        self._recent = _RecentScores()
        self.rival: Rival | None = None
        """The release that answers, scoring the same rows; changes nothing of what is learned."""

    # ---- vectors -------------------------------------------------------------------------------------------------

    def hold(self, embedding: ItemEmbedding) -> None:
        """Take over an item's newest vector. `ValueError` if it is another encoder's: two versions never meet."""
        if embedding.encoder_version != self.encoder_version:
            raise ValueError(
                f"item {embedding.item_id}: vector of {embedding.encoder_version}, not of {self.encoder_version}"
            )
        self.catalogue.hold(embedding)
        self._dropped.discard(embedding.item_id)
        self._given_up.discard(embedding.item_id)

    def drop(self, item_id: str) -> None:
        """The item was deleted: its vector, its place in the window and in the bank go."""
        self.catalogue.drop(item_id)
        number = self.catalogue.find(item_id)
        if number is not None:
            self._memory.purge(number)
        self._dropped.add(item_id)

    # ---- behaviours ----------------------------------------------------------------------------------------------

    def observe(self, partition: int, offset: int, behaviour: Behaviour) -> Verdict:
        """Take in one event of the click log."""
        self._received += 1
        verdict = self._window.observe(partition, offset, behaviour)
        self._offsets.read(partition, offset, settled=verdict is not Verdict.ACCEPTED)
        self._late += verdict is Verdict.LATE
        self._duplicate += verdict is Verdict.DUPLICATE
        return verdict

    def observe_broken(self, partition: int, offset: int) -> None:
        """Count an event that could not be read; somebody else writes its dead letter."""
        self._received += 1
        self._dead_lettered += 1
        self._offsets.read(partition, offset, settled=True)

    def idle(self, partitions: Collection[int]) -> None:
        """These partitions have nothing more to read now; the watermark does not wait for them."""
        self._window.idle(partitions)

    def finish(self) -> None:
        """Nothing more will come: everything held is released, and the last batch may be a short one."""
        self._finished = True

    @property
    def accounts(self) -> Accounts:
        """The balance, at any moment."""
        return Accounts(
            received=self._received,
            trained=self._trained,
            late=self._late,
            duplicate=self._duplicate,
            dead_lettered=self._dead_lettered,
            pending=self.pending,
        )

    @property
    def pending(self) -> int:
        """Events held in memory: not yet released, waiting for their label, or for a full batch."""
        return self._window.held + self._join.waiting + len(self._ready)

    def offsets(self) -> dict[int, int]:
        """Next offset to read per partition such that everything below it is settled (trained or counted)."""
        return self._offsets.settled_below()

    # ---- motion --------------------------------------------------------------------------------------------------

    def advance(self, *, give_up_on: Collection[str] = ()) -> Blocked:
        """Release what event time allows, and say which items' vectors the head of the stream waits for.

        Rows become ready strictly in order: one that waits for a vector holds back everything behind it, so that the
        order of training never depends on when vectors came. `give_up_on` lets rows of these items pass without.
        """
        self._given_up.update(give_up_on)
        budget = 4 * self.config.batch_rows
        if len(self._ready) < budget:
            for events in self._window.released(everything=self._finished):
                # labels settle before the second is added, so that no take can answer an impression that is overdue
                self._settle(before=events[0].second)
                self._add_second(events)
                if len(self._ready) >= budget:
                    break
            else:
                self._settle(before=float("inf") if self._finished else self._window.watermark)
        return Blocked(self._missing())

    def _add_second(self, events: list[Observed]) -> None:
        self._takes.extend(self._join.add_second(events))
        for event in events:
            if event.behaviour.kind.is_take:
                self._trained += 1
                self._offsets.settle(event.partition, event.offset)

    def _settle(self, *, before: float) -> None:
        self._ready.extend(self._join.resolved(before))

    def _missing(self) -> frozenset[str]:
        head = [self._ready[i] for i in range(min(len(self._ready), self.config.batch_rows))]
        items = {row.item for row in head}
        if head:
            # takes that the memory is about to hold: whether they may be negatives must not depend on when vectors came
            items |= {take.item for take in takewhile(lambda take: take.second <= head[-1].second, self._takes)}
        return frozenset(
            item_id
            for item in items
            if not self.catalogue.has_vector(item)
            and (item_id := self.catalogue.item_id(item)) not in self._dropped
            and item_id not in self._given_up
        )

    def step(self) -> StepReport | None:
        """Score the next full batch, learn from it; None while there is none (or its vectors are still awaited)."""
        size = self.config.batch_rows
        drained = self._finished and not self._window.held and not self._join.waiting
        if not self._ready or (len(self._ready) < size and not drained) or self._missing():
            return None
        rows = [self._ready.popleft() for _ in range(min(size, len(self._ready)))]
        self._remember_takes(until=rows[-1].second)
        plan = self._sampler.plan(rows, self._memory, self._counts, self.catalogue, self._rng)
        return self._learn(rows, plan)

    def _remember_takes(self, *, until: int) -> None:
        # the memory stands where the batch stands, not where reading has got to: else negatives would depend on fetches
        while self._takes and self._takes[0].second <= until:
            take = self._takes.popleft()
            self._memory.add(take)
            self._counts.add(take.item, take.second)

    def _learn(self, rows: list[Impression], plan: ContrastivePlan | None) -> StepReport:
        collated = collate(rows, plan, self.catalogue, history_length=self.config.history_length)
        probabilities: dict[str, NDArray[np.float64]] = {}
        losses: dict[str, float] = {}
        contrastive_loss = None
        for name, learner in self._learners.items():
            batch = collated.batch
            if name == SHUFFLED and self._shuffle is not None:
                batch = replace(batch, **self._shuffle.vectors(collated.items_U, self.catalogue))
            report = learner.step(batch, collated.labels_B, collated.contrastive)
            probabilities[name], losses[name] = report.probabilities_B, report.loss
            if name == CIUBM:
                contrastive_loss = report.contrastive_loss
        if self.rival is not None:
            self.rival.observe(rows, collated.batch, probabilities[CIUBM])
        self._account(rows, plan, probabilities)
        return StepReport(
            step=self._steps,
            rows=len(rows),
            takes=sum(row.label for row in rows),
            losses=losses,
            contrastive_loss=contrastive_loss,
            positives=0 if plan is None else len(plan.positives),
            negatives=0 if plan is None else len(plan.candidates),
            last_event_at=rows[-1].second,
        )

    def _account(
        self, rows: list[Impression], plan: ContrastivePlan | None, scores: dict[str, NDArray[np.float64]]
    ) -> None:
        self._steps += 1
        self._rows += len(rows)
        self._trained += len(rows)
        for row in rows:
            self._offsets.settle(row.partition, row.offset)
            self._rows_hash.update(
                f"{row.event_id}\t{row.user_id}\t{self.catalogue.item_id(row.item)}\t{row.label}\n".encode()
            )
        if plan is not None:
            names = "\t".join(self.catalogue.item_id(int(item)) for item in plan.candidates)
            self._rows_hash.update(f"negatives\t{names}\n".encode())
        if self._first_event_at is None:
            self._first_event_at = rows[0].second
        self._last_event_at = rows[-1].second
        scored = self._scored_rows(rows, scores)
        self._scored.append(scored)
        self._recent.add(scored)

    def _scored_rows(self, rows: list[Impression], scores: dict[str, NDArray[np.float64]]) -> ScoredRows:
        second = np.array([row.second for row in rows], np.float64)
        published = np.array([self.catalogue.published_at(row.item) for row in rows])
        age = second - published
        age[np.array([row.defines_publish for row in rows]) | (age < 0)] = np.nan
        assert self._first_event_at is not None
        return ScoredRows(
            user=np.array([row.user_id for row in rows]),
            item=np.array([self.catalogue.item_id(row.item) for row in rows]),
            occurred_at=second,
            label=np.array([row.label for row in rows], np.int64),
            age_seconds=age,
            catalogue=published < self._first_event_at + DAY,
            retaken=np.array([row.retaken for row in rows]),
            scores=scores,
        )

    # ---- results -------------------------------------------------------------------------------------------------

    def release_due(self) -> bool:
        """Whether enough was learned since the last candidate was taken."""
        return self._rows - self._rows_at_release >= self.config.release_every_rows

    def candidate(self) -> Candidate:
        """A copy of the weights as they are now, with what they were trained on. Starts the next release's count."""
        self._rows_at_release = self._rows
        model = self._learners[CIUBM].model
        return Candidate(
            weights={name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
            rows_trained=self._rows,
            steps=self._steps,
            rows_sha256=self.rows_sha256,
            first_event_at=self._first_event_at,
            last_event_at=self._last_event_at,
            metrics=self._recent.metrics(),
            config=self.config.model_dump(mode="json"),
        )

    @property
    def rows_sha256(self) -> str:
        """Running hash over every training row: ids, label, negatives, order."""
        return self._rows_hash.hexdigest()

    @property
    def steps(self) -> int:
        """Optimiser steps taken."""
        return self._steps

    def drain_scores(self) -> list[ScoredRows]:
        """Prequential scores made since the last call, one table per step."""
        drained, self._scored = self._scored, []
        return drained


class _Offsets:
    """Which offsets of each partition are settled, so that a reader knows from where nothing is owed any more."""

    def __init__(self, partitions: Collection[int]) -> None:
        self._next = dict.fromkeys(partitions, 0)
        self._open: dict[int, dict[int, None]] = {partition: {} for partition in partitions}

    def read(self, partition: int, offset: int, *, settled: bool) -> None:
        self._next[partition] = offset + 1
        if not settled:
            self._open[partition][offset] = None

    def settle(self, partition: int, offset: int) -> None:
        del self._open[partition][offset]

    def settled_below(self) -> dict[int, int]:
        # offsets are read in order, so the first open one (dicts keep order) is the smallest
        return {p: next(iter(self._open[p]), following) for p, following in self._next.items()}


class _RecentScores:
    """Running prequential metrics over the newest rows, for manifests and dashboards."""

    def __init__(self, rows: int = 20_000) -> None:
        self._rows = rows
        self._tables: deque[ScoredRows] = deque()
        self._count = 0

    def add(self, table: ScoredRows) -> None:
        self._tables.append(table)
        self._count += len(table)
        while self._count - len(self._tables[0]) >= self._rows:
            self._count -= len(self._tables.popleft())

    def metrics(self) -> dict[str, float | None]:
        if not self._tables:
            return {}
        rows = ScoredRows.concatenate(list(self._tables))
        first = ~rows.retaken
        _, users = np.unique(rows.user[first], return_inverse=True)
        metrics: dict[str, float | None] = {}
        for name, scores in rows.scores.items():
            gauc = user_auc(users.reshape(-1), rows.label[first], scores[first]).weighted
            metrics[f"{name}_gauc"] = None if np.isnan(gauc) else gauc
            metrics[f"{name}_logloss"] = log_loss(rows.label[first], scores[first]) if first.any() else None
        return metrics


class _Shuffle:
    """Permutes vectors among the items met so far, in the order in which rows meet them.

    Each newcomer swaps with a random earlier item (inside-out Fisher-Yates), so the assignment is a uniformly random
    permutation at every moment and an item's wrong vector stays nearly as stable as its right one would.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._place: dict[int, int] = {}
        self._met: list[int] = []
        self._other = np.zeros(1024, np.int64)

    def vectors(self, items_U: NDArray[np.int64], catalogue: Catalogue) -> dict[str, Tensor]:
        """Vectors (U, V) and their mask (U,) for the distinct items of a batch, each taken from another item."""
        for number in items_U.tolist():
            if number and number not in self._place and catalogue.has_vector(number):
                self._meet(number)
        others = np.array([self._partner(number) for number in items_U.tolist()], np.int64)
        return {
            "vectors_UV": torch.from_numpy(catalogue.vectors(others)),
            "has_vector_U": torch.from_numpy(catalogue.vector_mask(others)),
        }

    def _partner(self, number: int) -> int:
        place = self._place.get(number)
        return 0 if place is None else int(self._other[place])

    def _meet(self, number: int) -> None:
        place = len(self._met)
        self._place[number] = place
        self._met.append(number)
        if place >= len(self._other):
            self._other = np.concatenate([self._other, np.zeros(len(self._other), np.int64)])
        swapped = int(self._rng.integers(place + 1))
        self._other[place] = self._other[swapped]
        self._other[swapped] = number  # swapped == place: the newcomer keeps its own vector for now
