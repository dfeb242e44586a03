"""What the trainer reads of a log in memory: where it begins and ends, what it fetches, which records count."""

from __future__ import annotations

import math
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors

from schemas.errors import Misconfigured
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics
from streams.broker.topics import TopicsConfig
from streams.training import input as training_input
from streams.training.input import TrainingInput
from tests.factories.fake_consumer import IN_TIME_MS, FakeConsumer, FakeRecord
from tests.factories.samples import behaviour, embedding, unit_vector

VECTORS = TopicPartition("mim.embeddings", 0)
CLICKS = {number: TopicPartition("mim.behaviours", number) for number in (0, 1)}
FOUND = ClusterTopics("c", {"embeddings": "e", "behaviours": "b"}, {"embeddings": [0], "behaviours": [0, 1]})
NOW = IN_TIME_MS / 1000


def vector(offset: int, item: str = "i1", *, version: str = "v1", gone: bool = False, key: str | None = None) -> Any:
    message = embedding(item, unit_vector(3), version=version).model_dump_json().encode()
    return FakeRecord(0, offset, (key or f"{version}:{item}").encode(), None if gone else message)


def click(partition: int, offset: int, *, second: float = 0, written_ms: int = IN_TIME_MS) -> FakeRecord:
    value = behaviour(f"e{partition}-{offset}", second=second).model_dump_json().encode()
    return FakeRecord(partition, offset, b"u1", value, written_ms)


