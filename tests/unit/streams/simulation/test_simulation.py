"""The simulated trainer learns what a trainer learns that reads the records of a replay from a broker."""

from __future__ import annotations

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from aiokafka.partitioner import DefaultPartitioner

from schemas.errors import Misconfigured
from streams.broker.clients import BrokerConfig
from streams.broker.records import behaviour_of
from streams.broker.topics import TopicsConfig
from streams.replay.config import ReplayConfig
from streams.replay.sender import Replay
from streams.replay.timeline import Timeline
from streams.simulation.click_log import click_log
from streams.simulation.report import digest_of, document_of, read_run, write_run
from streams.simulation.run import SERVED, SimulatedRun, simulate
from streams.training.vector_records import EmbeddingRecord
from tests.factories.offline_folders import write_stream
from tests.factories.samples import embedding, unit_vector
from tests.factories.training import ListedInput, make_loop, make_thread
from trainer.datasets.exposures import behaviours_of
from trainer.datasets.folder import open_data_set
from trainer.datasets.spans import BehaviourLog
from trainer.networks.config import CiUBMConfig
from trainer.online.config import TrainerConfig
from trainer.online.gate import GateConfig
from trainer.online.trainer import OnlineTrainer
from trainer.samples.partition_merge import Entry, PartitionMerge

PARTITIONS = 3
NOW = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = TrainerConfig(
    batch_rows=64, space_negatives=8, time_negatives=8, release_every_rows=1_000, model=CiUBMConfig(content_width=8)
)
GATE = GateConfig(trial_rows=500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("set") / "films", users=150, items=60, takes=800)


def timeline_of(folder: Path) -> Timeline:
    data = open_data_set(folder, attributes=("cold_holdout",))
    return Timeline(data, behaviours_of(data, seed=3, retakes=True), 3, NOW, broken_share=0.02)


def vectors_of(timeline: Timeline) -> list[EmbeddingRecord]:
    names = timeline.data.item_ids[:-2]  # two items have none: their rows wait for nothing
    return [EmbeddingRecord(name, embedding(name, unit_vector(sum(name.encode())), version="e")) for name in names]


def make_trainer(version: str, dim: int, partitions: Sequence[int]) -> OnlineTrainer:
    return OnlineTrainer(CONFIG, encoder_version=version, dim=dim, partitions=partitions)


def simulated(folder: Path, **over: Any) -> SimulatedRun:
    timeline = timeline_of(folder)
    events = click_log(timeline, BrokerConfig(), partitions=PARTITIONS)
    given: dict[str, Any] = {"partitions": PARTITIONS, "gate": GATE, "now": NOW} | over
    return simulate(make_trainer, events, {0: vectors_of(timeline)}, **given)


@pytest.fixture(scope="module")
def run(folder: Path) -> SimulatedRun:
    """The run of the folder as it is."""
    return simulated(folder)


class Held(NamedTuple):
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()


