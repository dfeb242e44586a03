"""Sending a timeline: as fast as its readers keep up, within what the broker takes, and to the very last record."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.errors import BrokerUnavailable
from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicName, TopicsConfig
from streams.replay.config import ReplayConfig
from streams.replay.sender import Replay
from streams.replay.timeline import Outgoing
from tests.factories.offline_folders import write
from tests.factories.replaying import RecordingSender, make_set, replay_to, timeline_of
from trainer.datasets.folder import open_data_set


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


@pytest.mark.parametrize("over", [0, 1])
async def test_a_record_may_be_as_large_as_the_broker_takes_with_what_it_adds(over: int) -> None:
    sender = RecordingSender()
    most = 8_000 - 1_024
    fits = Outgoing("behaviours", b"key", bytes(most - 3 + over), 1)
    bare = json.dumps({"item_id": "i", "text": "x"}).encode()
    text = json.dumps({"item_id": "i", "text": "x" * (1 + most - len(bare) - 1 + over)}).encode()
    assert len(text) + 1 == most + over
    pictured = Outgoing("items", b"i", text[:-1] + b', "image": "' + b"y" * 100 + b'"}', 2)
    replay = Replay(sender, BrokerConfig(max_record_bytes=8_000), TopicsConfig(), ReplayConfig())
    sent = await replay.run([fits, pictured])
    assert [value for _, _, value in sender.records] == ([] if over else [fits.value, text])
    assert (sent.records_left_out, sent.without_picture) == (2 * over, set() if over else {"i"})


async def test_the_first_twenty_large_ones_are_named_and_all_are_counted() -> None:
    large = [Outgoing("behaviours", b"u%d" % n, bytes(9_000), 1) for n in range(25)]
    with capture_logs() as lines:
        replay = Replay(RecordingSender(), BrokerConfig(max_record_bytes=8_000), TopicsConfig(), ReplayConfig())
        sent = await replay.run(large)
    assert (sent.records_left_out, sum(line["event"] == "replay.record_left_out" for line in lines)) == (25, 20)


class LateSender(RecordingSender):
    """Says of the last records only after the flush what became of them."""

    error: Exception | None = None

    async def flush(self) -> None:
        self.flushes += 1
        waiting, self._waiting = self._waiting, []
        for number, (future, metadata) in enumerate(waiting):
            refused = self.error if number == len(waiting) - 1 else None
            answer = (
                partial(future.set_exception, refused) if refused is not None else partial(future.set_result, metadata)
            )
            asyncio.get_running_loop().call_later(0.01, answer)


@pytest.mark.parametrize("refused", [False, True])
async def test_a_replay_is_over_when_the_broker_has_the_very_last_record(tmp_path: Path, refused: bool) -> None:
    sender = LateSender()
    timeline = timeline_of(make_set(tmp_path / "set"), broken=0.05)
    at: list[tuple[str, float]] = []
    replay = replay_to(sender, on_acknowledged=lambda one, when: at.append((one.topic, when)), monotonic=lambda: 7.0)
    if refused:
        sender.error = ConnectionResetError("gone")
        with pytest.raises(ConnectionResetError):
            await replay.run(timeline)
        assert replay.sent.acknowledged == len(at) == len(sender.records) - 1
        return
    sent = await replay.run(timeline)
    assert sent.acknowledged == sent.items + sent.behaviours == len(sender.records)
    assert at == [(topic.removeprefix("mim."), 7.0) for topic, _, _ in sender.records]
    assert sent.second == int(max(one.second for one in timeline))


@dataclass
class SeveralReaders:
    """Roles that read at their own pace; of `behaviours` only if `both`."""

    both: bool
    away: int = 0
    looks: int = 0

    async def consumed(self) -> Mapping[TopicName, Mapping[str, int]]:
        self.looks += 1
        if self.away:
            self.away -= 1
            raise BrokerUnavailable("Kafka", "restarts")
        slow, quick = self.looks // 3, 1_000
        items: dict[TopicName, Mapping[str, int]] = {"items": {"quick": quick, "slow": slow}}
        return items | {"behaviours": {"slow": slow, "quick": quick}} if self.both else items


@pytest.mark.parametrize("both", [True, False])
async def test_the_slowest_reader_of_each_topic_is_waited_for_and_none_where_nobody_reads(
    tmp_path: Path, both: bool
) -> None:
    sender, readers = RecordingSender(), SeveralReaders(both, away=2)
    waited: list[str | None] = []

    async def sleep(seconds: float) -> None:
        assert seconds == 0.25 and len(waited) < 5_000
        waited.append(replay.sent.waiting_for)

    config = ReplayConfig(max_items_in_flight=7, max_behaviours_in_flight=9, poll_seconds=0.25)
    replay = replay_to(sender, config, positions=readers, sleep=sleep)
    with capture_logs() as lines:
        sent = await replay.run(timeline_of(make_set(tmp_path / "set")))
    assert sent.waiting_for is None and sent.items == 30
    assert sum(line["event"] == "replay.positions_unknown" for line in lines) == 2
    assert waited[:2] == ["the first look"] * 2 and set(waited[2:]) == {"slow"}


async def test_whom_a_replay_waits_for_is_told_every_half_minute_as_long_as_nothing_is_read() -> None:
    class Stuck:
        looks = 0

        async def consumed(self) -> Mapping[TopicName, Mapping[str, int]]:
            self.looks += 1
            return {"items": {}, "behaviours": {"record": 1 if self.looks > 10 else 0}}

    clock = [0.0]

    async def sleep(seconds: float) -> None:
        clock[0] += 10

    config = ReplayConfig(max_behaviours_in_flight=1)
    replay = replay_to(RecordingSender(), config, positions=Stuck(), monotonic=lambda: clock[0], sleep=sleep)
    with capture_logs() as lines:
        await replay.run([Outgoing("behaviours", b"u", b"{}", 1)] * 2)
    told = [line for line in lines if line["event"] == "replay.waiting"]
    assert [(line["role"], line["sent_items"], line["sent"]) for line in told] == [("record", 0, 1)] * 2


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


class FailingSender(RecordingSender):
    async def send(self, topic: str, value: bytes | None = None, key: bytes | None = None) -> asyncio.Future[Any]:
        future = await super().send(topic, value, key)
        if len(self.records) in (10, 11):
            future.set_exception(ConnectionResetError("gone") if len(self.records) == 10 else KeyError("after that"))
            self._waiting.pop()
        return future


async def test_a_record_that_the_broker_did_not_take_fails_the_replay(tmp_path: Path) -> None:
    sender, timeline = FailingSender(), timeline_of(make_set(tmp_path / "set"))
    with pytest.raises(ConnectionResetError):
        await replay_to(sender).run(timeline)
    assert len(sender.records) <= 64 < timeline.items + timeline.events, "nothing more is sent once it is known"


class CancellingSender(RecordingSender):
    async def send(self, topic: str, value: bytes | None = None, key: bytes | None = None) -> asyncio.Future[Any]:
        future = await super().send(topic, value, key)
        if len(self.records) == 5:
            future.cancel()
            self._waiting.pop()
        return future


async def test_a_record_whose_sending_was_cancelled_is_neither_acknowledged_nor_an_error(tmp_path: Path) -> None:
    replay, timeline = replay_to(CancellingSender()), timeline_of(make_set(tmp_path / "set"))
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    sent = await replay.run(timeline)
    assert sent.acknowledged == timeline.items + timeline.events - 1 and told == []
    assert not replay._open, "no record is held once it is known what became of it"
