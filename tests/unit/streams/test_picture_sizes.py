"""The limits of a picture on its way fit together: of records, topics, clients, fetches and decoding."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from encoders.config import EncoderConfig
from schemas.base import decode
from schemas.errors import Reason
from schemas.items import ItemPublished, largest_picture, record_bytes_for
from schemas.letters import DeadLetter
from streams.broker.clients import BrokerConfig
from streams.broker.topics import DEAD_LETTER_HEADROOM_BYTES, TOPICS, TopicsConfig
from streams.dead_letters.producer import KafkaDeadLetters
from streams.indexing.image_fetch import ImageFetchConfig
from streams.serving.config import ServeConfig
from streams.settings import Settings
from streams.wiring.preflight import picture_sizes

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def settings(**parts: Any) -> Settings:
    return Settings().model_copy(update=parts)


def test_by_default_a_record_holds_the_largest_picture_beside_the_longest_texts() -> None:
    most = EncoderConfig().max_image_bytes
    assert ImageFetchConfig().max_bytes == most == 8 * 2**20
    wide = "\U0001f457"  # twelve characters in JSON
    base64_text = "A" * (4 * -(-most // 3))
    item = {"item_id": wide * 200, "title": wide * 2_000, "text": wide * 20_000, "category": wide * 200}
    item |= {"image_url": wide * 2_000, "image": base64_text, "published_at": NOW.isoformat()}
    record = json.dumps(item).encode()
    assert len(record) <= record_bytes_for(most) <= BrokerConfig().max_record_bytes
    read = decode(ItemPublished, record, now=NOW, max_bytes=BrokerConfig().max_record_bytes)
    assert read.image is not None and len(read.image) >= most


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1_000_001])
def test_room_for_a_picture_and_picture_for_a_room_are_inverse(size: int) -> None:
    assert size <= largest_picture(record_bytes_for(size)) < size + 3
    assert largest_picture(1_024) == 0


def test_every_topic_takes_what_the_settings_allow_and_dead_letters_their_headers_too() -> None:
    broker = BrokerConfig(max_record_bytes=5_000_000)
    for spec in TOPICS.values():
        limit = int(spec.settings(TopicsConfig(), broker)["max.message.bytes"])
        assert limit == 5_000_000 + (DEAD_LETTER_HEADROOM_BYTES if spec.name == "dead-letters" else 0)


class TestCheck:
    def test_limits_that_fit_pass(self) -> None:
        line = picture_sizes(Settings())
        assert line.ok and "image_url" not in line.detail

    def test_what_only_a_url_can_bring_is_said(self) -> None:
        line = picture_sizes(settings(kafka=BrokerConfig(max_record_bytes=1_000_000)))
        assert line.ok
        assert f"{largest_picture(1_000_000):,}" in line.detail and "need an image_url" in line.detail

    def test_a_picture_that_nothing_can_bring_is_a_fault_with_its_settings(self) -> None:
        line = picture_sizes(settings(encoder=EncoderConfig(max_image_bytes=32 * 2**20)))
        assert not line.ok and line.fix is not None
        for name in ("MIM_IMAGES__MAX_BYTES", "MIM_KAFKA__MAX_RECORD_BYTES", "MIM_ENCODER__MAX_IMAGE_BYTES"):
            assert name in line.fix
        assert str(record_bytes_for(32 * 2**20)) in line.fix

    def test_a_picture_that_no_query_can_bring_is_a_fault_of_a_server_with_its_settings(self) -> None:
        small = settings(serve=ServeConfig(max_body_bytes=8 * 2**20))
        line = picture_sizes(small)
        assert not line.ok and line.fix is not None
        assert f"MIM_SERVE__MAX_BODY_BYTES to {record_bytes_for(8 * 2**20)}" in line.fix
        assert "MIM_ENCODER__MAX_IMAGE_BYTES" in line.fix
        assert picture_sizes(small, ["index", "train"]).ok


class Producer(SimpleNamespace):
    """Keeps what it is sent."""

    async def send(self, topic: str, **record: Any) -> Any:
        async def done() -> None:
            pass

        self.sent.append(record)
        return done()


@pytest.mark.parametrize(("over", "kept"), [(0, True), (1, False)])
async def test_bytes_that_do_not_fit_the_dead_letters_stay_where_they_are_and_never_become_a_delete(
    over: int, kept: bool
) -> None:
    broker, producer = BrokerConfig(max_record_bytes=100_000), Producer(sent=[])
    value = b"x" * (100_000 + DEAD_LETTER_HEADROOM_BYTES - 16_384 + over)
    letter = DeadLetter("items", 0, 5, b"a", value, "decode", Reason.TOO_LARGE, "too large", NOW)
    await KafkaDeadLetters(producer, broker, TopicsConfig()).publish([letter])
    (sent,) = producer.sent
    assert sent["key"] == b"items/0/5"
    assert sent["value"] == (value if kept else b"")
    assert (b"left in items/0/5" in dict(sent["headers"])["detail"]) != kept