class Broker:
    """Keeps records as Kafka does: by topic and partition, which the producer's own partitioner chooses."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, int], list[Held]] = defaultdict(list)

    async def send(self, topic: str, value: bytes | None = None, key: bytes | None = None) -> asyncio.Future[Any]:
        number = DefaultPartitioner()(key, list(range(PARTITIONS)), list(range(PARTITIONS)))
        held = self.records[topic, number]
        held.append(Held(number, len(held), int(1000 * NOW.timestamp()), key, value))
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        done.set_result(held[-1])
        return done

    async def flush(self) -> None: ...


class FallingSilent(ListedInput):
    """An input without an end: a few records of each partition a fetch, and silence after the last ones."""

    def __init__(self, vectors: list[EmbeddingRecord], log: dict[int, list[Entry]], size: int) -> None:
        super().__init__(vectors, [], bounded=False)
        self.left, self.partitions, self.size = log, list(log), size
        self.reading = PartitionMerge(log, room_per_partition=50)
        self.starts = self.beginnings = dict.fromkeys(log, 0)
        self.told_idle = False
        self.fetches = 0

    async def fetch(self, *, embeddings: bool, behaviours: bool, wait_seconds: float) -> None:
        await asyncio.sleep(0)
        self.fetches += 1
        for number in self.reading.with_room() if behaviours else ():
            self.reading.add(number, self.left[number][: self.size])
            del self.left[number][: self.size]
        self.reading.set_exhausted({number: math.inf for number, left in self.left.items() if not left})

    def newly_idle(self, *, except_for: Iterable[int] = ()) -> list[int]:
        ended = len(self.reading.empty_and_exhausted()) == len(self.partitions) and not set(except_for)
        newly, self.told_idle = (self.partitions if ended and not self.told_idle else []), self.told_idle or ended
        return newly


async def through_a_broker(folder: Path, size: int) -> OnlineTrainer:
    timeline, broker = timeline_of(folder), Broker()
    await Replay(broker, BrokerConfig(), TopicsConfig(prefix=""), ReplayConfig()).run(timeline)
    log: dict[int, list[Entry]] = {number: [] for number in range(PARTITIONS)}
    at = NOW.timestamp()
    for (topic, number), records in broker.records.items():
        if topic == "behaviours":
            log[number] = [Entry(number, r.offset, at, behaviour_of(r, BrokerConfig(), {}), at) for r in records]
    given = FallingSilent(vectors_of(timeline), log, size)
    thread = make_thread(given, CONFIG)
    thread.waits._timeout_seconds = 0.0
    loop, stop = make_loop(given, thread, clock=lambda: 2e9), asyncio.Event()
    running = asyncio.create_task(loop.run(stop))
    while not given.told_idle or loop.trainer is None or loop.trainer.intake.missing():
        await asyncio.sleep(0.01)
    seen, since = -1, 0
    while seen != loop.trainer.progress.rows or given.fetches - since < 50:  # a slow step is between two fetches
        if seen != loop.trainer.progress.rows:
            seen, since = loop.trainer.progress.rows, given.fetches
        await asyncio.sleep(0.01)
    stop.set()
    await asyncio.wait_for(running, 30)
    return loop.trainer


@pytest.mark.parametrize("size", [3, 1_000])
async def test_a_simulation_learns_the_rows_of_a_trainer_that_reads_a_replay(
    folder: Path, run: SimulatedRun, size: int
) -> None:
    trainer = await through_a_broker(folder, size)
    assert run.rows > 3_000
    assert run.rows_sha256 == trainer.progress.rows_sha256
    assert run.counts == trainer.intake.counts and run.counts.dead_lettered > 0 and run.counts.pending > 0


async def test_each_record_has_the_place_that_a_producer_gives_it(folder: Path) -> None:
    timeline, broker = timeline_of(folder), Broker()
    await Replay(broker, BrokerConfig(), TopicsConfig(prefix=""), ReplayConfig()).run(timeline)
    logs = {number: log for (topic, number), log in broker.records.items() if topic == "behaviours"}
    held = {(number, record.offset): record for number, log in logs.items() for record in log}
    entries = list(click_log(timeline, BrokerConfig(), partitions=PARTITIONS))
    assert len({entry.partition for entry in entries}) == PARTITIONS and len(entries) == len(held)
    for entry in entries:
        assert entry.behaviour == behaviour_of(held[entry.partition, entry.offset], BrokerConfig(), {})
        assert entry.produced_at == entry.written_at == NOW.timestamp()


def test_the_same_folder_gives_the_same_scores_to_the_last_digit_and_releases_are_compared(
    folder: Path, run: SimulatedRun
) -> None:
    first, second = run, simulated(folder)
    for name in ("ciubm", SERVED):
        np.testing.assert_array_equal(first.scored.scores[name], second.scored.scores[name])
    assert first.decisions[0].passed and first.decisions[0].rows == 0
    assert len(first.decisions) >= 2 and all(one.rows >= GATE.trial_rows for one in first.decisions[1:])
    served = first.scored.scores[SERVED]
    unserved = int(np.isnan(served).sum())
    # the first release is made of a thousand rows and serves at once
    assert 1_000 <= unserved <= 1_000 + CONFIG.batch_rows
    assert len(served) == len(first.with_history) == len(first.scored)


def test_what_serves_never_changes_what_is_learned(folder: Path, run: SimulatedRun) -> None:
    never = simulated(folder, gate=GateConfig(trial_rows=10**9))
    np.testing.assert_array_equal(never.scored.scores["ciubm"], run.scored.scores["ciubm"])


def test_vectors_that_come_later_change_only_rows_from_then_on(folder: Path) -> None:
    timeline = timeline_of(folder)
    records = vectors_of(timeline)
    half = int(np.median(timeline.behaviours.ts)) if timeline.behaviours is not None else 0
    events = list(click_log(timeline, BrokerConfig(), partitions=PARTITIONS))
    other = [replace(one, embedding=replaced.embedding) for one, replaced in zip(records, records[::-1], strict=True)]
    renamed = [
        EmbeddingRecord(one.item_id, one.embedding and one.embedding.model_copy(update={"item_id": one.item_id}))
        for one in other
    ]
    given: dict[str, Any] = {"partitions": PARTITIONS, "gate": GATE, "now": NOW}
    plain = simulate(make_trainer, events, {0: records}, **given)
    fresh = simulate(make_trainer, events, {half: renamed, 0: records}, **given)
    assert plain.rows_sha256 == fresh.rows_sha256
    changed = plain.scored.scores["ciubm"] != fresh.scored.scores["ciubm"]
    first = int(np.argmax(changed))
    assert changed.any() and plain.scored.occurred_at[first] >= half - 600 * 60


def test_runs_are_compared_on_the_same_rows_alone(folder: Path, run: SimulatedRun, tmp_path: Path) -> None:
    log = BehaviourLog.of(open_data_set(folder, attributes=("cold_holdout",)), folder)
    write_run(run, document_of(run, log, other=None, seed=0), tmp_path / "a")
    digest, scores = read_run(tmp_path / "a")
    found = document_of(run, log, other=(digest, scores), seed=0)
    gain = found["paired"]["ciubm-other:ciubm"]["overall"]
    assert gain == {"difference": 0.0, "low": 0.0, "high": 0.0}
    assert found["prequential"]["ciubm"]["overall"]["gauc"] == found["figures"]["ciubm"]["overall"]["gauc"]
    assert json.loads((tmp_path / "a" / "report.json").read_text())["training_rows_sha256"] == run.rows_sha256
    with pytest.raises(Misconfigured, match="other rows"):
        document_of(run, log, other=("x" + digest_of(run.scored), scores), seed=0)
    with pytest.raises(Misconfigured, match="--against"):
        read_run(tmp_path)