class Scene:
    """An input over a log that begins at offset 2 in every partition."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, vectors: list[Any], *clicks: list[FakeRecord]) -> None:
        self.now = NOW
        self.consumer = FakeConsumer({VECTORS: vectors, CLICKS[0]: clicks[0], CLICKS[1]: clicks[1]}, beginning=2)
        monkeypatch.setattr(training_input, "make_consumer", lambda _: self.consumer)
        monkeypatch.setattr(training_input, "describe_topics", lambda *_: FOUND)

    def make(self, **more: Any) -> TrainingInput:
        settings: dict[str, Any] = {
            "field_map": {}, "encoder_version": None, "fetch_max_records": 100, "buffered_records": 1_000,
            "idle_seconds": 5.0, "all_idle_seconds": 60.0, "open_transaction_seconds": 60.0, "bounded": True,
        }  # fmt: skip
        return TrainingInput(BrokerConfig(), TopicsConfig(), clock=lambda: self.now, **settings | more)

    async def opened(self, **more: Any) -> TrainingInput:
        reads = self.make(**more)
        await reads.open()
        return reads


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(
        monkeypatch,
        [vector(n, f"i{n}") for n in (2, 3, 4)],
        [click(0, n) for n in (2, 3, 4, 5)],
        [click(1, n) for n in (2, 3)],
    )


async def fetch(reads: TrainingInput, *, embeddings: bool = True, behaviours: bool = True) -> None:
    await reads.fetch(embeddings=embeddings, behaviours=behaviours, wait_seconds=0)


# ---- where reading begins and ends -----------------------------------------------------------------------------------


async def test_reading_begins_where_it_is_told_per_topic_and_partition_and_else_at_the_beginning(scene: Scene) -> None:
    reads = await scene.opened(start_at={"embeddings": {0: 3}, "behaviours": {1: 3}})
    assert scene.consumer.positions == {VECTORS: 3, CLICKS[0]: 2, CLICKS[1]: 3}
    assert reads.starts == {0: 2, 1: 3} and reads.beginnings == {0: 2, 1: 2}
    assert reads.embedding_offsets == {0: 3} and reads.partitions == [0, 1]


async def test_clicks_that_are_gone_are_refused_and_vectors_that_were_compacted_are_not(scene: Scene) -> None:
    reads = await scene.opened(start_at={"embeddings": {0: 0}, "behaviours": {0: 2}})
    assert scene.consumer.positions[VECTORS] == 2 and reads.embedding_offsets == {0: 2}
    with pytest.raises(Misconfigured, match=r"partition 0 of 'mim\.behaviours' begins at offset 2 now.* go on at 1"):
        await scene.opened(start_at={"behaviours": {0: 1}})
    reads = await scene.opened(start_at={"behaviours": {0: 1}}, lost_is_fatal=False)
    assert reads.starts == {0: 2, 1: 2}


@pytest.mark.parametrize("lost_is_fatal", [True, False])
async def test_a_log_that_lost_its_end_is_refused(scene: Scene, lost_is_fatal: bool) -> None:
    await scene.opened(start_at={"behaviours": {1: 4}}, lost_is_fatal=lost_is_fatal)
    with pytest.raises(Misconfigured, match=r"partition 1 of 'mim\.behaviours' ends at offset 4.*go on at 5"):
        await scene.opened(start_at={"behaviours": {1: 5}}, lost_is_fatal=lost_is_fatal)
    with pytest.raises(Misconfigured, match=r"'mim\.embeddings' ends at offset 5"):
        await scene.opened(start_at={"embeddings": {0: 6}}, lost_is_fatal=lost_is_fatal)


@pytest.mark.parametrize(
    ("end_at", "start_at", "read"),
    [
        ({}, {}, {0: [2, 3, 4, 5], 1: [2, 3]}),
        ({0: 4}, {}, {0: [2, 3], 1: [2, 3]}),
        ({0: 99, 1: 3}, {}, {0: [2, 3, 4, 5], 1: [2]}),
        ({0: 3}, {0: 5}, {0: [], 1: [2, 3]}),
    ],
    ids=["to the end", "one ends earlier", "beyond the end", "before the start"],
)
async def test_a_bounded_input_reads_to_the_earlier_of_both_ends_and_nothing_that_comes_later(
    scene: Scene, end_at: dict[int, int], start_at: dict[int, int], read: dict[int, list[int]]
) -> None:
    reads = await scene.opened(end_at=end_at, start_at={"behaviours": start_at})
    scene.consumer.log = {p: [*records, click(p.partition, 9)] for p, records in scene.consumer.log.items()}
    assert not reads.all_handed_out
    await fetch(reads)
    entries = reads.next_behaviours(100)
    assert {n: [e.offset for e in entries if e.partition == n] for n in (0, 1)} == read
    assert reads.all_handed_out
    assert [record.item_id for record in reads.next_embeddings()] == ["i2", "i3", "i4"]
    assert await reads.all_embeddings_at_start_read() and reads.embedding_offsets == {0: 5}


async def test_an_endless_input_reads_on_and_its_vectors_are_complete_at_what_there_was_at_the_start(
    scene: Scene,
) -> None:
    reads = await scene.opened(bounded=False)
    assert not await reads.all_embeddings_at_start_read()
    scene.consumer.polled_ms = IN_TIME_MS + 60_000
    await fetch(reads)
    assert await reads.all_embeddings_at_start_read() and len(reads.next_behaviours(100)) == 6
    scene.consumer.log = {**scene.consumer.log, CLICKS[1]: [click(1, 7)], VECTORS: [vector(9, gone=True)]}
    await fetch(reads)
    assert [(e.partition, e.offset) for e in reads.next_behaviours(100)] == [(1, 7)]
    assert reads.embedding_offsets == {0: 10}


# ---- what is fetched -------------------------------------------------------------------------------------------------


async def test_only_what_is_wanted_and_has_room_is_fetched(scene: Scene) -> None:
    scene.consumer.log = {**scene.consumer.log, CLICKS[0]: [click(0, n) for n in range(2, 102)]}
    reads = await scene.opened(buffered_records=1)  # never below 100 a partition
    await fetch(reads, behaviours=False)
    assert reads.has_embeddings and len(reads.next_embeddings()) == 3 and not reads.has_embeddings
    assert scene.consumer.positions == {VECTORS: 5, CLICKS[0]: 2, CLICKS[1]: 2}
    await fetch(reads, embeddings=False)
    assert scene.consumer.positions == {VECTORS: 5, CLICKS[0]: 102, CLICKS[1]: 4}
    full = {**scene.consumer.log, CLICKS[0]: [click(0, 102)], CLICKS[1]: [click(1, 4)]}
    scene.consumer.log = full
    await fetch(reads, embeddings=False)
    assert scene.consumer.positions == {VECTORS: 5, CLICKS[0]: 102, CLICKS[1]: 5}


async def test_a_broker_that_is_away_is_waited_for_and_a_log_that_was_cut_off_is_told(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    reads = await scene.opened()
    monkeypatch.setattr(training_input.asyncio, "sleep", sleep)
    scene.consumer.fetch_failure = kafka_errors.KafkaConnectionError("away")
    await fetch(reads)
    assert max(slept) == 0.5 and not reads.has_embeddings
    await fetch(reads)
    assert reads.has_embeddings

    async def unknown(partition: TopicPartition) -> int:
        raise kafka_errors.KafkaTimeoutError("no position yet")

    with monkeypatch.context() as patched:
        patched.setattr(scene.consumer, "position", unknown)
        await fetch(reads)
    scene.consumer.fetch_failure = kafka_errors.OffsetOutOfRangeError({CLICKS[0]: 3})
    with pytest.raises(Misconfigured, match="BEHAVIOURS_RETENTION_DAYS"):
        await fetch(reads)


async def test_where_nothing_is_wanted_it_waits(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    reads = await scene.opened()
    monkeypatch.setattr(training_input.asyncio, "sleep", sleep)
    await reads.fetch(embeddings=False, behaviours=False, wait_seconds=0.25)
    assert slept == [0.25]


# ---- vectors ---------------------------------------------------------------------------------------------------------


async def test_tombstones_count_foreign_encoders_and_broken_records_are_counted_and_passed_over(scene: Scene) -> None:
    scene.consumer.log = {
        **scene.consumer.log,
        VECTORS: [
            vector(2, "gone before", version="v0", gone=True),  # names no encoder
            vector(3, "i3"),
            vector(4, "i4", version="v2"),
            vector(5, "i3", gone=True),
            FakeRecord(0, 6, b"no version", b"{}"),
            vector(7, "i7", key="v1:i8"),
            FakeRecord(0, 8, b"v1:i8", b"{}"),
        ],
    }
    reads = await scene.opened()
    await fetch(reads)
    found = [(record.item_id, record.embedding is not None) for record in reads.next_embeddings()]
    assert found == [("i3", True), ("i3", False)] and reads.encoder_version == "v1"
    assert (reads.other_encoders, reads.broken_vectors) == (2, 3)


async def test_a_named_encoder_is_the_only_one_that_counts(scene: Scene) -> None:
    reads = await scene.opened(encoder_version="other")
    await fetch(reads)
    assert not reads.has_embeddings and (reads.other_encoders, reads.encoder_version) == (3, "other")


async def test_vectors_are_current_once_all_that_can_be_read_was_returned(scene: Scene) -> None:
    reads = await scene.opened(bounded=False)
    assert not reads.embeddings_are_current
    await fetch(reads, behaviours=False)
    assert not reads.embeddings_are_current
    reads.next_embeddings()
    assert reads.embeddings_are_current
    scene.consumer.log = {**scene.consumer.log, VECTORS: [vector(5), vector(6)]}
    assert not reads.embeddings_are_current
    scene.consumer.stable[VECTORS] = 5  # the rest belongs to an open transaction
    assert reads.embeddings_are_current
    scene.consumer.stable[VECTORS] = -1  # a broker that does not say
    assert not reads.embeddings_are_current
    scene.consumer.highwater = lambda _: None  # type: ignore[method-assign]
    assert not reads.embeddings_are_current


# ---- clicks ----------------------------------------------------------------------------------------------------------


async def test_an_entry_says_when_it_was_written_and_was_produced_no_later_than_it_was_fetched(scene: Scene) -> None:
    ahead = click(0, 2, written_ms=IN_TIME_MS + 90_000)
    scene.consumer.log = {**scene.consumer.log, CLICKS[0]: [ahead, FakeRecord(0, 3, b"u1", b"{")], CLICKS[1]: []}
    reads = await scene.opened()
    await fetch(reads)
    first, second = reads.next_behaviours(9)
    assert (first.partition, first.offset, first.produced_at, first.written_at) == (0, 2, NOW, NOW + 90)
    assert first.behaviour is not None and first.behaviour.event_id == "e0-2"
    assert (second.offset, second.behaviour, second.written_at) == (3, None, NOW)


async def test_a_partition_whose_transaction_is_open_is_not_read_to_its_end(scene: Scene) -> None:
    reads = await scene.opened(bounded=False)
    scene.consumer.stable[CLICKS[1]] = 3
    scene.now += 100
    scene.consumer.polled_ms = IN_TIME_MS + 100_000
    await fetch(reads)
    reads.next_behaviours(100)
    await fetch(reads)
    assert reads.transactions.open == 1 and not reads.all_handed_out
    del scene.consumer.stable[CLICKS[1]]
    await fetch(reads)
    assert reads.transactions.open == 0
    reads.next_behaviours(100)
    assert reads.all_handed_out


async def test_a_partition_falls_idle_once_by_answers_of_the_broker_and_wakes_with_its_next_event(scene: Scene) -> None:
    scene.consumer.log = {**scene.consumer.log, CLICKS[0]: [click(0, 2)], CLICKS[1]: [click(1, 2)]}
    reads = await scene.opened(bounded=False, all_idle_seconds=1.0)  # never below `idle_seconds`

    async def after(seconds: float, *, answered: bool = True) -> list[int]:
        scene.now += seconds
        if answered:
            scene.consumer.polled_ms = round(scene.now * 1000)
        await fetch(reads)
        reads.next_behaviours(100)
        return reads.newly_idle(except_for=[1])

    assert await after(6) == [] and reads.waits_for_silence  # the events have just come
    assert await after(6, answered=False) == []
    scene.consumer.polled_ms = None
    assert await after(0, answered=False) == []
    assert await after(0) == [0] and await after(9) == []
    assert reads.newly_idle() == [1] and not reads.waits_for_silence
    scene.consumer.log = {**scene.consumer.log, CLICKS[0]: [click(0, 3)]}
    await fetch(reads)
    assert reads.newly_idle() == [] and len(reads.next_behaviours(9)) == 1
    assert await after(4.75) == [] and await after(0.25) == [0]


async def test_a_bounded_input_is_idle_for_ever_at_its_end(scene: Scene) -> None:
    reads = await scene.opened()
    await fetch(reads)
    assert reads.newly_idle() == [] and len(reads.next_behaviours(100)) == 6
    assert reads.newly_idle() == [0, 1] and reads._polled_at(CLICKS[0]) == math.inf


async def test_an_input_that_was_never_opened_can_be_closed(scene: Scene) -> None:
    await scene.make().close()
