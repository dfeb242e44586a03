"""What was taken, as scores read it: equal to the trainer's at the same state, current, and told where it is not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from aiokafka import TopicPartition
from structlog.testing import capture_logs

from schemas.errors import BrokerUnavailable, Misconfigured
from schemas.item_states import state_key
from streams.broker import topic_follower
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics, TopicIncarnation
from streams.broker.topics import TopicsConfig
from streams.indexing.announcements import as_embedding
from streams.serving.states_follower import StatesFollower
from tests.factories.fake_consumer import FakeConsumer, FakeRecord
from tests.factories.releases import make_manifest
from tests.factories.samples import SMALL_MODEL
from tests.factories.served_states import AT, ITEMS, NOW, Trained, apply, opened
from tests.factories.serving import DIM, FEATURES, Open, open_bench
from tests.factories.vector_cache import announced
from trainer.features.state_records import Record
from trainer.networks.ciubm import CiUBM
from trainer.networks.collate import dense_width
from trainer.networks.scorer import Scorer

__all__ = ["open_bench"]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("user", "trigger"), [("ann", None), ("ann", "lamp"), ("nobody", "lamp")])
async def test_a_request_reads_what_the_trainer_would_learn_from_to_the_last_bit(
    open_bench: Open, user: str, trigger: str | None, cached: bool
) -> None:
    trained = Trained()
    bench = await opened(open_bench, trained)
    await apply(bench, trained.write())
    if cached:
        for each in trained.rows:
            bench.service.vector_cache.apply(*announced_as(each))
        bench.service.vector_cache.confirm(asyncio.get_running_loop().time())
    asked = {"user_id": user, "item_ids": [*ITEMS, "never heard of"], "trigger_item": trigger, "at": AT}
    status, _ = await bench.post("/v1/score", asked)
    assert status == 200 and bench.service.models.current is not None
    items, candidates, moment = bench.service.models.current.scorer.asked[-1]  # type: ignore[attr-defined]
    network = CiUBM(SMALL_MODEL, vector_width=DIM, seed=1, dense_width=dense_width(FEATURES)).eval()
    scorer = Scorer(network, make_manifest(1), history_length=3, features=FEATURES)
    served = scorer.prepare(items, candidates, moment)
    history, seconds = await bench.service.behaviours.takes(user)
    more = [] if trigger is None else [trigger]
    learned = trained.batch([*ITEMS, "never heard of"], [*history, *more], [*seconds, *(AT for _ in more)], AT)
    assert served.dense_BF.numpy().tobytes() == learned.dense_BF.numpy().tobytes()
    with torch.inference_mode():
        expected = torch.sigmoid(network(learned).double()).numpy()
    np.testing.assert_allclose(scorer.probabilities(served)[:, 0], expected, rtol=1e-5)
    columns = dict(zip([*FEATURES.names, "has vector"], served.dense_BF.numpy()[0], strict=True))
    assert columns["takes"] > 1 and (user == "nobody" or columns["attributes shared"] > 0)
    assert (columns["together"] > 0) == (user == "ann" or trigger is not None)


def announced_as(item: Any) -> tuple[bytes, bytes]:
    return announced(item.item_id, item.vector, item.encoder_version)[0], as_embedding(item).model_dump_json().encode()


async def test_without_a_moment_a_request_is_one_of_now(open_bench: Open) -> None:
    bench = await opened(open_bench, Trained())
    await bench.post("/v1/score", {"user_id": "ann", "item_ids": ["boot"]})
    assert bench.service.models.current is not None
    _, _, moment = bench.service.models.current.scorer.asked[-1]  # type: ignore[attr-defined]
    assert moment.now == NOW and len(moment.history_seconds) == 2 and moment.states.takes.takes_U.sum() == 0


async def test_a_trainer_that_has_written_nothing_yet_is_told_and_no_reason_to_be_unready(open_bench: Open) -> None:
    trained, clock = Trained(), asyncio.get_running_loop().time
    bench = await opened(open_bench, trained)
    bench.service.vector_cache.confirm(clock())
    bench.service.states._confirm(clock())
    status, answer = await bench.get("/readyz")
    assert status == 200 and "no trainer has written" in answer["unconfirmed"][0]
    await apply(bench, trained.write())
    assert (await bench.get("/readyz"))[1]["unconfirmed"] == []
    bench.service.states.is_reading = True
    status, answer = await bench.get("/readyz")
    assert (status, answer["checks"]["states"]) == (503, "what was taken is still being read")


# ---- the follower ----------------------------------------------------------------------------------------------------


class Topic(FakeConsumer):
    """One partition; connecting can fail."""

    def __init__(self) -> None:
        self.refusal: Exception | None = None
        self.starts = self.asked = 0
        self.is_away = False
        super().__init__({TopicPartition(TopicsConfig().full_name("item-states"), 0): []})

    async def start(self) -> None:
        self.starts += 1
        if self.refusal is not None:
            raise self.refusal

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        self.asked += 1
        if self.is_away:
            raise topic_follower.kafka_errors.KafkaConnectionError("away")
        return await super().end_offsets(partitions)

    def add(self, records: list[Record]) -> None:
        (held,) = self.log.values()
        held += [FakeRecord(0, len(held) + n, key, value) for n, (key, value) in enumerate(records)]  # type: ignore[operator]


@pytest.fixture
def topic(monkeypatch: pytest.MonkeyPatch) -> Topic:
    made = Topic()
    monkeypatch.setattr(topic_follower, "make_consumer", lambda *_: made)
    found = ClusterTopics("c", {"item-states": "t"}, {"item-states": [0]})
    monkeypatch.setattr(topic_follower, "describe_topics", lambda *_: found)
    return made


def follower() -> StatesFollower:
    clock = asyncio.get_running_loop().time
    return StatesFollower(
        FEATURES, BrokerConfig(), TopicsConfig(), clock=clock, confirm_every_seconds=0.001, retry_seconds=0.001
    )


async def following(states: StatesFollower, stop: asyncio.Event) -> asyncio.Task[None]:
    task = asyncio.create_task(states.run(stop))
    async with asyncio.timeout(5):
        while states.behind_seconds == float("inf") and not task.done():
            await asyncio.sleep(0.001)
    return task


async def test_the_follower_starts_from_the_topic_and_takes_up_what_comes(topic: Topic) -> None:
    trained, states, stop = Trained(), follower(), asyncio.Event()
    topic.add(trained.write(until=30))
    task = await following(states, stop)
    assert states.copies.head is not None and states.copies.head.number == 1 and not states.is_reading
    topic.add([(b"nonsense", b""), (state_key(FEATURES.version, 7), b"{")])
    topic.add(trained.write(since=30))
    with capture_logs() as logged:
        async with asyncio.timeout(5):
            while states.copies.head.number < 2:
                await asyncio.sleep(0.001)
    assert [line["event"] for line in logged] == ["states.unreadable"] * 2
    assert states.copies.states(np.zeros((1, 2), np.int64), trained.catalogue.facts(np.array([0]))).shared.takes == 60
    stop.set()
    await task


async def test_a_topic_that_begins_anew_is_read_from_its_beginning_and_the_copies_serve_meanwhile(topic: Topic) -> None:
    trained, states, stop = Trained(), follower(), asyncio.Event()
    topic.add(trained.write(until=30))
    task = await following(states, stop)
    held = states.copies
    topic.refusal = BrokerUnavailable("Kafka", "away")
    (log,) = topic.log.values()
    log.clear()  # type: ignore[attr-defined]
    topic.fetch_failure = topic_follower.kafka_errors.OffsetOutOfRangeError({})
    async with asyncio.timeout(5):
        while topic.starts < 3:
            await asyncio.sleep(0.001)
    assert states.copies is held and len(held) and not states.is_reading
    topic.refusal = None
    for _ in range(2):  # what it holds is known, and that is nothing
        asked = topic.asked
        async with asyncio.timeout(5):
            while topic.asked == asked:
                await asyncio.sleep(0.001)
    assert states.copies is held and states.copies.head is not None, "an old count is closer than none"
    topic.add(Trained().write(until=10))
    async with asyncio.timeout(5):
        while states.copies is held:
            await asyncio.sleep(0.001)
    assert states.copies.head is not None and states.copies.complete
    stop.set()
    await task


@pytest.mark.parametrize("is_same", [True, False])
async def test_a_broker_that_was_away_is_read_on_and_only_a_topic_that_was_replaced_meanwhile_from_its_beginning(
    topic: Topic, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    trained, states, stop = Trained(), follower(), asyncio.Event()
    topic.add(trained.write(until=30))
    task = await following(states, stop)
    held = states.copies
    found = TopicIncarnation("c", "item-states", "t" if is_same else "another")
    topic.is_away = True
    monkeypatch.setattr(topic_follower, "read_incarnation", lambda *_: found)
    async with asyncio.timeout(5):
        asked = topic.asked
        while topic.asked < asked + 2:
            await asyncio.sleep(0.001)
    topic.add(trained.write(since=30))
    topic.is_away = False
    async with asyncio.timeout(5):
        while states.copies.head is None or states.copies.head.number < 2:
            await asyncio.sleep(0.001)
    assert (states.copies is held) == is_same == (topic.starts == 1)
    stop.set()
    await task


async def test_a_missing_topic_ends_the_start_and_a_broker_that_is_away_does_not(topic: Topic) -> None:
    topic.refusal = Misconfigured("no such topic: run 'mimstream topics create'")
    with pytest.raises(Misconfigured):
        await follower().run(asyncio.Event())
    topic.refusal = BrokerUnavailable("Kafka", "away")
    states, stop, tried = follower(), asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(states.run(stop, tried.set))
    await asyncio.wait_for(tried.wait(), 5)
    for refusal in (Misconfigured("refused"), BrokerUnavailable("Kafka", "away")):  # no longer at the first try
        topic.refusal, starts = refusal, topic.starts
        async with asyncio.timeout(5):
            while topic.starts < starts + 2 and not task.done():
                await asyncio.sleep(0.001)
    topic.refusal = None
    async with asyncio.timeout(5):
        while states.behind_seconds == float("inf") and not task.done():
            await asyncio.sleep(0.001)
    stop.set()
    await task
    assert topic.starts == topic.stops > 6, "whatever a try ended with, its connection is closed"
