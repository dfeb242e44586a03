"""Turning a data set into records and sending them in order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from structlog.testing import capture_logs

from schemas.base import Message, decode
from schemas.behaviours import Behaviour, BehaviourKind
from schemas.errors import BadMessage, Misconfigured, Reason
from schemas.field_maps import FieldMap
from schemas.items import ItemPublished
from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicName, TopicsConfig
from streams.replay.broken_events import BEHAVIOUR_KINDS, ITEM_KINDS, BrokenEvent, broken_behaviour, broken_item
from streams.replay.config import ReplayConfig
from streams.replay.sender import Replay
from streams.replay.timeline import Outgoing, Timeline, item_json
from tests.factories.offline_folders import START, write
from trainer.datasets.attributes import ItemAttributes
from trainer.datasets.exposures import PUBLISHED_AT_IS, behaviours_of, how_published
from trainer.datasets.folder import DataSet, open_data_set

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MAX_BYTES = 4_194_304


def make_set(folder: Path, items: int = 30, rows: int = 120, **more_columns: Any) -> DataSet:
    rng = np.random.default_rng(0)
    publish = np.sort(rng.integers(0, 60, items)) + START
    item = rng.integers(0, items, rows)
    ts = np.maximum(np.sort(rng.integers(0, 90, rows)) + START, publish[item])
    names = [f"i{number}" for number in range(items)]
    write(folder, "items", item_id=names, title=names, publish_ts=publish, price=[1.5] * items)
    columns = {"user_id": rng.integers(0, 9, rows), "item_id": [names[i] for i in item], "ts": ts, "label": [1] * rows}
    write(folder, "interactions", **columns | more_columns)
    write(folder, "images", item_id=names[:5], image=[b"\xff\xd8picture"] * 5)
    return open_data_set(folder)


def timeline_of(data: DataSet, broken: float = 0.0) -> Timeline:
    return Timeline(data, behaviours_of(data, seed=1), seed=1, now=NOW, broken_share=broken)


class Metadata(NamedTuple):
    partition: int
    offset: int


@dataclass
class RecordingSender:
    """Keeps what it is given, and acknowledges when flushed or after `lag` further records."""

    lag: int = 3
    records: list[tuple[str, bytes, bytes]] = field(default_factory=list)
    flushes: int = 0
    _waiting: list[tuple[asyncio.Future[Any], Metadata]] = field(default_factory=list)

    async def send(self, topic: str, value: bytes | None = None, key: bytes | None = None) -> asyncio.Future[Any]:
        assert value is not None and key is not None
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, Metadata(0, sum(one[0] == topic for one in self.records))))
        self.records.append((topic, key, value))
        while len(self._waiting) > self.lag:
            self._acknowledge_one()
        return future

    async def flush(self) -> None:
        self.flushes += 1
        while self._waiting:
            self._acknowledge_one()

    def _acknowledge_one(self) -> None:
        future, metadata = self._waiting.pop(0)
        future.set_result(metadata)


@dataclass
class SlowReaders:
    """Reads a few records of each topic at every look."""

    sender: RecordingSender
    read: dict[TopicName, int] = field(default_factory=lambda: {"items": 0, "behaviours": 0})
    most_unread: dict[TopicName, int] = field(default_factory=lambda: {"items": 0, "behaviours": 0})

    async def consumed(self) -> Mapping[TopicName, Mapping[str, int]]:
        steps: dict[TopicName, int] = {"items": 4, "behaviours": 10}
        for topic, step in steps.items():
            sent = sum(one[0].endswith(topic) for one in self.sender.records)
            self.most_unread[topic] = max(self.most_unread[topic], sent - self.read[topic])
            self.read[topic] = min(sent, self.read[topic] + step)
        return {"items": {"index": self.read["items"]}, "behaviours": {"record": self.read["behaviours"]}}


def replay_to(sender: RecordingSender, config: ReplayConfig | None = None, **options: Any) -> Replay:
    return Replay(sender, BrokerConfig(), TopicsConfig(), config or ReplayConfig(), **options)


def second_of(record: tuple[str, bytes, bytes]) -> float:
    document = json.loads(record[2])
    return datetime.fromisoformat(document.get("published_at") or document["occurred_at"]).timestamp()


async def test_records_go_out_in_event_time_order_and_items_before_behaviours_of_their_second(tmp_path: Path) -> None:
    sender = RecordingSender()
    await replay_to(sender).run(timeline_of(make_set(tmp_path / "set")))
    order = [(second_of(one), one[0] == "mim.behaviours") for one in sender.records]
    assert order == sorted(order)
    assert {is_behaviour for _, is_behaviour in order} == {False, True}
    published = {}
    for place, (topic, key, value) in enumerate(sender.records):
        if topic == "mim.items":
            published[key.decode()] = place
        else:
            assert published[json.loads(value)["item_id"]] < place


async def test_everything_that_is_not_broken_parses(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set")
    takes: dict[str, Behaviour] = {}
    exposures: dict[str, Behaviour] = {}
    for outgoing in timeline_of(data):
        if outgoing.topic == "items":
            item = decode(ItemPublished, outgoing.value, now=NOW, max_bytes=MAX_BYTES)
            assert item.item_id.encode() == outgoing.key
            assert (item.image == b"\xff\xd8picture") == (item.item_id in ("i0", "i1", "i2", "i3", "i4"))
            continue
        event = decode(Behaviour, outgoing.value, now=NOW, max_bytes=MAX_BYTES)
        assert event.user_id.encode() == outgoing.key
        assert event.event_id not in takes | exposures
        (takes if event.kind.is_take else exposures)[event.event_id] = event
    assert len(takes) == 120
    for take in takes.values():
        assert take.exposure_id is not None
        shown = exposures[take.exposure_id]
        assert (shown.user_id, shown.item_id, shown.occurred_at) == (take.user_id, take.item_id, take.occurred_at)
        assert take.kind is BehaviourKind.CLICK


def test_further_columns_of_items_and_how_their_publish_time_is_known_are_sent(tmp_path: Path) -> None:
    data = replace(make_set(tmp_path / "set"), described=ItemAttributes((), (), ()))
    items = [json.loads(one.value) for one in timeline_of(data) if one.topic == "items"]
    assert not any("attributes" in item for item in items)
    known = [PUBLISHED_AT_IS[place] for place in how_published(data)]
    assert [item.get("published_at_is", "known") for item in items] == known
    described = [{"colour": "red"}, {}]
    records = [replace(record, described=described[n % 2]) for n, record in enumerate(data.records(0, 2))]
    assert [json.loads(item_json(record, None)).get("attributes") for record in records] == [{"colour": "red"}, None]


def test_the_platforms_own_event_ids_stay(tmp_path: Path) -> None:
    ids = [f"e{place}" for place in range(120)]
    data = make_set(tmp_path / "set", event_id=ids, label=[0, 1] * 60, qty=[1] * 120)
    events = [json.loads(one.value) for one in timeline_of(data) if one.topic == "behaviours"]
    taken = {event["event_id"]: event["exposure_id"] for event in events if event["kind"] == "purchase"}
    shown = {event["event_id"] for event in events if event["kind"] == "exposure"}
    assert set(taken) == set(ids[1::2])
    assert set(ids[::2]) < shown
    assert set(taken.values()) < shown
    assert len(events) == 120 + 60


def test_a_timeline_can_be_read_twice(tmp_path: Path) -> None:
    timeline = timeline_of(make_set(tmp_path / "set"), broken=0.1)
    assert list(timeline) == list(timeline)
    assert len(list(timeline)) == timeline.items + timeline.events


def test_broken_events_of_every_kind_are_mixed_in_at_the_asked_share(tmp_path: Path) -> None:
    timeline = timeline_of(make_set(tmp_path / "set"), broken=0.1)
    broken = [one for one in timeline if one.reason is not None]
    assert len(list(timeline)) - len(broken) == len(list(timeline_of(timeline.data)))
    items = [one for one in broken if one.topic == "items"]
    events = [one for one in broken if one.topic == "behaviours"]
    assert len(items) == len(ITEM_KINDS) > 0.1 * 30
    assert len(events) == round(0.1 * (timeline.events - len(events)))
    assert len({one.key for one in broken}) == len(items) + len(events)
    times = {Reason.TIMESTAMP_WITHOUT_ZONE, Reason.TIMESTAMP_IN_FUTURE}
    assert {one.reason for one in events} == {Reason.NOT_JSON, Reason.WRONG_TYPE, Reason.UNKNOWN_VERSION} | times


PICTURES = {"truncated-image", "bomb-image"}


@pytest.mark.parametrize("kind", sorted(set(ITEM_KINDS) - PICTURES))
def test_each_broken_item_is_refused_with_its_reason(kind: str) -> None:
    assert_refused(ItemPublished, broken_item(kind, 1, 1_000, NOW))


@pytest.mark.parametrize("kind", BEHAVIOUR_KINDS)
def test_each_broken_behaviour_is_refused_with_its_reason(kind: str) -> None:
    assert_refused(Behaviour, broken_behaviour(kind, 1, 1_000, NOW))


def assert_refused(schema: type[Message], broken: BrokenEvent) -> None:
    with pytest.raises(BadMessage) as caught:
        decode(schema, broken.value, now=NOW + timedelta(minutes=10), max_bytes=MAX_BYTES)
    assert caught.value.reason is broken.reason


def test_a_bomb_is_small_and_claims_to_be_huge() -> None:
    item = decode(ItemPublished, broken_item("bomb-image", 1, 1_000, NOW).value, now=NOW, max_bytes=MAX_BYTES)
    assert item.image is not None
    assert len(item.image) < 2_000
    assert int.from_bytes(item.image[16:20], "big") * int.from_bytes(item.image[20:24], "big") > 500_000_000


async def test_broken_records_are_remembered_by_where_they_ended_up(tmp_path: Path) -> None:
    sender = RecordingSender()
    sent = await replay_to(sender).run(timeline_of(make_set(tmp_path / "set"), broken=0.05))
    by_topic = {name: [one for one in sender.records if one[0] == f"mim.{name}"] for name in ("items", "behaviours")}
    assert len(sent.broken) >= len(ITEM_KINDS) + len(BEHAVIOUR_KINDS)
    for topic, _, offset in sent.broken:
        assert by_topic[topic][offset][1].startswith(b"broken-")
    assert sent.acknowledged == len(sender.records)


async def test_a_picture_that_is_too_large_for_a_record_costs_its_item_only_the_picture(tmp_path: Path) -> None:
    make_set(tmp_path / "set")
    whole, sender = RecordingSender(), RecordingSender()
    images = [b"\xff\xd8picture", b"\xff\xd8" + bytes(9_000), b"\xff\xd8picture"]
    write(tmp_path / "set", "images", item_id=["i0", "i1", "i2"], image=images)
    data = open_data_set(tmp_path / "set")
    await replay_to(whole).run(timeline_of(data))
    with capture_logs() as lines:
        replay = Replay(sender, BrokerConfig(max_record_bytes=8_000), TopicsConfig(), ReplayConfig())
        sent = await replay.run(timeline_of(data))
    assert (sent.without_picture, sent.records_left_out) == ({"i1"}, 0)
    assert [one[:2] for one in sender.records] == [one[:2] for one in whole.records]
    items = {key: json.loads(value) for topic, key, value in sender.records if topic == "mim.items"}
    assert {key for key, one in items.items() if "image" in one} == {b"i0", b"i2"}
    assert items[b"i1"]["title"] == "i1"
    (line,) = [line for line in lines if line["event"] == "replay.picture_left_out"]
    assert line["key"] == "i1" and line["limit"] == "MIM_KAFKA__MAX_RECORD_BYTES=8000"


async def test_a_record_that_is_too_large_without_a_picture_is_left_out_and_named(tmp_path: Path) -> None:
    sender = RecordingSender()
    large = Outgoing("items", b"large", json.dumps({"item_id": "large", "text": "x" * 9_000}).encode(), 1)
    small = Outgoing("behaviours", b"u", b"{}", 2)
    with capture_logs() as lines:
        replay = Replay(sender, BrokerConfig(max_record_bytes=8_000), TopicsConfig(), ReplayConfig())
        sent = await replay.run([large, small])
    assert (sent.items, sent.behaviours, sent.records_left_out) == (0, 1, 1)
    assert [one[1] for one in sender.records] == [b"u"]
    assert [line["key"] for line in lines if line["event"] == "replay.record_left_out"] == ["large"]


async def test_a_replay_pauses_while_readers_are_behind_and_ends_complete(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set")
    sender = RecordingSender()
    readers = SlowReaders(sender)
    config = ReplayConfig(max_items_in_flight=6, max_behaviours_in_flight=25, poll_seconds=0.001)
    sent = await replay_to(sender, config, positions=readers).run(timeline_of(data))
    assert (sent.items, sent.behaviours) == (30, timeline_of(data).events)
    assert readers.most_unread["items"] <= 6 and readers.most_unread["behaviours"] <= 25
    assert sender.flushes > 5
    free = RecordingSender()
    await replay_to(free).run(timeline_of(data))
    assert free.records == sender.records


async def test_speed_spaces_records_by_event_time(tmp_path: Path) -> None:
    sender = RecordingSender(lag=0)
    clock = [100.0]

    async def sleep(seconds: float) -> None:
        clock[0] += seconds

    replay = replay_to(sender, speed=10, monotonic=lambda: clock[0], sleep=sleep)
    await replay.run(timeline_of(make_set(tmp_path / "set")))
    seconds = [second_of(one) for one in sender.records]
    assert clock[0] - 100 == pytest.approx((seconds[-1] - seconds[0]) / 10)


@pytest.mark.parametrize(
    ("items", "behaviours", "refused"),
    [
        ({}, {}, None),
        ({"item_id": "sku"}, {}, "MIM_INDEX__FIELD_MAP"),
        ({"item_id": "published_at"}, {"user_id": "uid"}, "MIM_INDEX__FIELD_MAP"),
        ({"*": "", "item_id": "item_id", "title": "title", "published_at": "published_at"}, {}, "MIM_INDEX__FIELD_MAP"),
        ({"item_id": ["sku", "item_id"]}, {"user_id": "uid"}, "MIM_RECORD__FIELD_MAP"),
        ({"item_id": ["sku", "item_id"], "updated_at": ""}, {"user_id": ["uid", "user_id"]}, None),
    ],
)
def test_a_field_map_that_does_not_read_our_own_names_is_refused(
    tmp_path: Path, items: FieldMap, behaviours: FieldMap, refused: str | None
) -> None:
    timeline = timeline_of(make_set(tmp_path / "set"))
    if refused is None:
        timeline.refuse_field_maps(items, behaviours)
        return
    with pytest.raises(Misconfigured, match=f"{refused} does not read"):
        timeline.refuse_field_maps(items, behaviours)


@dataclass
class FailingSender(RecordingSender):
    """Loses one record, by its number."""

    loses: int = 10

    async def send(self, topic: str, value: bytes | None = None, key: bytes | None = None) -> asyncio.Future[Any]:
        future = await super().send(topic, value, key)
        if len(self.records) == self.loses:
            future.set_exception(ConnectionResetError("gone"))
            self._waiting.pop()
        return future


@pytest.mark.parametrize("place", [10, -1], ids=["on the way", "the last one"])
async def test_a_record_that_the_broker_did_not_take_fails_the_replay(tmp_path: Path, place: int) -> None:
    records = list(timeline_of(make_set(tmp_path / "set")))
    with pytest.raises(ConnectionResetError):
        await replay_to(FailingSender(loses=place % (len(records) + 1))).run(records)


def test_the_packaged_stream_is_whole_and_draws_its_cards() -> None:
    from streams.demo.packaged import open_packaged, packaged_folder

    data = open_packaged()
    assert (len(data.item_ids), len(data.interactions), len(data.user_ids)) == (10_506, 100_000, 16_554)
    cards = data.pictures.of(data.records(0, 20))
    assert cards == open_packaged().pictures.of(data.records(0, 20))
    assert len(set(cards)) == 20
    assert all(card is not None and card[:2] == b"\xff\xd8" for card in cards)
    notice = (packaged_folder() / "NOTICE").read_text()
    assert "The MIT License" in notice and "Simon Dooms" in notice
    assert set(pq.read_schema(packaged_folder() / "items.parquet").names) == {
        "item_id", "title", "text", "category", "genres", "release_year", "publish_ts",
    }  # fmt: skip


@pytest.mark.parametrize("events", [None, 60], ids=["everyone", "some users"])
def test_drawn_exposures_name_a_take_of_their_item_that_the_log_holds(tmp_path: Path, events: int | None) -> None:
    data = make_set(tmp_path / "set")
    log = behaviours_of(data, seed=1, events=events)
    sent = [json.loads(one.value) for one in Timeline(data, log, 1, NOW).behaviour_records()]
    takes = {one["event_id"]: (one["item_id"], one["occurred_at"]) for one in sent if one["kind"] != "exposure"}
    drawn = [one for one in sent if "drawn_from" in one]
    assert all(takes[one["drawn_from"]] == (one["item_id"], one["drawn_at"]) for one in drawn)
    shown = {one["exposure_id"] for one in sent if one["kind"] != "exposure"}
    others = [one for one in sent if one["kind"] == "exposure" and one["event_id"] not in shown]
    assert len(drawn) == len(others) > 100
    assert not shown & {one["event_id"] for one in drawn}
    for one in drawn[:3]:
        behaviour = decode(Behaviour, json.dumps(one).encode(), now=NOW, max_bytes=MAX_BYTES)
        assert behaviour.drawn_from == one["drawn_from"] and behaviour.drawn_at is not None
