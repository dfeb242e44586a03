"""Rows that a server logs against the trainer's own features: equal at the same state, and planted faults are found."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.errors import BrokerUnavailable, Misconfigured
from schemas.skew import SkewRecord
from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicsConfig
from streams.commands import skew as skew_command
from streams.serving import skew_log
from streams.settings import Settings
from streams.training import skew_report
from streams.training.reports import SkewReport
from streams.training.skew_report import SkewFound, read_skew, summary
from tests.factories.fake_consumer import FakeRecord
from tests.factories.served_states import AT, apply
from tests.factories.serving import FEATURES, open_bench
from tests.factories.skew_scene import Scene, scene
from tests.factories.waiting import until
from trainer.features import columns
from trainer.networks import scorer as served_with

__all__ = ["open_bench", "scene"]


async def test_rows_of_a_state_that_is_kept_are_logged_and_equal_however_far_the_trainer_went_on(scene: Scene) -> None:
    await scene.write(until=40)
    await scene.ask()
    scene.trained.write(since=40, until=60)
    scene.trained.state.delete("boot")
    found = scene.compare()
    assert found is not None and found.outcome is not None
    assert (found.outcome.rows, found.outcome.differing, found.outcome.largest) == (4, 0, {})
    assert scene.reports == [SkewReport(4, 0)] and found.outcome.releases == [make_release(scene)]
    assert scene.compare() is None, "each row once"


def make_release(scene: Scene) -> str:
    model = scene.bench.service.models.current
    assert model is not None
    return model.manifest.release_id


async def test_a_record_names_no_user_and_holds_what_went_into_the_network(scene: Scene) -> None:
    await scene.write(until=40)
    await scene.ask()
    (value,) = scene.bench.service.skew.waiting
    served = SkewRecord.model_validate_json(value).served
    assert served is not None and b"ann" not in value
    assert served.history == ["shoe", "sofa", "lamp"] and served.history_seconds[-1] == served.now == AT
    assert len(served.values) == 4 * 4 * len(FEATURES.names) and None not in served.probabilities


async def test_nothing_is_logged_of_a_state_that_no_trainer_keeps_nor_between_two_states(scene: Scene) -> None:
    await scene.ask()
    await apply(scene.bench, scene.trained.write(until=20))
    await scene.ask()
    assert not scene.bench.service.skew.waiting
    await scene.write(since=20, until=40)
    scene.bench.service.states.copies._is_between = True
    await scene.ask()
    assert not scene.bench.service.skew.waiting


async def test_items_that_the_server_does_not_hold_are_not_logged(scene: Scene) -> None:
    await scene.write(until=40)
    await scene.ask(item_ids=["never heard of", "untaken", "nor of"])
    (value,) = scene.bench.service.skew.waiting
    served = SkewRecord.model_validate_json(value).served
    assert served is not None and served.targets == ["untaken"]
    for more in ({"item_ids": ["never heard of"]}, {"trigger_item": "never heard of"}):
        scene.bench.service.skew._pause.cut_short()
        await scene.ask(**more)
    assert len(scene.bench.service.skew.waiting) == 1


async def test_rows_of_another_state_are_not_compared(scene: Scene) -> None:
    await scene.write(until=20)
    await scene.ask()
    await scene.write(since=20, until=40)
    assert scene.compare() is None and not scene.reports


def swapped(kept: Callable[..., Any]) -> Callable[..., Any]:
    def features(*given: Any, **more: Any) -> Any:
        values = kept(*given, **more)
        place = FEATURES.names.index("takes")
        values[:, [place, place + 1]] = values[:, [place + 1, place]]
        return values

    return features


def other_formula(kept: Callable[..., Any]) -> Callable[..., Any]:
    def features(*given: Any, **more: Any) -> Any:
        values = kept(*given, **more)
        values[:, FEATURES.names.index("takes")] *= 1.01
        return values

    return features


def other_half_life(kept: Callable[..., Any]) -> Callable[..., Any]:
    def features(*given: Any, **more: Any) -> Any:
        before = dict(columns.HALF_LIVES)
        columns.HALF_LIVES["6h"] = 7_200.0
        try:
            return kept(*given, **more)
        finally:
            columns.HALF_LIVES.update(before)

    return features


@pytest.mark.parametrize(
    ("fault", "named"),
    [(swapped, "takes"), (other_formula, "takes"), (other_half_life, "takes 6h")],
    ids=["order", "formula", "half-life"],
)
async def test_a_server_that_computes_otherwise_is_found_and_named(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], named: str
) -> None:
    await scene.write(until=40)
    monkeypatch.setattr(served_with, "features", fault(served_with.features))
    await scene.ask()
    with capture_logs() as logs:
        found = scene.compare()
    assert found is not None and found.outcome is not None
    assert found.outcome.differing >= 3 and named in found.outcome.largest
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["train.skew"]
    report = summary(SkewFound([found.outcome]), limit=0.01)
    assert not report["passed"] and named in report["largest_differences"]


async def test_a_count_that_a_server_missed_is_found(scene: Scene) -> None:
    await scene.write(until=20)
    await scene.write(since=20, until=40, lost=0)
    await scene.ask()
    found = scene.compare()
    assert found is not None and found.outcome is not None and found.outcome.differing >= 1
    assert found.outcome.largest


async def test_facts_of_an_item_that_the_server_has_otherwise_are_found(scene: Scene) -> None:
    await scene.write(until=40)
    for number in range(1, 5):
        scene.trained.catalogue._facts.words_IW[number] = 0
    await scene.ask()
    found = scene.compare()
    assert found is not None and found.outcome is not None and found.outcome.differing >= 1


def test_without_a_comparison_the_report_does_not_pass() -> None:
    assert summary(SkewFound(), limit=0.01)["passed"] is False


async def test_a_report_keeps_outcomes_and_only_counts_the_rows_that_servers_logged(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.write(until=40)
    await scene.ask()
    (logged,) = scene.bench.service.skew.waiting
    outcome = scene.compare()
    assert outcome is not None

    class Topic:
        def __init__(self, broker: Any, topics: Any, name: str, handle: Callable[..., Any]) -> None:
            self.handle = handle

        async def open(self, *, since: datetime) -> None: ...

        async def catch_up(self) -> None:
            for value in (logged, None, b"{", outcome.model_dump_json().encode(), logged):
                await self.handle([FakeRecord(0, 0, value=value)], "source", 1)

        async def close(self) -> None: ...

    monkeypatch.setattr(skew_report, "TopicFollower", Topic)
    found = await read_skew(BrokerConfig(), TopicsConfig(), datetime.now(UTC))
    assert found == SkewFound([outcome.outcome], 8)
    assert summary(found, limit=0.01)["logged_rows"] == 8 and summary(found, limit=0.01)["passed"]


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf", "1e12"])
def test_a_time_that_cannot_be_looked_back_for_is_refused(hours: str) -> None:
    parser = argparse.ArgumentParser()
    skew_command.add_arguments(parser)
    with pytest.raises(Misconfigured, match="look back"):
        skew_command.run(parser.parse_args(["--hours", hours]), Settings())


async def test_a_server_that_shall_log_nothing_needs_no_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skew_log, "describe_topics", lambda *given: pytest.fail("asked for the topic"))
    stop = asyncio.Event()
    sending = skew_log.SkewLog(
        FEATURES.version, share=0.0, broker=BrokerConfig(), topics=TopicsConfig(), seed=0, clock=lambda: 0.0
    )
    running = asyncio.create_task(sending.run(stop))
    await asyncio.sleep(0.01)
    assert not running.done()
    stop.set()
    await asyncio.wait_for(running, 1)


class Producer:
    """Takes records until it is told to refuse them."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.failures: list[Exception] = []
        self.connected: list[str] = []

    async def start(self) -> None:
        self.connected.append("begun")

    async def stop(self) -> None:
        self.connected.append("ended")

    async def send_and_wait(self, topic: str, value: bytes, *, key: bytes) -> None:
        assert (topic, key) == ("mim.skew", b"rows")
        if self.failures:
            raise self.failures.pop()
        self.sent.append(value)


