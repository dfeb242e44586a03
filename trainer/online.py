"""The sliding-window trainer without its surroundings: events and vectors in, optimiser steps and releases out.

Everything here is decided by what was read, never by when: the same records per partition give the same rows in the
same order, the same negatives and the same weights, however fetches interleave.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Protocol

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
from trainer.evaluation import DAY, ScoredRows
from trainer.impressions import Impression, ImpressionJoin, Take, pack_impressions, unpack_impressions
from trainer.journal import Journal, Segment
from trainer.memory import SpaceTimeMemory
from trainer.negatives import ContrastivePlan, SpaceTimeSampler, TakeCounts
from trainer.prequential import RecentScores
from trainer.settled import Offsets
from trainer.shuffle import Shuffle
from trainer.state import State
from trainer.trial import Trial
from trainer.window import EventWindow, Observed, Verdict

CIUBM, DIN, SHUFFLED = "ciubm", "din", "ciubm_shuffled"
VARIANTS = (CIUBM, DIN, SHUFFLED)
"""What can be trained side by side on the same rows: the model, its id-only form, and the shuffled-vector control."""


@dataclass(frozen=True)
class Accounts:
    """Where every event went: received = trained + late + duplicate + dead_lettered + erased + pending."""

    received: int
    trained: int
    late: int
    duplicate: int
    dead_lettered: int
    erased: int
    """Events of users who were forgotten before anything was learned from them."""
    pending: int

    @property
    def balanced(self) -> bool:
        """Whether nothing is missing and nothing was counted twice."""
        settled = self.trained + self.late + self.duplicate + self.dead_lettered + self.erased
        return self.received == settled + self.pending


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
            correction_seconds=config.correction_seconds,
            correction_rows=config.correction_rows,
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
        self._shuffle = Shuffle(np.random.default_rng(config.seed + 1)) if SHUFFLED in variants else None
        self._ready: deque[Impression] = deque()
        self._takes: deque[_QueuedTake] = deque()
        self._offsets = Offsets(partitions)
        self._finished = False
        self._received = self._trained = self._late = self._duplicate = self._dead_lettered = self._erased = 0
        self._steps = self._rows = self._rows_at_release = 0
        self._taken_in_time = self._corrected = self._corrections_ready = 0
        self._first_event_at: int | None = None
        self._event_at_release: int | None = None
        self._last_event_at: int | None = None
        self._rows_sha256 = ""
        self._scored: list[ScoredRows] = []
        self._recent = RecentScores()
        self._journal = Journal()
        self._torch_rng = _seeded(config) if config.model.draws_in_training else None
        self.trial: Trial | None = None
        """A candidate and the release that answers, scoring the same rows; changes nothing of what is learned."""

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

    def observe_erased(self, partition: int, offset: int) -> None:
        """Count an event of a user who wants to be forgotten, and look at nothing of it."""
        self._received += 1
        self._erased += 1
        self._offsets.read(partition, offset, settled=True)

    def forget(self, user_id: str) -> int:
        """Remove a user: held events, history, waiting and ready impressions, scores, names; returns how many events.

        What was learned from him stays learned, and which items were taken stays known, but not by whom.
        """
        places = [(event.partition, event.offset) for event in self._window.forget(user_id)]
        rows = self._join.forget(user_id)
        rows += [row for row in self._ready if row.user_id == user_id and not row.correction]
        self._ready = deque(row for row in self._ready if row.user_id != user_id)
        self._corrections_ready = sum(row.correction for row in self._ready)
        places += [(row.partition, row.offset) for row in rows]
        for partition, offset in places:
            self._offsets.discard(partition, offset)
        for queued in self._takes:
            if queued.take.user_id == user_id:
                self._offsets.discard(queued.partition, queued.offset)
        self._takes = deque(queued for queued in self._takes if queued.take.user_id != user_id)
        self._recent.forget(user_id)
        self._journal.forget(user_id)
        if self.trial is not None:
            self.trial.forget(user_id)
        self._erased += len(places)
        return len(places)

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
            erased=self._erased,
            pending=self.pending,
        )

    @property
    def pending(self) -> int:
        """Events held in memory: not yet released, waiting for their label, or for a full batch."""
        return self._window.held + self._join.waiting + len(self._ready) - self._corrections_ready

    @property
    def corrected(self) -> int:
        """Rows learned as not taken that a late take has corrected; they are rows, but no events of their own."""
        return self._corrected

    def offsets(self) -> dict[int, int]:
        """Next offset to read per partition such that everything below it is settled (trained or counted)."""
        return self._offsets.settled_below()

    def next_to_read(self) -> dict[int, int]:
        """Next offset to observe per partition; 0 for one of which nothing was observed yet."""
        return self._offsets.next_to_read()

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
                self._settle(before=float("inf") if self._finished else self._window.complete_before)
        return Blocked(self._missing())

    def _add_second(self, events: list[Observed]) -> None:
        taken = (event for event in events if event.behaviour.kind.is_take)
        for take, event in zip(self._join.add_second(events), taken, strict=True):
            self._takes.append(_QueuedTake(take, event.partition, event.offset))
            self._trained += 1
            self._offsets.settle(event.partition, event.offset)
        corrections = self._join.corrections()
        self._ready.extend(corrections)
        self._corrections_ready += len(corrections)

    def _settle(self, *, before: float) -> None:
        self._ready.extend(self._join.resolved(before))

    def _missing(self) -> frozenset[str]:
        head = [self._ready[i] for i in range(min(len(self._ready), self.config.batch_rows))]
        items = {row.item for row in head}
        if head:
            # takes that the memory is about to hold: whether they may be negatives must not depend on when vectors came
            due = takewhile(lambda queued: queued.take.second <= head[-1].second, self._takes)
            items |= {queued.take.item for queued in due}
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
        while self._takes and self._takes[0].take.second <= until:
            queued = self._takes.popleft()
            self._memory.add(replace(queued.take, user_id=""))  # who took it is nobody's business from here on
            self._counts.add(queued.take.item, queued.take.second)
            self._offsets.learned(queued.partition, queued.offset)

    def _learn(self, rows: list[Impression], plan: ContrastivePlan | None) -> StepReport:
        collated = collate(rows, plan, self.catalogue, history_length=self.config.history_length)
        probabilities: dict[str, NDArray[np.float64]] = {}
        losses: dict[str, float] = {}
        contrastive_loss = None
        for name, learner in self._learners.items():
            batch = collated.batch
            if name == SHUFFLED and self._shuffle is not None:
                batch = replace(batch, **self._shuffle.vectors(collated.items_U, self.catalogue))
            with self._own_torch_rng():
                report = learner.step(batch, collated.labels_B, collated.contrastive, in_time=self._in_time)
            probabilities[name], losses[name] = report.probabilities_B, report.loss
            if name == CIUBM:
                contrastive_loss = report.contrastive_loss
        if self.trial is not None:
            self.trial.observe(rows, collated.batch)
        self._journal.record(self._steps, rows, plan, collated.items_U, self.catalogue)
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
        corrections = sum(row.correction for row in rows)
        self._trained += len(rows) - corrections
        self._corrected += corrections
        self._corrections_ready -= corrections
        self._taken_in_time += sum(row.label for row in rows) - corrections
        lines = [self._rows_sha256]
        for row in rows:
            if not row.correction:  # the take's own place is settled where the take is
                self._offsets.settle(row.partition, row.offset)
                self._offsets.learned(row.partition, row.offset)
            lines.append(f"{row.event_id}\t{row.user_id}\t{self.catalogue.item_id(row.item)}\t{row.label}")
        if plan is not None:
            lines.append("\t".join(["negatives", *(self.catalogue.item_id(int(item)) for item in plan.candidates)]))
        self._rows_sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        if self._first_event_at is None:
            self._first_event_at = self._event_at_release = rows[0].second
        self._last_event_at = max(self._last_event_at or 0, rows[-1].second)
        first = np.array([not row.correction for row in rows])
        if not first.all():  # what is scored once more, knowing the answer, is no prediction
            rows = [row for row in rows if not row.correction]
            scores = {name: values[first] for name, values in scores.items()}
        if not rows:
            return
        scored = self._scored_rows(rows, scores)
        self._scored.append(scored)
        self._recent.add(scored)

    @property
    def _in_time(self) -> float:
        """Share of the takes learned from so far that came before their impression counted as not taken."""
        return 1.0 if not self._corrected else self._taken_in_time / (self._taken_in_time + self._corrected)

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

    @property
    def rows(self) -> int:
        """Rows learned from."""
        return self._rows

    @property
    def rows_since_candidate(self) -> int:
        """Rows learned from since the last candidate."""
        return self._rows - self._rows_at_release

    @property
    def overtaken(self) -> list[tuple[int, int]]:
        """Partition and offset of events that were late only because the other partitions had gone on."""
        return list(self._window.overtaken)

    def forget_overtaken(self, below: Mapping[int, int]) -> None:
        """Let go of those that the log does not hold any more."""
        self._window.forget_overtaken(below)

    def learned_offsets(self) -> dict[int, int]:
        """Per partition, the offset after the last event learned from of which all before are settled."""
        return self._offsets.learned_below()

    def release_due(self) -> bool:
        """Whether enough was learned since the last candidate was taken."""
        if self._rows - self._rows_at_release >= self.config.release_every_rows:
            return True
        span, since = self.config.release_every_event_seconds, self._event_at_release
        return span is not None and since is not None and (self._last_event_at or since) - since >= span

    def segment(self) -> Segment:
        """The journal of the rows that the next candidate adds, as far as they are learned."""
        return self._journal.segment()

    def candidate(self) -> Candidate:
        """A copy of the weights as they are now, with what they were trained on. Starts the next release's rows."""
        self._rows_at_release, self._event_at_release = self._rows, self._last_event_at
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
            offsets=self._offsets.learned_below(),
            segment=self._journal.cut(rows=self._rows, steps=self._steps),
        )

    @property
    def rows_sha256(self) -> str:
        """Hash over every training row, a chain over the steps: ids, label, negatives, order."""
        return self._rows_sha256 or hashlib.sha256().hexdigest()

    @property
    def steps(self) -> int:
        """Optimiser steps taken."""
        return self._steps

    def drain_scores(self) -> list[ScoredRows]:
        """Prequential scores made since the last call, one table per step."""
        drained, self._scored = self._scored, []
        return drained

    # ---- all of it -----------------------------------------------------------------------------------------------

    def snapshot(self) -> State:
        """Everything, as a copy: `restore` on a trainer of the same configuration goes on to the last digit alike.

        Scores that were not drained are not part of it, nor a trial, whose weights are those of releases.
        """
        state = State(
            values={
                **{name: getattr(self, f"_{name}") for name in _NUMBERS},
                "rng": self._rng.bit_generator.state,
                "learners": list(self._learners),
                "given_up": sorted(self._given_up),
                "dropped": sorted(self._dropped),
            }
        )
        for name, part in self._parts():
            state.put(name, part.snapshot())
        state.put("memory", State(dict(self._memory.snapshot())))
        state.put("ready", pack_impressions(self._ready))
        places = [(q.take.second, q.take.item, q.partition, q.offset) for q in self._takes]
        state.arrays["takes"] = np.array(places, np.int64).reshape(-1, 4)
        state.put_texts("takes.user", (queued.take.user_id for queued in self._takes))
        if self._torch_rng is not None:
            state.arrays["torch_rng"] = self._torch_rng.numpy().copy()
        return state

    def restore(self, state: State) -> None:
        """Stand where `snapshot` was taken. Raises `ValueError` if that was a trainer of another configuration."""
        values = state.values
        if values["learners"] != list(self._learners):
            raise ValueError(f"the snapshot holds {values['learners']}, this trainer has {list(self._learners)}")
        if (self._torch_rng is not None) != ("torch_rng" in state.arrays):
            raise ValueError("the snapshot's model drew random numbers in training, or this one does")
        for name in _NUMBERS:
            setattr(self, f"_{name}", values[name])
        self._rng.bit_generator.state = values["rng"]
        self._given_up, self._dropped = set(values["given_up"]), set(values["dropped"])
        for name, part in self._parts():
            part.restore(state.part(name))
        self._memory.restore(state.part("memory").arrays)
        self._ready = deque(unpack_impressions(state.part("ready")))
        takes = zip(state.arrays["takes"].tolist(), state.texts("takes.user"), strict=True)
        self._takes = deque(_QueuedTake(Take(s, user, item), p, offset) for (s, item, p, offset), user in takes)
        if self._torch_rng is not None:
            self._torch_rng = torch.from_numpy(np.array(state.arrays["torch_rng"]))
        self._scored, self._finished = [], False

    def _parts(self) -> Iterator[tuple[str, _Part]]:
        yield "catalogue", self.catalogue
        yield "window", self._window
        yield "join", self._join
        yield "counts", self._counts
        yield "offsets", self._offsets
        yield "recent", self._recent
        yield "journal", self._journal
        for name, learner in self._learners.items():
            yield f"learner-{name}", learner
        if self._shuffle is not None:
            yield "shuffle", self._shuffle

    @contextmanager
    def _own_torch_rng(self) -> Iterator[None]:
        """Dropout draws from a generator of this trainer alone; where nothing is dropped it costs nothing."""
        if self._torch_rng is None:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._torch_rng)
            yield
            self._torch_rng = torch.get_rng_state()


_NUMBERS = (
    *("received", "trained", "late", "duplicate", "dead_lettered", "erased"),
    *("taken_in_time", "corrected", "corrections_ready"),
    *("steps", "rows", "rows_at_release", "event_at_release", "first_event_at", "last_event_at", "rows_sha256"),
)


class _Part(Protocol):
    def snapshot(self) -> State: ...

    def restore(self, state: State) -> None: ...


@dataclass(frozen=True, slots=True)
class _QueuedTake:
    """A take that training has not come to yet, with its place in the log."""

    take: Take
    partition: int
    offset: int


def _seeded(config: TrainerConfig) -> Tensor:
    return torch.Generator().manual_seed(config.seed).get_state()
