"""Items written in transactions: what is open or aborted has no effect on the center."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition

from streams.broker.clients import make_producer
from streams.broker.log_reader import LogReader
from streams.settings import Settings
from tests.factories.index_worker import Start, start_index
from tests.factories.item_feed import announced, center, held, until


class Shop:
    """A producer that writes items of one partition in transactions."""

    def __init__(self, settings: Settings, producer: AIOKafkaProducer) -> None:
        self._topic = settings.topics.full_name("items")
        self.producer = producer

    async def publish(self, item_id: str, price: float = 1.0) -> int:
        item = {"item_id": item_id, "title": item_id, "published_at": datetime.now(UTC).isoformat(), "price": price}
        return await self._send(item_id, json.dumps(item).encode())

    async def delete(self, item_id: str) -> int:
        return await self._send(item_id, None)

    async def _send(self, item_id: str, value: bytes | None) -> int:
        sent = await self.producer.send_and_wait(self._topic, key=item_id.encode(), value=value, partition=0)
        return int(sent.offset)


@asynccontextmanager
async def shop(settings: Settings) -> AsyncIterator[Shop]:
    producer = make_producer(settings.kafka, linger_ms=0, transactional_id=f"shop-{uuid.uuid4().hex}")
    await producer.start()
    try:
        yield Shop(settings, producer)
    finally:
        await producer.stop()


async def test_open_and_aborted_transactions_have_no_effect_and_nothing_waits_for_their_markers(
    settings: Settings, process: Start, run_command: Callable[..., Any]
) -> None:
    partition = TopicPartition(settings.topics.full_name("items"), 0)
    worker = start_index(process)
    async with shop(settings) as mine, shop(settings) as other, center(settings) as index:
        ever = {"first", "aborted", "open", "kept", "priced", "gone", "last"}

        async def prices() -> dict[str, float | None]:
            return {item_id: row.price for item_id, row in (await held(index, ever)).items()}

        async def acknowledged(offset: int) -> None:
            async with LogReader(settings.kafka, settings.topics) as reader:

                async def reached() -> bool:
                    return (await reader.committed("index")).get(partition, 0) > offset

                await until(reached)

        async with mine.producer.transaction():
            first = await mine.publish("first")
        assert first == 0
        await acknowledged(first)
        await mine.producer.begin_transaction()  # the records after offset 0 are a long gap
        for _ in range(5):
            await mine.publish("aborted")
        await mine.producer.abort_transaction()
        async with mine.producer.transaction():
            for item_id in ("kept", "priced", "gone"):
                committed = await mine.publish(item_id)
        await acknowledged(committed)
        assert await prices() == dict.fromkeys(["first", "kept", "priced", "gone"], 1.0)

        await mine.producer.begin_transaction()
        await mine.publish("aborted")
        await mine.delete("kept")
        await mine.publish("priced", 9.0)
        await mine.producer.abort_transaction()
        async with mine.producer.transaction():
            committed = await mine.delete("gone")
        await acknowledged(committed)
        expected: dict[str, float | None] = dict.fromkeys(["first", "kept", "priced"], 1.0)
        assert await prices() == expected

        await other.producer.begin_transaction()
        opened = await other.publish("open")
        async with mine.producer.transaction():
            last = await mine.publish("last")
        assert last > opened
        async with LogReader(settings.kafka, settings.topics) as reader:
            assert await reader.end(partition) == opened
        assert worker.stop() == 0
        verified = run_command("center", "verify", "--json")
        assert (verified.returncode, json.loads(verified.stdout)["faults"]) == (0, 0), verified.stderr
        worker = start_index(process)
        assert await prices() == expected
        await other.producer.commit_transaction()
        await acknowledged(last)
        expected |= {"open": 1.0, "last": 1.0}
        assert await prices() == expected

        await other.producer.begin_transaction()  # the partition ends in an aborted record and markers
        await other.delete("first")
        await other.producer.abort_transaction()
        assert worker.stop() == 0
        assert "index.verification_forced" not in start_index(process).output()
        assert await prices() == expected
    verified = run_command("center", "verify", "--json")
    report = json.loads(verified.stdout)
    assert (verified.returncode, report["faults"], report["waiting"], report["items"]) == (0, 0, 0, 5), verified.stderr
    assert {item_id for item_id, one in (await announced(settings)).items() if one is not None} == set(expected)
