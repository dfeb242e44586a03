"""Turning a data set into records and sending them in order."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from schemas.base import Message, decode
from schemas.behaviours import Behaviour, BehaviourKind
from schemas.errors import BadMessage, Misconfigured, Reason
from schemas.field_maps import FieldMap
from schemas.items import ItemPublished
from streams.replay.broken_events import BEHAVIOUR_KINDS, ITEM_KINDS, BrokenEvent, broken_behaviour, broken_item
from streams.replay.timeline import Outgoing, Timeline, item_json
from tests.factories.offline_folders import START, write
from tests.factories.replaying import NOW, RecordingSender, make_set, replay_to, timeline_of
from trainer.datasets.attributes import ItemAttributes
from trainer.datasets.exposures import PUBLISHED_AT_IS, behaviours_of, how_published, is_drawn_name
from trainer.datasets.folder import ItemRecord, open_data_set

MAX_BYTES = 4_194_304


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
    assert len(events) == 120 + 60 == len({event["event_id"] for event in events})


def test_what_was_shown_beside_a_row_has_an_id_of_its_own(tmp_path: Path) -> None:
    ids = [f"e{place}" for place in range(120)]
    rows = make_set(tmp_path / "set", event_id=ids, label=[0, 1] * 60).interactions
    users = [open_data_set(tmp_path / "set").user_ids[user] for user in rows.user]
    write(tmp_path / "set", "exposures", ts=rows.ts, user_id=users, item_id=["i0"] * 120)
    data = open_data_set(tmp_path / "set")
    timeline = timeline_of(data)
    assert timeline.behaviours is not None and (timeline.behaviours.draw >= 0).sum() == 120
    events = [json.loads(one.value) for one in timeline.behaviour_records()]
    item_of = {event["event_id"]: event["item_id"] for event in events}
    assert len(item_of) == len(events) == 120 + 60 + 120
    assert [item_of[name] for name in ids] == [data.item_ids[item] for item in rows.item]
    assert {item_of[name] for name in item_of if is_drawn_name(name)} == {"i0"}


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
    many = [one.key for one in timeline_of(timeline.data, broken=1.0) if one.topic == "items" and one.reason]
    assert len(set(many)) == len(many) > len(ITEM_KINDS)  # several of a kind
    places = {topic: broken_after(timeline, topic) for topic in ("items", "behaviours")}
    assert places == {
        "items": [2, 7, 10, 17, 21, 21, 21, 23], "behaviours": [4, 9, 15, 21, 37, 41, 52, 66, 67, 68],
    }, "the same set and seed always give the same stream"  # fmt: skip
    times = {Reason.TIMESTAMP_WITHOUT_ZONE, Reason.TIMESTAMP_IN_FUTURE}
    assert {one.reason for one in events} == {Reason.NOT_JSON, Reason.WRONG_TYPE, Reason.UNKNOWN_VERSION} | times


def broken_after(timeline: Timeline, topic: str) -> list[int]:
    """How many good records of the topic come before each broken one, of the first ten."""
    ours = [one for one in timeline if one.topic == topic]
    return [sum(one.reason is None for one in ours[:place]) for place, one in enumerate(ours) if one.reason][:10]


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


def test_a_record_that_is_refused_for_what_it_says_tells_nothing_of_the_field_map(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set")
    too_long = data.items.set_column(0, "item_id", [["x" * 2_000, *data.item_ids[1:]]])
    assert data.items.column_names[0] == "item_id"
    timeline = timeline_of(replace(data, items=too_long))
    timeline.refuse_field_maps({"item_id": "sku"}, {})
    with pytest.raises(Misconfigured, match="MIM_RECORD__FIELD_MAP does not read"):
        timeline.refuse_field_maps({"item_id": "sku"}, {"user_id": "uid"})


def test_an_item_is_published_with_all_that_the_set_says_of_it() -> None:
    plain = ItemRecord("i1", "größe", "words", None, None, START, {})
    whole = replace(plain, category="shoes", price=0.0, year=1999)
    read = [
        decode(ItemPublished, item_json(record, picture), now=NOW, max_bytes=MAX_BYTES)
        for record, picture in ((plain, None), (plain, b""), (whole, b"\xff\xd8picture"))
    ]
    for item in read:
        assert (item.item_id, item.title, item.text, item.event) == ("i1", "größe", "words", "publish")
        assert item.published_at.timestamp() == START
    assert [(one.category, one.price, one.year, one.image) for one in read] == [
        (None, None, None, None), (None, None, None, None), ("shoes", 0.0, 1999, b"\xff\xd8picture"),
    ]  # fmt: skip


def test_every_event_says_what_its_row_says(tmp_path: Path) -> None:
    data = make_set(tmp_path / "set")
    timeline = timeline_of(data)
    log = timeline.behaviours
    assert log is not None and log.defines_publish.any() and (log.draw >= 0).any()
    events = [one for one in timeline if one.topic == "behaviours"]
    for position, outgoing in enumerate(events):
        document, row = json.loads(outgoing.value), int(log.row[position])
        assert outgoing.second == log.ts[position] == datetime.fromisoformat(document["occurred_at"]).timestamp()
        assert (document["user_id"], document["item_id"]) == (
            data.user_ids[log.user[position]], data.item_ids[log.item[position]],
        )  # fmt: skip
        assert document.get("defines_publish", False) == bool(log.defines_publish[position])
        assert document["kind"] == ("click" if log.is_take[position] else "exposure")
        shown = document.get("exposure_id", document["event_id"])
        assert shown.endswith(log.exposure_name(position)) and ("exposure_id" in document) == log.is_take[position]
        if log.is_take[position]:
            assert document["event_id"].endswith(f"-t{row}")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5])
def test_a_set_without_behaviours_is_its_items_and_the_broken_ones_asked_for(tmp_path: Path, share: float) -> None:
    timeline = Timeline(make_set(tmp_path / "set"), None, seed=1, now=NOW, broken_share=share)
    broken = {0.0: 0, 0.01: len(ITEM_KINDS), 0.5: 15}[share]
    assert (timeline.items, timeline.events, len(list(timeline))) == (30 + broken, 0, 30 + broken)
    assert sum(one.reason is not None for one in timeline) == broken


def test_behaviours_carry_what_was_searched_and_looked_at_and_the_kind_of_a_take(tmp_path: Path) -> None:
    rows = 120
    data = make_set(
        tmp_path / "set",
        query_text=["shoes", None] * (rows // 2),
        query_image=[b"photo", b"photo", None, None] * (rows // 4),
        trigger_item=["i3", None, None] * (rows // 3),
        kind=["click", "cart", "purchase"] * (rows // 3),
    )
    log = behaviours_of(data, seed=1)
    records = list(timeline_of(data).behaviour_records())
    assert len(records) == len(log) and (log.draw >= 0).sum() > rows
    for position, record in enumerate(records):
        event = decode(Behaviour, record.value, now=NOW, max_bytes=MAX_BYTES)
        row = int(log.row[position])
        assert event.query_text == ("shoes" if row % 2 == 0 else None)
        assert event.query_image == (b"photo" if row % 4 < 2 else None)
        assert event.trigger_item == ("i3" if row % 3 == 0 else None)
        kind = ["click", "cart", "purchase"][row % 3] if log.is_take[position] else "exposure"
        assert event.kind.value == kind


def test_what_is_left_out_is_the_picture_of_an_item_or_the_photo_of_a_search() -> None:
    value = b'{"image": "x", "title": "\xc3\xb6"}'
    without = Outgoing("items", b"a", value, 3).without_picture()
    assert without == Outgoing("items", b"a", b'{"title": "\xc3\xb6"}', 3) and without.size == len(without.value) + 1
    assert Outgoing("behaviours", b"a", value, 3).without_picture() is None
    searched = Outgoing("behaviours", b"a", b'{"query_text": "x", "query_image": "y"}', 3).without_picture()
    assert searched == Outgoing("behaviours", b"a", b'{"query_text": "x"}', 3)
    assert Outgoing("behaviours", b"a", b"\xff no JSON", 3).without_picture() is None
    assert Outgoing("items", b"a", b'{"title": "x"}', 3).without_picture() is None


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
