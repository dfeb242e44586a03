"""What the trainer reads of `queries` beside items' vectors: whose they are, which count, and up to where."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from aiokafka import TopicPartition
from structlog.testing import capture_logs

from schemas.errors import Misconfigured
from schemas.queries import QueryEmbedding, query_id, query_key
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics, training_topics
from streams.broker.topics import TopicsConfig
from streams.training import input as training_input
from streams.training.input import TrainingInput
from tests.factories.fake_consumer import IN_TIME_MS, FakeConsumer, FakeRecord
from tests.factories.samples import embedding, unit_vector
from trainer.samples.searches import searched

VECTORS, CLICKS = TopicPartition("mim.embeddings", 0), TopicPartition("mim.behaviours", 0)
QUERIES = {number: TopicPartition("mim.queries", number) for number in (0, 1)}
LAMP, TABLE = (str(query_id(words, None)) for words in ("lamp", "table"))


def item(offset: int, name: str = "i1", *, version: str = "v1") -> FakeRecord:
    message = embedding(name, unit_vector(3), version=version).model_dump_json().encode()
    return FakeRecord(0, offset, f"{version}:{name}".encode(), message)


def query(
    offset: int,
    name: str = LAMP,
    *,
    version: str = "v1",
    vector: np.ndarray | None = None,
    refused: bool = False,
    gone: bool = False,
    key: bytes | None = None,
) -> FakeRecord:
    known = unit_vector(4) if vector is None else vector
    message = QueryEmbedding(
        query=name,
        encoder_version=version,
        vector=None if refused else base64.b64encode(known.astype("<f4").tobytes()),
        dim=len(known),
        reason="bad_image: cut off" if refused else None,
    )
    value = None if gone else message.model_dump_json().encode()
    return FakeRecord(0, offset, key or query_key(version, name), value)


class Scene:
    """An input over a log in memory; `queries` has two partitions, the other topics one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: dict[TopicPartition, list[FakeRecord]] = {VECTORS: [], CLICKS: [], QUERIES[0]: [], QUERIES[1]: []}
        self.consumer = FakeConsumer(self.log)
        self.asked: list[Any] = []
        monkeypatch.setattr(training_input, "make_consumer", lambda _: self.consumer)
        monkeypatch.setattr(training_input, "describe_topics", self.describe)

    def describe(self, _: Any, __: Any, names: Any) -> ClusterTopics:
        self.asked.append(names)
        there = {"embeddings": [0], "behaviours": [0], "queries": [0, 1]}
        return ClusterTopics("c", dict.fromkeys(names, "id"), {name: there[name] for name in names})

    async def opened(self, *, queries: bool = True, **more: Any) -> TrainingInput:
        settings: dict[str, Any] = {
            "field_map": {}, "encoder_version": None, "fetch_max_records": 100, "buffered_records": 1_000,
            "idle_seconds": 5.0, "all_idle_seconds": 60.0, "open_transaction_seconds": 60.0, "bounded": True,
        }  # fmt: skip
        reads = TrainingInput(
            BrokerConfig(), TopicsConfig(), clock=lambda: IN_TIME_MS / 1000, queries=queries, **settings | more
        )
        await reads.open()
        return reads


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


async def fetch(reads: TrainingInput, *, behaviours: bool = False) -> list[tuple[str, bool]]:
    await reads.fetch(embeddings=True, behaviours=behaviours, wait_seconds=0)
    return [(one.item_id, one.embedding is not None) for one in reads.next_embeddings()]


async def test_queries_are_read_from_all_their_partitions_and_named_as_rows_name_them(scene: Scene) -> None:
    scene.log[VECTORS] += [item(0)]
    scene.log[QUERIES[0]] += [query(0), query(4, TABLE, refused=True)]
    scene.log[QUERIES[1]] += [query(7, TABLE), query(8, LAMP, gone=True)]
    reads = await scene.opened()
    assert not await reads.all_embeddings_at_start_read()
    lamp, table = searched("lamp", None), searched("table", None)
    assert await fetch(reads) == [("i1", True), (lamp, True), (table, False), (table, True), (lamp, False)]
    assert await reads.all_embeddings_at_start_read()
    assert (reads.embedding_offsets, reads.query_offsets) == ({0: 1}, {0: 5, 1: 9})
    assert scene.asked == [training_topics(queries=True)] == [("embeddings", "behaviours", "queries")]


