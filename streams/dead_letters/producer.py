"""Publishing dead letters: records that no retry can help."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from aiokafka import AIOKafkaProducer
from typing_extensions import override

from schemas.letters import DeadLetter
from streams.broker.clients import BrokerConfig, broker_errors
from streams.broker.topics import DEAD_LETTER_HEADROOM_BYTES, TopicsConfig

_HEADER_BYTES = 16_384
"""What the headers of a letter take at most, with the key and a detail."""


class DeadLetters(Protocol):
    """Where records are kept that could not be processed, so that they can be examined and replayed."""

    async def publish(self, letters: Sequence[DeadLetter]) -> None:
        """Store the letters. They are durable when this returns; only then may their sources be acknowledged.

        Raises `BrokerUnavailable` if it is unknown whether they were stored.
        """
        ...


class InMemoryDeadLetters(DeadLetters):
    """Letters in a list."""

    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []

    @override
    async def publish(self, letters: Sequence[DeadLetter]) -> None:
        self.letters.extend(letters)


class KafkaDeadLetters(DeadLetters):
    """Letters in the topic `dead-letters`: the original bytes as value, everything else in headers.

    Bytes that do not fit, of a record that its topic took although the settings allow less, stay where they are.

    The producer needs a `max_request_size` that is `DEAD_LETTER_HEADROOM_BYTES` above the records that feed it.
    """

    def __init__(self, producer: AIOKafkaProducer, broker: BrokerConfig, topics: TopicsConfig) -> None:
        self._producer = producer
        self._broker = broker
        self._topic = topics.full_name("dead-letters")

    @override
    async def publish(self, letters: Sequence[DeadLetter]) -> None:
        with broker_errors(self._broker):
            pending = [
                await self._producer.send(
                    self._topic, key=letter.letter_key, value=letter.value, headers=letter.headers()
                )
                for letter in map(self._fitting, letters)
            ]
            await asyncio.gather(*pending)

    def _fitting(self, letter: DeadLetter) -> DeadLetter:
        size = len(letter.value or b"")
        if size + _HEADER_BYTES <= self._broker.max_record_bytes + DEAD_LETTER_HEADROOM_BYTES:
            return letter
        place = letter.letter_key.decode()
        # no bytes, and not no value: that would be a delete if it is sent again
        return replace(letter, value=b"", detail=f"{size} bytes, which are left in {place}: {letter.detail}")
