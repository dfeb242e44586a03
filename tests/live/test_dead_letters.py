"""One suite for every place where dead letters are published."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from schemas.errors import Reason
from schemas.letters import DeadLetter
from streams.broker.clients import make_producer
from streams.broker.topics import DEAD_LETTER_HEADROOM_BYTES
from streams.dead_letters.producer import DeadLetters, InMemoryDeadLetters, KafkaDeadLetters
from streams.settings import Settings
from tests.factories.item_feed import letters

Read = Callable[[], Awaitable[list[DeadLetter]]]


def letter(offset: int, **changes: Any) -> DeadLetter:
    detail, failed_at = "expected value: line 1, column 2 — é", datetime(2026, 5, 1, tzinfo=UTC)
    plain = DeadLetter("items", 3, offset, b"k", b"{broken", "decode", Reason.NOT_JSON, detail, failed_at, attempts=2)
    return replace(plain, **changes)


class DeadLettersContract:
    async def test_letters_come_back_with_their_bytes_and_everything_else(
        self, dead_letters: DeadLetters, read: Read, settings: Settings
    ) -> None:
        published = [
            letter(1),
            letter(2, key=None),
            letter(3, value=None),
            letter(4, key=b"\xff\x00", value=bytes(range(256))),
            # as large as a record of the source may be, and not to be compressed
            letter(5, value=os.urandom(settings.kafka.max_record_bytes)),
        ]
        await dead_letters.publish(published[:3])
        await dead_letters.publish(published[3:])
        await dead_letters.publish([])
        assert sorted(await read(), key=lambda found: found.offset) == published


class TestInMemoryDeadLetters(DeadLettersContract):
    @pytest.fixture
    def dead_letters(self) -> InMemoryDeadLetters:
        return InMemoryDeadLetters()

    @pytest.fixture
    def read(self, dead_letters: InMemoryDeadLetters) -> Read:
        async def found() -> list[DeadLetter]:
            return dead_letters.letters

        return found


class TestKafkaDeadLetters(DeadLettersContract):
    @pytest.fixture
    async def dead_letters(self, settings: Settings) -> AsyncIterator[KafkaDeadLetters]:
        room = settings.kafka.max_record_bytes + DEAD_LETTER_HEADROOM_BYTES
        async with make_producer(settings.kafka, max_request_size=room) as producer:
            yield KafkaDeadLetters(producer, settings.kafka, settings.topics)

    @pytest.fixture
    def read(self, settings: Settings) -> Read:
        return lambda: letters(settings)
