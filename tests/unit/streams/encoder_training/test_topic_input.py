"""What encoders get of the items in the topic."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog
from aiokafka import TopicPartition

from encoders.base import ItemContent
from schemas.behaviours import Behaviour
from schemas.forgotten import ForgottenUser
from schemas.items import ItemPublished
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics
from streams.broker.topics import TopicsConfig
from streams.encoder_training import topic_input
from streams.encoder_training.topic_input import TopicContent, _add_behaviour, _add_item, read_topics
from tests.factories.fake_consumer import FakeRecord
from tests.factories.memory_log import MemoryLog
from trainer.samples.forgotten import ForgottenUsers


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


def test_contents_are_whole_and_by_id_whatever_the_order_of_the_topic() -> None:
    item = published("b", text="of oak", category="Lamps", price=5.0, year=2001)
    contents = TopicContent(items={one.item_id: one for one in (item, published("a"))}).contents()
    assert contents == [
        ItemContent(item_id="a", title="a lamp"),
        ItemContent(item_id="b", title="a lamp", text="of oak", category="Lamps", price=5.0, year=2001),
    ]


MS = 1_767_225_600_000


def items_of(*records: tuple[bytes | None, bytes | None], outcomes: tuple[str, ...] = ()) -> TopicContent:
    found = TopicContent()
    for offset, (key, value) in enumerate(records):
        _add_item(found, FakeRecord(0, offset, key, value, MS), BrokerConfig(max_record_bytes=100_000), {}, outcomes)
    return found


def value(item_id: str, title: str = "x", **more: object) -> bytes:
    return json.dumps({"item_id": item_id, "title": title, "published_at": MS} | more).encode()


def test_attributes_teach_and_those_that_are_outcomes_do_not() -> None:
    described = value("a", attributes={"colour": "red", "sold": "often"})
    (content,) = items_of((b"a", described), outcomes=("sold",)).contents()
    assert content.attributes == {"colour": "red"}


def test_items_are_what_their_last_record_made_of_them() -> None:
    found = items_of((b"a", value("a")), (b"b", value("b")), (b"a", value("a", "y")), (b"b", None), (b"c", None))
    assert {name: item.title for name, item in found.items.items()} == {"a": "y"} and found.broken == 0


@pytest.mark.parametrize(
    "record", [(b"a", b"{"), (b"a", value("b")), (None, value("a")), (None, None), (b"\xff", value("a")), (b" a", None)]
)
def test_a_record_that_the_index_refuses_is_counted_and_changes_nothing(
    record: tuple[bytes | None, bytes | None],
) -> None:
    found = items_of((b"a", value("a", "whole")), record)
    assert {name: item.title for name, item in found.items.items()} == {"a": "whole"} and found.broken == 1


def test_behaviours_are_read_in_place_and_counted_where_broken_or_erased() -> None:
    request = ForgottenUser(
        user_id="gone", forgotten_at=datetime(2026, 1, 1, tzinfo=UTC), cluster_id="c", topic_id="t", ends={1: 6}
    )
    gone, found = ForgottenUsers("c", "t"), TopicContent()
    gone.add(request)
    for offset, user in ((4, "u"), (5, "gone"), (6, "gone"), (7, None)):
        document = {"event_id": f"e{offset}", "kind": "click", "user_id": user, "item_id": "a", "occurred_at": MS}
        record = FakeRecord(1, offset, (user or "u").encode(), json.dumps(document).encode(), MS)
        _add_behaviour(found, record, BrokerConfig(), {}, gone)
    assert [(partition, offset, one.user_id) for partition, offset, one in found.behaviours] == [
        (1, 4, "u"),
        (1, 6, "gone"),
    ]
    assert isinstance(found.behaviours[0][2], Behaviour)
    assert (found.behaviours_read, found.broken, found.erased) == (2, 1, 1)


@pytest.mark.parametrize("only_items", [False, True])
async def test_topics_are_read_from_beginning_to_end_and_where_that_was_is_told(
    monkeypatch: pytest.MonkeyPatch, only_items: bool
) -> None:
    def click(number: int, offset: int, user: str) -> FakeRecord:
        document = {"event_id": f"e{offset}", "kind": "click", "user_id": user, "item_id": "a", "occurred_at": MS}
        return FakeRecord(number, offset, user.encode(), json.dumps(document).encode(), MS)

    log = MemoryLog(
        items=[[FakeRecord(0, 4, b"a", value("a", attributes={"sold": 1}), MS), FakeRecord(0, 5, b"b", b"{", MS)], []],
        behaviours=[[click(0, 0, "u"), click(0, 1, "gone")], [click(1, 7, "u")]],
    )
    log.first = {TopicPartition("mim.items", 0): 4, TopicPartition("mim.items", 1): 3}
    asked: list[Any] = []

    def describe(_: Any, __: Any, names: list[str]) -> ClusterTopics:
        asked.append(names)
        return ClusterTopics("c", {name: f"id of {name}" for name in names}, {name: [0, 1] for name in names})

    async def forgotten(*_: Any, cluster_id: str, topic_id: str) -> ForgottenUsers:
        assert (cluster_id, topic_id) == ("c", "id of behaviours")
        gone = ForgottenUsers(cluster_id, topic_id)
        moment = datetime(2026, 1, 1, tzinfo=UTC)
        gone.add(ForgottenUser(user_id="gone", forgotten_at=moment, cluster_id="c", topic_id=topic_id, ends={0: 2}))
        return gone

    monkeypatch.setattr(topic_input, "describe_topics", describe)
    monkeypatch.setattr(topic_input, "LogReader", log)
    monkeypatch.setattr(topic_input, "read_forgotten_users", forgotten)
    broker = BrokerConfig(max_record_bytes=100_000)
    found = await read_topics(broker, TopicsConfig(), {}, {}, only_items=only_items, outcomes=("sold",))
    assert asked == [["items"] if only_items else ["items", "behaviours"]] and found.cluster_id == "c"
    assert found.offsets == {"items": {0: 6, 1: 3}} | ({} if only_items else {"behaviours": {0: 2, 1: 8}})
    assert {name: item.attributes for name, item in found.items.items()} == {"a": {}} and found.broken == 1
    assert [(partition, offset) for partition, offset, _ in found.behaviours] == [(0, 0), (1, 7)][
        : 2 * (not only_items)
    ]
    assert found.erased == (not only_items)
