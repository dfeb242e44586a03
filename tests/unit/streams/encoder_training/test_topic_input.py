"""What encoders get of the items in the topic."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Any

import structlog

from schemas.items import ItemPublished
from streams.encoder_training.topic_input import TopicContent


def published(item_id: str, **content: Any) -> ItemPublished:
    return ItemPublished(item_id=item_id, title="a lamp", published_at=datetime(2025, 1, 1, tzinfo=UTC), **content)


PICTURE = base64.b64encode(b"\xff\xd8\xff picture")
IN_THE_MESSAGE = [published("a", image=PICTURE), published("b", image=PICTURE, image_url="https://x.example/b")]
BEHIND_A_URL = [published("c", image_url="https://x.example/c"), published("d", image_url="https://x.example/d")]


def test_pictures_behind_urls_are_left_out_and_counted_in_one_warning() -> None:
    items = [*IN_THE_MESSAGE, *BEHIND_A_URL, published("e")]
    with structlog.testing.capture_logs() as logged:
        contents = TopicContent(items={item.item_id: item for item in items}).contents()
    assert [content.item_id for content in contents if content.image is not None] == ["a", "b"]
    (line,) = logged
    assert (line["event"], line["log_level"], line["items"], line["of"]) == ("pictures.left_out", "warning", 2, 5)
    assert "images.parquet" in line["advice"] and "--data" in line["advice"]


def test_where_every_picture_travels_in_its_message_nothing_is_said() -> None:
    with structlog.testing.capture_logs() as logged:
        TopicContent(items={item.item_id: item for item in [*IN_THE_MESSAGE, published("e")]}).contents()
    assert logged == []
