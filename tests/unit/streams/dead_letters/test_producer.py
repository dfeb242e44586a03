"""Letters on their way into the topic: durable when told so, with their bytes where these fit."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from aiokafka import errors as kafka_errors

from schemas.errors import BrokerUnavailable, Reason
from schemas.letters import DeadLetter
from streams.broker.clients import BrokerConfig
from streams.broker.topics import DEAD_LETTER_HEADROOM_BYTES, TOPICS, TopicsConfig
from streams.dead_letters.producer import InMemoryDeadLetters, KafkaDeadLetters

NOW = datetime(2026, 5, 1, tzinfo=UTC)
BROKER = BrokerConfig(max_record_bytes=2_000)
LETTER = DeadLetter("items", 3, 7, b"k", b"{broken", "decode", Reason.NOT_JSON, "no brace", NOW)


class Producer:
    """Keeps what is sent; `answers` tell later whether it was stored."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes, bytes | None, Any]] = []
        self.answers: list[asyncio.Future[None]] = []

    async def send(self, topic: str, *, key: bytes, value: bytes | None, headers: Any) -> asyncio.Future[None]:
        self.sent.append((topic, key, value, headers))
        self.answers.append(asyncio.get_running_loop().create_future())
        return self.answers[-1]


async def published(*letters: DeadLetter) -> list[tuple[str, bytes, bytes | None, Any]]:
    producer: Any = Producer()
    publishing = asyncio.create_task(KafkaDeadLetters(producer, BROKER, TopicsConfig(prefix="p.")).publish(letters))
    while len(producer.sent) < len(letters):
        await asyncio.sleep(0)
    for answer in producer.answers:
        answer.set_result(None)
    await publishing
    return list(producer.sent)


async def test_a_letter_lies_under_its_sources_place_with_the_original_bytes() -> None:
    other = replace(LETTER, offset=8, key=None, value=None)
    sent = await published(LETTER, other)
    assert [(topic, key, value) for topic, key, value, _ in sent] == [
        ("p.dead-letters", b"items/3/7", b"{broken"),
        ("p.dead-letters", b"items/3/8", None),
    ]
    assert [DeadLetter.from_record(value, headers) for _, _, value, headers in sent] == [LETTER, other]


@pytest.mark.parametrize("last", ["stored", "lost"])
async def test_letters_count_as_stored_once_the_broker_has_stored_all_of_them(last: str) -> None:
    producer: Any = Producer()
    publishing = asyncio.create_task(KafkaDeadLetters(producer, BROKER, TopicsConfig()).publish([LETTER, LETTER]))
    while len(producer.answers) < 2:
        await asyncio.sleep(0)
    producer.answers[0].set_result(None)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not publishing.done()
    if last == "stored":
        producer.answers[1].set_result(None)
        await publishing
        return
    producer.answers[1].set_exception(kafka_errors.KafkaTimeoutError())
    with pytest.raises(BrokerUnavailable):
        await publishing


async def test_bytes_that_do_not_fit_stay_where_they_are_and_the_letter_says_where() -> None:
    room = TOPICS["dead-letters"].max_record_bytes(BROKER) - 16_384
    assert room == BROKER.max_record_bytes + DEAD_LETTER_HEADROOM_BYTES - 16_384
    fits, too_large = (replace(LETTER, value=b"v" * size) for size in (room, room + 1))
    (_, _, whole, _), (_, _, left, headers) = await published(fits, too_large)
    assert whole == fits.value
    assert left == b""  # a record without a value is a delete when it is sent again
    letter = DeadLetter.from_record(left, headers)
    assert letter == replace(too_large, value=b"", detail=f"{room + 1} bytes, which are left in items/3/7: no brace")


async def test_letters_in_memory_are_kept_in_their_order() -> None:
    letters = InMemoryDeadLetters()
    await letters.publish([LETTER])
    await letters.publish([replace(LETTER, offset=8), replace(LETTER, offset=9)])
    assert [letter.offset for letter in letters.letters] == [7, 8, 9]
