"""Each way in which rows of a stream could know too much, planted, ends the run with a message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.errors import Misconfigured
from streams.broker.clients import BrokerConfig
from streams.replay.timeline import Timeline
from streams.simulation.click_log import click_log
from streams.simulation.run import simulate
from streams.training.vector_records import EmbeddingRecord
from tests.factories.offline_folders import write_stream
from tests.factories.samples import embedding, unit_vector
from trainer.datasets.exposures import behaviours_of
from trainer.datasets.folder import open_data_set
from trainer.features.state import FeatureState
from trainer.features.states import DrawnSources
from trainer.features.take_columns import TakeColumns
from trainer.networks.config import CiUBMConfig
from trainer.online import trainer as online
from trainer.online.config import TrainerConfig
from trainer.online.gate import GateConfig
from trainer.online.trainer import OnlineTrainer
from trainer.online.uncounted_takes import UncountedTakes
from trainer.samples.partition_merge import Entry

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = TrainerConfig(
    batch_rows=32, space_negatives=0, time_negatives=0, release_every_rows=100_000, model=CiUBMConfig(content_width=8)
)


@pytest.fixture(scope="module")
def timeline(tmp_path_factory: pytest.TempPathFactory) -> Timeline:
    folder: Path = write_stream(tmp_path_factory.mktemp("set") / "films", users=30, items=10, takes=160)
    data = open_data_set(folder, attributes=("cold_holdout",))
    return Timeline(data, behaviours_of(data, seed=3, retakes=True), 3, NOW, broken_share=0.02)


def run(timeline: Timeline, change: Callable[[Iterator[Entry]], Iterable[Entry]] = lambda events: events) -> None:
    def make_trainer(version: str, dim: int, partitions: Sequence[int]) -> OnlineTrainer:
        return OnlineTrainer(CONFIG, encoder_version=version, dim=dim, partitions=partitions)

    vectors = [
        EmbeddingRecord(name, embedding(name, unit_vector(n), version="e"))
        for n, name in enumerate(timeline.data.item_ids)
    ]
    events = change(click_log(timeline, BrokerConfig(), partitions=1))
    simulate(make_trainer, events, {0: vectors}, partitions=1, gate=GateConfig(trial_rows=500), now=NOW)


def test_a_run_without_leaks_passes(timeline: Timeline) -> None:
    run(timeline)


def test_the_own_second_is_caught(timeline: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pop = UncountedTakes.pop
    monkeypatch.setattr(UncountedTakes, "pop", lambda takes, before: pop(takes, before + 1))
    with pytest.raises(Misconfigured, match="rows know takes"):
        run(timeline)


def ahead(seconds: int) -> Callable[..., Any]:
    """Takes of the rows of a step are counted before it, as if they came so many seconds earlier."""
    kept = online.collate

    def collate(rows: Any, plan: Any, catalogue: Any, *, moment: FeatureState, **more: Any) -> Any:
        taken = [row for row in rows if row.label and not row.correction]
        columns = TakeColumns(
            np.arange(len(taken)) + 1,
            np.array([row.item for row in taken], np.int64),
            np.array([row.second - seconds for row in taken], np.int64),
            np.arange(len(taken)) + 1,
            np.zeros(len(taken), bool),
        )
        moment.add(columns, before=moment.before)
        return kept(rows, plan, catalogue, moment=moment, **more)

    return collate


def test_the_own_take_is_caught(timeline: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "collate", ahead(0))
    with pytest.raises(Misconfigured, match="takes of their own second or a later one"):
        run(timeline)


def test_the_state_after_the_step_is_caught(timeline: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = online.collate

    def collate(rows: Any, plan: Any, catalogue: Any, *, moment: FeatureState, **more: Any) -> Any:
        (uncounted,) = waiting
        newest = max(row.second for row in rows)
        moment.add(uncounted.pop(newest), before=newest)
        return kept(rows, plan, catalogue, moment=moment, **more)

    waiting: list[UncountedTakes] = []
    monkeypatch.setattr(UncountedTakes, "__init__", noting(UncountedTakes.__init__, waiting))
    monkeypatch.setattr(online, "collate", collate)
    with pytest.raises(Misconfigured, match="takes since the step before"):
        run(timeline)


def noting(init: Callable[..., None], made: list[Any]) -> Callable[..., None]:
    def noted(self: Any) -> None:
        init(self)
        made.append(self)

    return noted


def test_a_counted_source_of_a_drawn_exposure_is_caught(timeline: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureState, "sources", lambda state, target_B, *_: DrawnSources.none(len(target_B)))
    with pytest.raises(Misconfigured, match="the take that they were drawn from"):
        run(timeline)


def test_drawn_exposures_that_name_no_take_are_refused(timeline: Timeline) -> None:
    def without_sources(events: Iterator[Entry]) -> Iterator[Entry]:
        for entry in events:
            event = entry.behaviour
            nothing = {"drawn_from": None, "drawn_at": None}
            yield replace(entry, behaviour=None if event is None else event.model_copy(update=nothing))

    with pytest.raises(Misconfigured, match=r"\d+ exposures were drawn and do not name the take"):
        run(timeline, without_sources)
