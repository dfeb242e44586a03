"""Runs the trainer over the click log of a folder, through the classes that `mimstream train` runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from schemas.errors import Misconfigured
from schemas.manifests import PromotionDecision
from streams.simulation.item_vectors import VectorsBySecond
from streams.simulation.leak_audit import LeakAudit
from streams.simulation.releases import SimulatedReleases
from streams.training.feed import FeedBatch
from streams.training.trainer_thread import TrainerThread
from streams.training.vector_records import EmbeddingRecord
from trainer.metrics import ScoredRows
from trainer.networks.ciubm import CtrBatch
from trainer.online.embedding_wait import EmbeddingWait
from trainer.online.gate import GateConfig
from trainer.online.intake import EventCounts
from trainer.online.trainer import OnlineTrainer
from trainer.samples.partition_merge import Entry
from trainer.samples.rows import Impression

SERVED = "served"
"""Name of the scores of the serving release, beside those of the variants that learn."""
_EVENTS_PER_CALL = 512


@dataclass(frozen=True)
class SimulatedRun:
    """What a run learned."""

    scored: ScoredRows
    """Prequential scores of the variants, and of the release that served."""
    with_history: NDArray[np.bool_]
    """Per scored row: whether its user had taken anything before."""
    rows_sha256: str
    rows: int
    steps: int
    counts: EventCounts
    decisions: Sequence[PromotionDecision]
    kinds: Mapping[str, float | None] = field(default_factory=dict)
    """Running metrics of the further kinds of takes at the end."""


class HeldVectors:
    """What `TrainerThread` reads, from memory."""

    def __init__(self, partitions: int) -> None:
        self.partitions = list(range(partitions))
        self.starts = self.beginnings = dict.fromkeys(self.partitions, 0)
        self.embedding_offsets, self.query_offsets = {0: 0}, dict[int, int]()
        self._waiting: list[EmbeddingRecord] = []

    def put(self, records: Iterable[EmbeddingRecord]) -> None:
        """Have `next_embeddings` return these."""
        self._waiting.extend(records)

    @property
    def has_embeddings(self) -> bool:
        """Whether there are any to return."""
        return bool(self._waiting)

    def next_embeddings(self) -> list[EmbeddingRecord]:
        """What was put since the last call."""
        waiting, self._waiting = self._waiting, []
        return waiting


class _Histories:
    """Notes which rows are of users with a history."""

    def __init__(self) -> None:
        self.with_history: list[bool] = []

    def observe(self, rows: Sequence[Impression], batch: CtrBatch) -> None:
        self.with_history += [bool(row.history) for row in rows if not row.correction]


def simulate(
    make_trainer: Callable[[str, int, Sequence[int]], OnlineTrainer],
    events: Iterable[Entry],
    vectors: VectorsBySecond,
    *,
    partitions: int,
    gate: GateConfig,
    now: datetime,
    drawn_here: bool = True,
    advance: Callable[[int], None] = lambda events: None,
) -> SimulatedRun:
    """Learn a click log once, in its order, as a trainer does whose topics fall silent at their ends.

    The `vectors` of a second are there 512 events after its first one or sooner; a row of an item without one does not
    wait. What waits for a full batch, or for a label at the end, is left as a trainer without an end leaves it.
    `drawn_here`: a replay drew the exposures that led to nothing. Raises `Misconfigured` if there is no vector, or
    nothing to score, if training diverged, or if rows knew what they may not know.
    """
    reads = HeldVectors(partitions)
    thread = TrainerThread(reads, make_trainer, waits=EmbeddingWait(timeout_seconds=0.0))
    due = sorted(vectors)
    scored: list[ScoredRows] = []
    stop = asyncio.Event()
    histories = _Histories()
    reads.put(vectors[due.pop(0)] if due else ())
    thread.put_embeddings()
    trainer = thread.trainer
    if trainer is None:
        raise Misconfigured("no item of the folder has a vector, so there is nothing to train on")
    releases = SimulatedReleases(trainer, gate, now=now)
    audit = LeakAudit(trainer.config.features.names, drawn_here=drawn_here)
    audit.catalogue = trainer.catalogue
    trainer.observers += [histories, releases, audit]

    def learn(batch: FeedBatch) -> None:
        missing = frozenset[str]()
        while True:
            result = thread.run_once(replace(batch, timed_out=missing), stop=stop, releases=True)
            batch, missing = _NOTHING, result.missing
            scored.extend(result.scored)
            releases.act()
            if not result.steps and not missing:
                return

    try:
        for chunk in _chunks(audit.hear(events)):
            second = _second(chunk)
            while due and second is not None and due[0] <= second:
                reads.put(vectors[due.pop(0)])
            learn(FeedBatch(chunk, (), (), finish=False))
            advance(len(chunk))
        learn(FeedBatch((), reads.partitions, (), finish=False))
    except ArithmeticError as error:
        raise Misconfigured(f"training diverged: {error}; lower MIM_TRAINER__LEARNER__LEARNING_RATE") from error
    if audit.found:
        raise Misconfigured(f"the figures of this run mean nothing: {'; '.join(audit.found)}")
    if not scored:
        raise Misconfigured(
            f"the log makes no batch of MIM_TRAINER__BATCH_ROWS={trainer.config.batch_rows} rows, so nothing was scored"
        )
    table = ScoredRows.concatenate(scored)
    return SimulatedRun(
        scored=replace(table, scores={**table.scores, SERVED: releases.scores}),
        with_history=np.array(histories.with_history, bool),
        rows_sha256=trainer.progress.rows_sha256,
        rows=trainer.progress.rows,
        steps=trainer.progress.steps,
        counts=trainer.intake.counts,
        decisions=releases.decisions,
        kinds=trainer.progress.kind_metrics(),
    )


_NOTHING = FeedBatch((), (), (), finish=False)


def _chunks(events: Iterable[Entry]) -> Iterator[list[Entry]]:
    left = iter(events)
    while chunk := list(islice(left, _EVENTS_PER_CALL)):
        yield chunk


def _second(chunk: Sequence[Entry]) -> float | None:
    return next((entry.behaviour.occurred_at.timestamp() for entry in chunk if entry.behaviour is not None), None)
