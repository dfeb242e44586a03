from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from aiokafka import TopicPartition

from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicsConfig
from streams.training.input import TrainingInput
from streams.training.open_transactions import OpenTransactions
from streams.training.vector_records import VectorRecords
from tests.factories.fake_consumer import FakeRecord
from tests.factories.samples import embedding
from trainer.samples.partition_merge import PartitionMerge


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_a_partition_with_an_open_transaction_ends_at_the_high_watermark() -> None:
    ends = OpenTransactions(patience_seconds=60, clock=Clock())
    assert ends.end(0, stable=5, high=9) == 9 and ends.open == 1
    assert ends.end(0, stable=9, high=9) == 9 and ends.open == 0
    assert ends.end(1, stable=-1, high=7) == 7 and ends.open == 0  # a broker that does not say
    assert ends.end(1, stable=None, high=None) is None


def test_one_hung_transaction_holds_its_partition_for_the_stated_time_and_is_counted_once() -> None:
    clock = Clock()
    ends = OpenTransactions(patience_seconds=60, clock=clock)
    assert ends.end(0, stable=5, high=9) == 9
    clock.now += 59
    assert ends.end(0, stable=5, high=12) == 12
    clock.now += 1
    assert ends.end(0, stable=5, high=12) == 5
    assert ends.end(0, stable=5, high=14) == 5 and ends.passed_over == 1


def test_transactions_after_each_other_are_each_waited_for() -> None:
    clock = Clock()
    ends = OpenTransactions(patience_seconds=60, clock=clock)
    for stable in range(5, 50):
        assert ends.end(0, stable=stable, high=100) == 100
        clock.now += 40
    assert ends.passed_over == 0


def test_the_input_counts_a_partition_as_read_only_at_the_high_watermark() -> None:
    clock = Clock()
    settings: dict[str, Any] = {"fetch_max_records": 1, "buffered_records": 1, "idle_seconds": 5.0, "bounded": False}
    settings |= {"all_idle_seconds": 60.0}
    reads = TrainingInput(
        BrokerConfig(), TopicsConfig(), field_map={}, encoder_version=None, open_transaction_seconds=60, clock=clock,
        **settings,
    )  # fmt: skip
    partition = TopicPartition("behaviours", 0)
    at = {"stable": 5, "position": 5}

    async def position(_: TopicPartition) -> int:
        return at["position"]

    reads._behaviours = {0: partition}
    reads._reading = PartitionMerge([0], room_per_partition=9)
    reads._consumer = SimpleNamespace(
        position=position, highwater=lambda _: 9, last_stable_offset=lambda _: at["stable"],
        last_poll_timestamp=lambda _: 1e6,
    )  # fmt: skip
    asyncio.run(reads._mark_exhausted())
    assert not reads.all_handed_out and reads.transactions.open == 1
    at["stable"], at["position"] = 9, 9
    asyncio.run(reads._mark_exhausted())
    assert reads.all_handed_out


def test_the_last_partition_to_fall_silent_keeps_the_allowed_lateness_for_longer() -> None:
    settings: dict[str, Any] = {"fetch_max_records": 1, "buffered_records": 1, "idle_seconds": 5.0, "bounded": False}
    clock = Clock()
    reads = TrainingInput(
        BrokerConfig(), TopicsConfig(), field_map={}, encoder_version=None, open_transaction_seconds=60,
        all_idle_seconds=60, clock=clock, **settings,
    )  # fmt: skip
    reads._behaviours = {number: TopicPartition("behaviours", number) for number in (0, 1)}
    reads._reading = PartitionMerge([0, 1], room_per_partition=9)
    reads._reading.set_exhausted({0: clock.now, 1: clock.now})
    reads._consumer = SimpleNamespace(last_poll_timestamp=lambda _: clock.now * 1000)
    reads._active_at = {0: clock.now, 1: clock.now + 1}
    clock.now += 10
    assert reads.newly_idle() == [0]
    clock.now += 50
    assert reads.newly_idle() == [] and reads.waits_for_silence
    clock.now += 1
    assert reads.newly_idle() == [1]


@pytest.mark.parametrize("length", [1.0, 0.5, 0.0, float("nan"), 1e38])
def test_only_an_embedding_that_can_be_used_names_the_encoder(length: float) -> None:
    reads = VectorRecords(None, max_bytes=100_000)
    message = embedding("i1", np.array([0, length], np.float32), version="first")
    garbage = FakeRecord(0, 0, b"zzz:i1", b"{")
    reads.add_embeddings([garbage, FakeRecord(0, 1, b"first:i1", message.model_dump_json().encode())])
    usable = length == 1
    assert reads.encoder_version == ("first" if usable else None)
    assert (reads.broken, reads.other_encoders) == (1 if usable else 2, 0)


def test_a_transaction_that_begins_a_partition_is_waited_for_too() -> None:
    clock = Clock()
    ends = OpenTransactions(patience_seconds=60, clock=clock)
    assert ends.end(0, stable=0, high=9) == 9 and ends.open == 1
    clock.now += 60
    assert ends.end(0, stable=0, high=9) == 0 and ends.passed_over == 1
    assert ends.end(0, stable=0, high=0) == 0 and ends.open == 0
