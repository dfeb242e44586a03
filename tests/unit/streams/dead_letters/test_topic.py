"""The topic of dead letters as it is read, surveyed and marked; and which record a letter is requeued to."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition

from schemas.errors import Misconfigured, Reason
from schemas.items import ImageRetry, ItemPublished, SourceOffset
from schemas.letters import DeadLetter, Handled, RequeueHeaders
from streams.broker.clients import BrokerConfig, RecordTooLarge
from streams.dead_letters.inbox import DeadLetterEntry, DeadLetterTopic, Filter, only_open
from streams.dead_letters.requeue import Requeue, RequeueResult
from streams.dead_letters.survey import Survey
from tests.factories.fake_consumer import FakeRecord
from tests.factories.memory_log import MemoryLog

NOW = datetime(2026, 5, 1, tzinfo=UTC)
MARKED = NOW + timedelta(days=2)
NEWER_MS = 2_000_000_000_000


class Topics(MemoryLog):
    """The topics that letters are about, with a producer that appends to them."""

    def __init__(self) -> None:
        super().__init__(items=[[], []], behaviours=[[], []], dead_letters=[[], []])
        self.too_large = False
        given: Any = self
        self.letters = DeadLetterTopic(given, given, BrokerConfig(), now=lambda: MARKED)

    def add(self, topic: str, partition: int, key: bytes | None, value: bytes | None, headers: Any = ()) -> FakeRecord:
        log = self.topics[topic][partition]
        at = log[-1].offset + 1 if log else self.first.get(TopicPartition(f"mim.{topic}", partition), 0)
        log.append(FakeRecord(partition, at, key, value, 1_000 + at, tuple(headers)))
        return log[-1]

    def bury(self, topic: str, record: FakeRecord, *, into: int = 0, **over: Any) -> DeadLetter:
        place = (topic, record.partition, record.offset, record.key, record.value)
        letter = replace(DeadLetter(*place, "decode", Reason.NOT_JSON, "x", NOW), **over).after(record.headers)
        self.add("dead-letters", into, letter.letter_key, letter.value, letter.headers())
        return letter

    async def send_and_wait(self, topic: str, value: Any = None, *, key: bytes, partition: int, headers: Any) -> Any:
        if self.too_large:
            raise RecordTooLarge("too large")
        record = self.add(topic.removeprefix("mim."), partition, key, value, headers)
        log = self.topics[topic.removeprefix("mim.")][partition]
        log[-1] = replace(record, timestamp=NEWER_MS)
        return SimpleNamespace(offset=record.offset)

    async def requeue(self, *ids: str) -> list[tuple[str, str]]:
        given: Any = self
        entries = {one.id: one for one in await self.letters.read()}
        told: list[RequeueResult] = []
        requeue = Requeue(given, given, BrokerConfig(), self.letters)
        found = await requeue.requeue([entries[name] for name in ids], told.append)
        assert told == found
        return [(one.id, one.status) for one in found]


@pytest.fixture
def topics() -> Topics:
    return Topics()


# ---- reading and marking --------------------------------------------------------------------------------------------


async def test_letters_of_all_partitions_are_read_with_what_became_of_them_and_how_far(topics: Topics) -> None:
    topics.bury("items", topics.add("items", 1, b"a", b"{"), failed_at=NOW + timedelta(hours=1))
    topics.bury("behaviours", topics.add("behaviours", 0, b"u", b"{"), into=1)
    told: list[tuple[int, int]] = []
    later, earlier = await topics.letters.read(lambda done, total: told.append((done, total)))
    assert (later.id, earlier.id) == ("behaviours/0/0", "items/1/0") and (later.at, earlier.at) == ((1, 0), (0, 0))
    assert told == [(1, 2), (1, 2), (2, 2), (2, 2)]
    await topics.letters.mark([later], "dropped")
    (open_one,) = only_open(await topics.letters.read())
    assert open_one.id == "items/1/0"
    mark = topics.topics["dead-letters"][1][-1]  # behind its letter
    assert (mark.key, mark.value, mark.offset) == (b"behaviours/0/0", None, 1)
    handled = Handled.from_record(mark.key, mark.headers)
    assert handled is not None and (handled.action, handled.at) == ("dropped", MARKED)


async def test_progress_counts_what_is_there_and_not_what_retention_has_deleted(topics: Topics) -> None:
    topics.first[TopicPartition("mim.dead-letters", 1)] = 400
    topics.bury("items", topics.add("items", 1, b"a", b"{"), into=1)
    told: list[tuple[int, int]] = []
    await topics.letters.read(lambda done, total: told.append((done, total)))
    assert told == [(0, 1), (1, 1), (1, 1)]


async def test_the_whole_letter_is_read_from_its_place_while_it_is_there(topics: Topics) -> None:
    topics.bury("items", topics.add("items", 0, b"other", b"1"), into=0)
    topics.bury("items", topics.add("items", 0, b"a", b"original"), into=1)
    one = next(entry for entry in await topics.letters.read() if entry.id == "items/0/1")
    assert one.newest.value is None and (await topics.letters.letter(one)).value == b"original"
    topics.topics["dead-letters"][1].clear()
    with pytest.raises(Misconfigured, match=r"items/0/1 is no longer in .*retention"):
        await topics.letters.letter(one)


async def test_a_survey_gives_the_newest_letters_that_are_still_there(topics: Topics) -> None:
    for n in range(4):
        record = topics.add("items", 0, f"k{n}".encode(), b"{")
        topics.bury("items", record, into=n % 2, failed_at=NOW + timedelta(minutes=n))
    survey = Survey(Filter(), with_handled=False)
    await topics.letters.survey(survey)
    assert [one.id for one in await topics.letters.newest(survey, 3)] == [f"items/0/{n}" for n in (1, 2, 3)]
    topics.topics["dead-letters"][1].pop()
    assert [one.id for one in await topics.letters.newest(survey, 3)] == ["items/0/1", "items/0/2"]


# ---- requeueing -----------------------------------------------------------------------------------------------------


async def test_a_behaviour_goes_again_to_its_own_partition_with_its_headers_and_number_of_attempts(
    topics: Topics,
) -> None:
    for n in range(3):
        topics.add("behaviours", 1, b"x", b"%d" % n)
    failed = topics.add("behaviours", 1, b"u1", b"{", [("trace", b"7")])
    letter = topics.bury("behaviours", failed)
    assert await topics.requeue("behaviours/1/3") == [("behaviours/1/3", "requeued")]
    sent = topics.topics["behaviours"][1][-1]
    assert (sent.offset, sent.key, sent.value) == (4, b"u1", b"{")
    assert list(sent.headers) == [("trace", b"7"), *RequeueHeaders.of(letter).headers()]
    written = len(topics.topics["dead-letters"][0])
    assert await topics.requeue("behaviours/1/3") == [("behaviours/1/3", "already_requeued")]
    assert len(topics.topics["behaviours"][1]) == 5
    assert len(topics.topics["dead-letters"][0]) == written  # it is marked already


async def test_what_cannot_be_sent_again_is_refused_with_the_reason_and_not_marked(topics: Topics) -> None:
    topics.bury("behaviours", FakeRecord(7, 0, b"u", b"{"))
    topics.bury("items", FakeRecord(9, 0, b"a", b"{"))
    topics.bury("models", FakeRecord(0, 0, b"a", b"{"))
    topics.bury("items-retry", FakeRecord(0, 4, b"a", b"{"))
    ids = ["behaviours/7/0", "items/9/0", "models/0/0", "items-retry/0/4"]
    assert sorted(await topics.requeue(*ids)) == sorted((one, "refused") for one in ids)
    assert len(only_open(await topics.letters.read())) == 4
    topics.bury("behaviours", topics.add("behaviours", 0, b"u", b"{"))
    topics.bury("items", topics.add("items", 1, b"a", b"{"))
    topics.too_large = True
    refused = ["behaviours/0/0", "items/1/0"]
    assert await topics.requeue(*refused) == [(one, "refused") for one in refused]
    assert len(only_open(await topics.letters.read())) == 6


async def test_a_dropped_letter_is_not_sent(topics: Topics) -> None:
    topics.bury("behaviours", topics.add("behaviours", 0, b"u", b"{"))
    await topics.letters.mark(await topics.letters.read(), "dropped")
    assert await topics.requeue("behaviours/0/0") == [("behaviours/0/0", "already_dropped")]
    assert len(topics.topics["behaviours"][0]) == 1


@pytest.mark.parametrize("gone", [False, True])
async def test_a_picture_that_was_given_up_sends_its_item_again_if_that_is_there(topics: Topics, gone: bool) -> None:
    item = ItemPublished(item_id="a", title="x", published_at=NOW, image_url="https://p.example/a.jpg")
    topics.add("items", 1, b"b", b"another")
    record = topics.add("items", 1, b"a", item.model_dump_json().encode(), [("trace", b"7"), ("requeued-from", b"?")])
    source = SourceOffset(partition=1, offset=1)
    retry = ImageRetry(item=item, source=source, attempt=9, not_before=NOW)
    topics.bury("items-retry", FakeRecord(1, 40, b"a", retry.model_dump_json().encode()), stage="image")
    if gone:
        topics.topics["items"][1][1] = replace(record, key=b"b")
    (result,) = await topics.requeue("items-retry/1/40")
    assert result == ("items-retry/1/40", "superseded" if gone else "requeued")
    if not gone:
        sent = topics.topics["items"][1][-1]
        assert (sent.key, sent.value) == (b"a", record.value) and ("trace", b"7") in sent.headers
        assert [value for name, value in sent.headers if name == "requeued-from"] == [b"items-retry/1/40"]


class Overtaken(Topics):
    """Another producer writes the key right after each of our first `times` repetitions began."""

    times = 1

    async def send_and_wait(self, topic: str, value: Any = None, **more: Any) -> Any:
        if self.times and topic == "mim.items":
            self.times -= 1
            self.add("items", more["partition"], more["key"], b"newer %d" % self.times, [("trace", b"7")])
        return await super().send_and_wait(topic, value, **more)


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_a_newer_record_that_came_in_between_is_made_the_last_one_again(times: int) -> None:
    topics = Overtaken()
    topics.times = times
    topics.bury("items", topics.add("items", 0, b"a", b"old"))
    assert await topics.requeue("items/0/0") == [("items/0/0", "superseded")]
    last = topics.topics["items"][0][-1]
    assert (last.value, list(last.headers)) == (b"newer 0", [("trace", b"7")])  # as its producer sent it
    assert only_open(await topics.letters.read()) != []


async def test_a_newer_record_that_compaction_takes_meanwhile_is_not_put_back() -> None:
    class Compacted(Overtaken):
        async def one(self, partition: TopicPartition, offset: int) -> FakeRecord | None:
            return None if (partition.topic, offset) == ("mim.items", 1) else await super().one(partition, offset)

    topics = Compacted()
    topics.bury("items", topics.add("items", 0, b"a", b"old"))
    assert await topics.requeue("items/0/0") == [("items/0/0", "superseded")]
    assert [record.value for record in topics.topics["items"][0]] == [b"old", b"newer 0", b"old"]


async def test_a_record_without_a_value_is_sent_again_without_one(topics: Topics) -> None:
    topics.bury("items", topics.add("items", 1, b"a", None))
    topics.bury("behaviours", topics.add("behaviours", 0, b"u", None))
    ids = ["behaviours/0/0", "items/1/0"]
    assert await topics.requeue(*ids) == [(one, "requeued") for one in ids]
    for topic, partition in (("items", 1), ("behaviours", 0)):
        assert [record.value for record in topics.topics[topic][partition]] == [None, None]


async def test_letters_of_several_partitions_and_of_one_key_are_each_answered(topics: Topics) -> None:
    for partition, key in ((0, b"a"), (1, b"b"), (0, b"a")):
        topics.bury("items", topics.add("items", partition, key, b"{"))
    found: list[DeadLetterEntry] = await topics.letters.read()
    assert sorted(await topics.requeue(*(one.id for one in found))) == [
        ("items/0/0", "superseded"),
        ("items/0/1", "requeued"),
        ("items/1/0", "requeued"),
    ]