async def test_who_was_not_told_to_reads_no_queries(scene: Scene) -> None:
    scene.log[VECTORS] += [item(0)]
    scene.log[QUERIES[0]] += [query(0)]
    reads = await scene.opened(queries=False, bounded=False)
    assert await fetch(reads) == [("i1", True)] and reads.query_offsets == {}
    assert await reads.all_embeddings_at_start_read() and reads.embeddings_are_current
    assert set(scene.consumer.positions) == {VECTORS, CLICKS} and scene.asked == [("embeddings", "behaviours")]


async def test_reading_goes_on_where_the_checkpoint_was_and_from_the_beginning_for_one_without_queries(
    scene: Scene,
) -> None:
    scene.log[QUERIES[0]] += [query(n) for n in range(5)]
    reads = await scene.opened(start_at={"queries": {0: 3}, "embeddings": {0: 0}})
    assert scene.consumer.positions[QUERIES[0]] == 3 and reads.query_offsets == {0: 3, 1: 0}
    reads = await scene.opened(start_at={"embeddings": {0: 0}})
    assert scene.consumer.positions[QUERIES[0]] == 0 and reads.query_offsets == {0: 0, 1: 0}
    scene.consumer.beginning = 2  # what was before has expired
    reads = await scene.opened(start_at={"queries": {0: 1}})
    assert reads.query_offsets[0] == 2
    with pytest.raises(Misconfigured, match=r"partition 0 of 'mim\.queries' ends at offset 5.*go on at 6"):
        await scene.opened(start_at={"queries": {0: 6}})


async def test_queries_name_no_encoder_and_wait_for_the_first_item(scene: Scene) -> None:
    scene.log[QUERIES[0]] += [query(0, version="v0"), query(1)]
    reads = await scene.opened(bounded=False)
    assert await fetch(reads) == [] and reads.encoder_version is None and not reads.has_embeddings
    scene.log[VECTORS] += [item(0)]
    assert await fetch(reads) == [("i1", True), (searched("lamp", None), True)]
    assert (reads.encoder_version, reads.other_encoders, reads.broken_vectors) == ("v1", 1, 0)


async def test_a_record_whose_key_vector_or_form_is_wrong_is_counted_and_passed_over(scene: Scene) -> None:
    scene.log[QUERIES[0]] += [
        query(0, key=query_key("v1", TABLE)),
        query(1, key=query_key("v2", LAMP)),
        query(2, key=b"v1:not a query"),
        FakeRecord(0, 3, query_key("v1", LAMP), b"{"),
        query(4, vector=np.array([0.5, 0.5])),
        query(5, vector=np.array([np.nan, 1])),
        FakeRecord(0, 6, None, b"{}"),
        query(7),
    ]
    reads = await scene.opened(encoder_version="v1")
    with capture_logs() as logs:
        assert await fetch(reads) == [(searched("lamp", None), True)]
    told = [(line["topic"], line["offset"]) for line in logs if line["event"] == "train.broken_vector"]
    assert told == [("queries", n) for n in (0, 2, 3, 4, 5, 6)]
    assert (reads.broken_vectors, reads.other_encoders) == (6, 1)


async def test_vectors_are_current_once_queries_are_too(scene: Scene) -> None:
    scene.log[VECTORS] += [item(0)]
    reads = await scene.opened(bounded=False)
    await fetch(reads)
    assert reads.embeddings_are_current
    scene.log[QUERIES[1]] += [query(0)]
    assert not reads.embeddings_are_current
    await reads.fetch(embeddings=True, behaviours=False, wait_seconds=0)
    assert not reads.embeddings_are_current
    reads.next_embeddings()
    assert reads.embeddings_are_current


async def test_a_topic_in_which_nothing_was_ever_written_is_told(scene: Scene) -> None:
    with capture_logs() as logs:
        await scene.opened()
        scene.log[QUERIES[1]] += [query(0)]
        await scene.opened()
        await scene.opened(queries=False)
    (line,) = [line for line in logs if line["event"] == "train.no_queries"]
    assert "MIM_INDEX__QUERIES" in line["fix"]
