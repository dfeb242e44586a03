"""What reaches Kafka of what the item path says, and when it counts as sent."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from aiokafka import errors as kafka_errors

from schemas.errors import BrokerUnavailable
from schemas.items import ImageRetry, ItemEmbedding, ItemPublished, SourceOffset
from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicsConfig
from streams.indexing.announcements import KafkaOutbox, as_embedding
from tests.factories.vector_cache import row

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


class Producer:
    """Accepts everything at once, and confirms it when `confirm` is called."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes, bytes | None, int | None]] = []
        self.confirmations: list[asyncio.Future[None]] = []

    async def send(self, topic: str, *, key: bytes, value: bytes | None, partition: int | None) -> Any:
        self.sent.append((topic, key, value, partition))
        self.confirmations.append(asyncio.get_running_loop().create_future())
        return self.confirmations[-1]

    def confirm(self, *places: int) -> None:
        for place in places:
            self.confirmations[place].set_result(None)


def outbox(producer: Producer) -> KafkaOutbox:
    given: Any = producer
    return KafkaOutbox(given, BrokerConfig(), TopicsConfig(), encoder_version="v9")


async def started(sending: Any, producer: Producer, count: int) -> asyncio.Task[None]:
    task = asyncio.create_task(sending)
    async with asyncio.timeout(5):
        while len(producer.sent) < count:
            await asyncio.sleep(0)
    return task


async def test_rows_are_announced_under_their_own_version_and_gone_items_under_the_present_one() -> None:
    producer = Producer()
    held = [row("a", 4, version="v8"), row("b", 5, version="v9")]
    task = await started(outbox(producer).announce(held, ["c"]), producer, 3)
    assert [(topic, key, partition) for topic, key, _, partition in producer.sent] == [
        ("mim.embeddings", b"v8:a", None),
        ("mim.embeddings", b"v9:b", None),
        ("mim.embeddings", b"v9:c", None),
    ]
    assert [value and ItemEmbedding.model_validate_json(value).item_id for *_, value, _ in producer.sent] == [
        "a",
        "b",
        None,
    ]
    producer.confirm(2, 0)
    await asyncio.sleep(0)
    assert not task.done()  # not before the broker has all of them
    producer.confirm(1)
    await task


async def test_a_retry_goes_to_the_partition_of_its_item() -> None:
    producer = Producer()
    item = ItemPublished(item_id="a", title="x", published_at=MOMENT, image_url="https://pictures.example/a.jpg")
    retry = ImageRetry(item=item, source=SourceOffset(partition=3, offset=8), attempt=1, not_before=MOMENT)
    task = await started(outbox(producer).retry_later([retry]), producer, 1)
    ((topic, key, value, partition),) = producer.sent
    assert (topic, key, partition) == ("mim.items-retry", b"a", 3)
    assert value is not None and ImageRetry.model_validate_json(value) == retry
    producer.confirm(0)
    await task


async def test_a_broker_that_refuses_one_message_is_no_success() -> None:
    producer = Producer()
    task = await started(outbox(producer).announce([], ["a", "b"]), producer, 2)
    producer.confirm(0)
    producer.confirmations[1].set_exception(kafka_errors.KafkaConnectionError("away"))
    with pytest.raises(BrokerUnavailable):
        await task


def test_an_announcement_has_every_field_of_its_row() -> None:
    made = replace(
        row("a", 7, version="v1", source_partition=2),
        category="shoes", first_price=10.0, price=9.5, has_title=True, has_image=False, published_at=MOMENT,
        content_hash="c" * 32,
    )  # fmt: skip
    told = as_embedding(made)
    assert np.array_equal(np.frombuffer(told.vector, "<f4"), made.vector)
    assert (told.item_id, told.encoder_version, told.dim, told.source) == (
        "a", "v1", len(made.vector), SourceOffset(partition=2, offset=7),
    )  # fmt: skip
    assert (told.content_hash, told.published_at, told.category, told.price) == ("c" * 32, MOMENT, "shoes", 10.0)
    assert (told.has_title, told.has_image) == (True, False)
    other = as_embedding(replace(made, has_title=False, has_image=True))
    assert (other.has_title, other.has_image) == (False, True)