async def test_rows_are_sent_once_and_a_topic_that_is_refused_is_told_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    producer, stop = Producer(), asyncio.Event()
    monkeypatch.setattr(skew_log, "make_producer", lambda config: producer)
    monkeypatch.setattr(skew_log, "describe_topics", lambda *given: None)
    monkeypatch.setattr(skew_log, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(skew_log, "_REFUSED_SECONDS", 0.0)
    sending = skew_log.SkewLog(
        FEATURES.version, share=1.0, broker=BrokerConfig(), topics=TopicsConfig(), seed=0, clock=lambda: 0.0
    )
    producer.failures = [BrokerUnavailable("Kafka", "away"), Misconfigured("may not write")]
    sending.waiting.extend([b"one", b"two"])
    sending._came.set()
    with capture_logs() as logs:
        running = asyncio.create_task(sending.run(stop))
        await until(lambda: len(producer.sent) == 2)
        await until(lambda: not sending._came.is_set())  # it waits for the next rows
        stop.set()
        sending._came.set()
        await running
    assert producer.sent == [b"one", b"two"] and not sending.waiting
    assert [line["log_level"] for line in logs if line["event"] == "serve.skew_not_logged"] == ["error", "warning"]
    assert producer.connected == ["begun", "ended"] * 3


@pytest.mark.parametrize(
    ("failure", "pause"),
    [(Misconfigured("may not write"), "_REFUSED_SECONDS"), (BrokerUnavailable("Kafka", "away"), "_RETRY_SECONDS")],
)
async def test_a_topic_that_is_refused_has_another_pause_than_a_broker_that_is_away(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, pause: str
) -> None:
    producer, stop = Producer(), asyncio.Event()
    monkeypatch.setattr(skew_log, "make_producer", lambda config: producer)
    monkeypatch.setattr(skew_log, "describe_topics", lambda *given: None)
    for name in ("_RETRY_SECONDS", "_REFUSED_SECONDS"):
        monkeypatch.setattr(skew_log, name, 0.0 if name == pause else 1_000.0)
    sending = skew_log.SkewLog(
        FEATURES.version, share=1.0, broker=BrokerConfig(), topics=TopicsConfig(), seed=0, clock=lambda: 0.0
    )
    producer.failures = [failure]
    sending.waiting.append(b"one")
    sending._came.set()
    running = asyncio.create_task(sending.run(stop))
    await until(lambda: producer.connected == ["begun", "ended", "begun"])
    sending._came.set()
    await until(lambda: producer.sent == [b"one"])
    stop.set()
    sending._came.set()
    await running
