"""A producer that sends each record in a transaction of its own."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.structs import RecordMetadata

from streams.broker.clients import BrokerConfig, make_producer


class Transactions:
    """Made anew after a failure: its start aborts what was left open."""

    def __init__(self, broker: BrokerConfig, transactional_id: str) -> None:
        self._broker = broker
        self._transactional_id = transactional_id
        self._producer: AIOKafkaProducer | None = None

    async def send(self, topic: str, key: bytes, value: bytes | None, *, commit: bool) -> RecordMetadata | None:
        """Send one record. Where it lies; None if it was aborted, or if only the log tells what came of it."""
        try:
            async with asyncio.timeout(20.0):
                if self._producer is None:
                    self._producer = make_producer(self._broker, transactional_id=self._transactional_id)
                    await self._producer.start()
                await self._producer.begin_transaction()
                sent = await self._producer.send_and_wait(topic, value, key=key)
                if not commit:
                    await self._producer.abort_transaction()
                    return None
                await self._producer.commit_transaction()
                return sent
        except (KafkaError, TimeoutError):
            await self.close()
            return None

    async def close(self) -> None:
        """End the producer."""
        producer, self._producer = self._producer, None
        if producer is not None:
            with suppress(KafkaError, TimeoutError, AssertionError):
                async with asyncio.timeout(10.0):
                    await producer.stop()
