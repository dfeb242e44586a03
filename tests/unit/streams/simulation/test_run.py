"""Which events, vectors and rows a simulated run takes in, on logs of a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from schemas.behaviours import Behaviour
from schemas.errors import Misconfigured
from streams.simulation.run import HeldVectors, SimulatedRun, simulate
from streams.training.vector_records import EmbeddingRecord
from tests.factories.samples import DAY0, behaviour, embedding, small_config
from trainer.networks.config import LearnerConfig
from trainer.online.gate import GateConfig
from trainer.online.trainer import OnlineTrainer
from trainer.samples.partition_merge import Entry


def vector(item: str) -> EmbeddingRecord:
    return EmbeddingRecord(item, embedding(item, int(item[1:])))


def exposures(count: int, *, items: Sequence[str] = ("i1",)) -> list[Behaviour]:
    return [behaviour(f"x{n}", user=f"u{n}", item=items[n % len(items)], second=n) for n in range(count)]


class Run:
    """A simulation that keeps its trainer."""

    def __init__(self, **config: Any) -> None:
        self.config = small_config(space_negatives=0, time_negatives=0, **config)
        self.trainer: OnlineTrainer | None = None
        self.advanced: list[int] = []

    def make_trainer(self, version: str, dim: int, partitions: Sequence[int]) -> OnlineTrainer:
        self.trainer = OnlineTrainer(self.config, encoder_version=version, dim=dim, partitions=partitions)
        return self.trainer

    def of(
        self, events: Sequence[Behaviour | None], vectors: Mapping[int, Sequence[EmbeddingRecord]], **more: Any
    ) -> SimulatedRun:
        entries = [Entry(0, n, 0.0, event, 2e9) for n, event in enumerate(events)]
        return simulate(
            self.make_trainer, entries, vectors, partitions=1, gate=GateConfig(), now=datetime(2026, 1, 1, tzinfo=UTC),
            advance=self.advanced.append, **more,
        )  # fmt: skip


def test_a_row_of_an_item_without_a_vector_is_learned_though_nothing_else_is_due() -> None:
    run = Run()
    found = run.of(exposures(16, items=("i1", "i2")), {0: [vector("i1")]})
    assert (found.rows, found.steps, found.counts.pending) == (8, 1, 8) and run.advanced == [16]


def test_rows_are_learned_in_full_batches_and_every_event_advances_the_bar() -> None:
    run = Run(release_every_rows=16)
    events = exposures(600)
    taken = behaviour("late", "click", user="u2", item="i1", second=30, exposure_id="x2")
    found = run.of([*events[:31], taken, None, *events[31:]], {0: [vector("i1")]})
    assert run.advanced == [512, 90]
    assert (found.rows, len(found.scored)) == (592, 591), "the row that is corrected is learned twice and scored once"
    assert found.counts.received == 602 and found.counts.dead_lettered == 1


def test_what_is_left_after_a_release_is_learned_without_further_events() -> None:
    found = Run(release_every_rows=16).of(exposures(100), {0: [vector("i1")]})
    assert found.rows == 88 and len(found.decisions) == 1, "of two candidates one still waits for its rows"


def test_vectors_are_there_by_the_second_of_an_event_in_whatever_order_they_are_given() -> None:
    run = Run()
    given = {DAY0: "i4", DAY0 + 1: "i5", DAY0 - 10: "i3", DAY0 - 20: "i2", 0: "i1"}
    run.of(exposures(16), {second: [vector(item)] for second, item in given.items()})
    assert run.trainer is not None
    held = [item for item in given.values() if run.trainer.catalogue.has_vector(run.trainer.catalogue.number(item))]
    assert sorted(held) == ["i1", "i2", "i3", "i4"]


def test_what_is_put_is_returned_once() -> None:
    reads = HeldVectors(1)
    reads.put([vector("i1")])
    reads.put([vector("i2"), vector("i3")])
    assert reads.has_embeddings and [one.item_id for one in reads.next_embeddings()] == ["i1", "i2", "i3"]
    assert not reads.has_embeddings and reads.next_embeddings() == []


@pytest.mark.parametrize("vectors", [{}, {0: []}])
def test_a_folder_without_vectors_is_refused(vectors: dict[int, list[EmbeddingRecord]]) -> None:
    with pytest.raises(Misconfigured, match="no item of the folder has a vector"):
        Run().of(exposures(8), vectors)


def test_a_log_that_makes_no_batch_is_refused() -> None:
    with pytest.raises(Misconfigured, match="no batch of MIM_TRAINER__BATCH_ROWS=8 rows"):
        Run().of(exposures(7), {0: [vector("i1")]})


def test_a_training_that_diverges_names_the_setting() -> None:
    with pytest.raises(Misconfigured, match=r"training diverged: .*; lower MIM_TRAINER__LEARNER__LEARNING_RATE"):
        Run(learner=LearnerConfig(learning_rate=1e30)).of(exposures(80), {0: [vector("i1")]})


@pytest.mark.parametrize("drawn_here", [True, False])
def test_only_exposures_that_the_replay_drew_have_to_name_their_takes(drawn_here: bool) -> None:
    drawn = [one.model_copy(update={"event_id": f"s3-n5-{n}"}) for n, one in enumerate(exposures(16))]
    if not drawn_here:
        assert Run().of(drawn, {0: [vector("i1")]}, drawn_here=False).rows == 8
        return
    with pytest.raises(Misconfigured, match="mean nothing: 16 exposures were drawn"):
        Run().of(drawn, {0: [vector("i1")]})
