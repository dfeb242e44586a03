"""Dead letters: where records go that no retry can help."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from aiokafka import AIOKafkaProducer

from schemas.letters import DeadLetter
from streams.broker.clients import BrokerConfig, broker_errors
from streams.broker.topics import TopicsConfig


class DeadLetters(Protocol):
    """A place to put what could not be processed, so that it can be understood and replayed."""

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keep the letters. They are safe when this returns; only then may their sources be acknowledged.

        Raises `BrokerUnavailable` if it is unknown whether they were kept.
        """
        ...


class InMemoryDeadLetters:
    """Letters in a list."""

    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Append."""
        self.letters.extend(letters)


class KafkaDeadLetters:
    """Letters in the topic `dead-letters`: the original bytes as value, everything else in headers.

    The producer needs a `max_request_size` that is `DEAD_LETTER_HEADROOM_BYTES` above the records that feed it.
    """

    def __init__(self, producer: AIOKafkaProducer, broker: BrokerConfig, topics: TopicsConfig) -> None:
        self._producer = producer
        self._broker = broker
        self._topic = topics.full_name("dead-letters")

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Send all, then wait for the broker to have all."""
        with broker_errors(self._broker):
            pending = [
                await self._producer.send(
                    self._topic, key=letter.letter_key, value=letter.value, headers=letter.headers()
                )
                for letter in letters
            ]
            await asyncio.gather(*pending)
