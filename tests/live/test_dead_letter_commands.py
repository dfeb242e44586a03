"""`mimstream dead-letters` against a real broker: what is sent again, what is not, and what dies in between."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from structlog.testing import capture_logs

from schemas.errors import Misconfigured, Reason
from schemas.items import ImageRetry, ItemPublished, SourceOffset
from schemas.letters import DeadLetter, ForeignHeaders
from streams.broker.clients import make_producer
from streams.broker.log_reader import LogReader
from streams.commands import dead_letters as dead_letters_command
from streams.dead_letters.inbox import DeadLetterTopic, only_open
from streams.dead_letters.producer import KafkaDeadLetters
from streams.dead_letters.requeue import Requeue
from streams.settings import Settings
from tests.factories.index_worker import start_index
from tests.factories.item_feed import center, feeding
from tests.factories.item_path import picture
from tests.factories.picture_site import PictureSite
from tests.factories.topics import read_all
from tests.factories.waiting import until

NOW = datetime(2026, 5, 1, tzinfo=UTC)


class Dies(Exception):
    """Whoever asked is killed at this point."""


class WatchedRequeue(Requeue):
    """Requeueing, with something happening before or after a send."""

    before: Callable[[], Any] | None = None
    dies_after_send = False

    async def _send(
        self, partition: TopicPartition, key: bytes | None, value: bytes | None, headers: ForeignHeaders
    ) -> int:
        if self.before is not None:
            happens, self.before = self.before, None
            await happens()
        offset = await super()._send(partition, key, value, headers)
        if self.dies_after_send:
            raise Dies
        return offset


@dataclass
class Scene:
    """The topic of dead letters, and what writes and requeues them."""

    settings: Settings
    producer: AIOKafkaProducer
    dead_letters: DeadLetterTopic
    requeue: WatchedRequeue

    async def send(self, topic: Any, key: bytes, value: bytes | None, partition: int = 1) -> int:
        name = self.settings.topics.full_name(topic)
        return int((await self.producer.send_and_wait(name, key=key, value=value, partition=partition)).offset)

    async def fail(self, topic: Any, key: bytes, value: bytes | None, **changes: Any) -> DeadLetter:
        """Send a record, and the dead letter of it."""
        offset = await self.send(topic, key, value)
        plain = DeadLetter(topic, 1, offset, key, value, "decode", Reason.NOT_JSON, "broken", NOW)
        letter = replace(plain, **changes)
        await KafkaDeadLetters(self.producer, self.settings.kafka, self.settings.topics).publish([letter])
        return letter

    async def requeue_all(self) -> list[str]:
        return [result.status for result in await self.requeue.requeue(await self.dead_letters.read())]

    async def open_ids(self) -> list[str]:
        return [entry.id for entry in only_open(await self.dead_letters.read())]

    async def values(self, topic: Any, key: bytes) -> list[bytes | None]:
        return [record.value for record in await read_all(self.settings, topic) if record.key == key]


@pytest.fixture
async def scene(settings: Settings) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as opened:
        reader = await opened.enter_async_context(LogReader(settings.kafka, settings.topics))
        producer = await opened.enter_async_context(make_producer(settings.kafka, linger_ms=0))
        dead_letters = DeadLetterTopic(reader, producer, settings.kafka, now=lambda: NOW)
        yield Scene(settings, producer, dead_letters, WatchedRequeue(reader, producer, settings.kafka, dead_letters))


async def test_a_record_is_sent_again_as_it_was_and_only_once(scene: Scene) -> None:
    own = (("ce_id", b"7"), ("empty", None))
    known = {"attempts": 2, "first_failed_at": NOW - timedelta(days=1), "record_headers": own}
    letter = await scene.fail("items", b"a", b"{broken", **known)
    await scene.send("items", b"b", b"a neighbour")
    assert await scene.requeue_all() == ["requeued"]
    assert await scene.requeue_all() == ["already_requeued"]
    assert await scene.open_ids() == []
    first, again = [record for record in await read_all(scene.settings, "items") if record.key == b"a"]
    assert (again.partition, again.value) == (first.partition, first.value)
    assert dict(again.headers) == dict(own) | {
        "requeued-from": letter.letter_key,
        "attempts": b"2",
        "first-failed-at": (NOW - timedelta(days=1)).isoformat().encode(),
    }


@pytest.mark.parametrize("newer", [b"published again", None])
async def test_what_a_newer_record_or_a_delete_has_superseded_is_refused(scene: Scene, newer: bytes | None) -> None:
    await scene.fail("items", b"a", b"{broken")
    await scene.send("items", b"a", newer)
    assert await scene.requeue_all() == ["superseded"]
    assert await scene.values("items", b"a") == [b"{broken", newer]
    assert len(await scene.open_ids()) == 1


async def test_of_two_failed_records_of_a_key_only_the_newer_is_sent_again(scene: Scene) -> None:
    await scene.fail("items", b"a", b"{first")
    await scene.fail("items", b"a", b"{second", failed_at=NOW + timedelta(seconds=1))
    assert sorted(await scene.requeue_all()) == ["requeued", "superseded"]
    assert (await scene.values("items", b"a"))[-1] == b"{second"


async def test_a_publish_between_the_look_and_the_sending_keeps_the_last_word(scene: Scene) -> None:
    await scene.fail("items", b"a", b"{broken")
    scene.requeue.before = lambda: scene.send("items", b"a", b"newest")
    assert await scene.requeue_all() == ["superseded"]
    assert (await scene.values("items", b"a"))[-1] == b"newest"


async def test_a_delete_between_the_look_and_the_sending_keeps_the_last_word_also_after_a_kill(scene: Scene) -> None:
    await scene.fail("items", b"a", b"{broken")
    scene.requeue.before = lambda: scene.send("items", b"a", None)
    scene.requeue.dies_after_send = True
    with pytest.raises(Dies):
        await scene.requeue_all()
    assert (await scene.values("items", b"a"))[-1] == b"{broken"
    scene.requeue.dies_after_send = False
    assert await scene.requeue_all() == ["superseded"]
    assert (await scene.values("items", b"a"))[-1] is None


async def test_killed_between_sending_and_noting_it_is_not_sent_twice(scene: Scene) -> None:
    await scene.fail("items", b"a", b"{broken")
    scene.requeue.dies_after_send = True
    with pytest.raises(Dies):
        await scene.requeue_all()
    scene.requeue.dies_after_send = False
    assert await scene.requeue_all() == ["already_requeued"]
    assert await scene.values("items", b"a") == [b"{broken", b"{broken"]
    assert await scene.open_ids() == []


async def test_a_behaviour_is_sent_again_to_its_partition(scene: Scene) -> None:
    await scene.fail("behaviours", b"u", b"{broken", stage="record")
    await scene.send("behaviours", b"u", b"something newer of the same user")
    assert await scene.requeue_all() == ["requeued"]
    assert (await scene.values("behaviours", b"u"))[-1] == b"{broken"


async def test_for_a_picture_that_was_given_up_its_item_is_sent_again(scene: Scene) -> None:
    item = ItemPublished(item_id="a", title="x", image_url="http://shop.test/a.png", published_at=NOW)
    published = item.model_dump_json().encode()
    offset = await scene.send("items", b"a", published)
    retry = ImageRetry(item=item, source=SourceOffset(partition=1, offset=offset), attempt=8, not_before=NOW)
    retried = {"stage": "image", "reason": Reason.IMAGE_UNAVAILABLE}
    await scene.fail("items-retry", b"a", retry.model_dump_json().encode(), **retried)
    assert await scene.requeue_all() == ["requeued"]
    assert await scene.values("items", b"a") == [published, published]
    await scene.fail("items-retry", b"a", retry.model_dump_json().encode(), **retried)
    assert sorted(await scene.requeue_all()) == ["already_requeued", "superseded"]


def command(settings: Settings, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    dead_letters_command.add_arguments(parser)
    return dead_letters_command.run(parser.parse_args(arguments), settings)


async def test_list_show_and_drop_as_commands(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    letter = await scene.fail("items", b"a", b"\xff{broken")
    other = await scene.fail("behaviours", b"u", b"{broken", stage="record")
    name = letter.letter_key.decode()

    async def told(*arguments: str, status: int = 0) -> Any:
        with capture_logs():  # else on standard output, where a process has them on standard error
            assert await asyncio.to_thread(command, scene.settings, *arguments, "--json") == status
        return json.loads(capsys.readouterr().out)

    assert {row["id"] for row in await told("list")} == {name, other.letter_key.decode()}
    assert [row["id"] for row in await told("list", "--topic", "items", "--since", "2026-04-01T00:00Z")] == [name]
    (shown,) = await told("show", name)
    assert (shown["value_base64"], shown["first_failed_at"]) == ("/3ticm9rZW4=", NOW.isoformat())
    assert (await told("drop", "--key", "a"))["counts"] == {"dropped": 1}
    assert [row["id"] for row in await told("list")] == [other.letter_key.decode()]
    assert [row["handled"] for row in await told("list", "--all", "--topic", "items")] == ["dropped"]
    assert (await told("requeue", name, "items/0/999", status=1))["counts"] == {"refused": 1, "already_dropped": 1}
    assert await asyncio.to_thread(command, scene.settings, "list") == 0
    assert "record" in capsys.readouterr().out
    with pytest.raises(Misconfigured, match="--all"):
        command(scene.settings, "requeue")
    with pytest.raises(Misconfigured, match="zone"):
        command(scene.settings, "list", "--since", "2026-04-01")


async def test_a_picture_that_came_too_late_is_indexed_after_a_requeue(
    settings: Settings, process: Any, pictures: PictureSite
) -> None:
    start_index(
        process,
        MIM_IMAGES__PRIVATE_NETWORKS='["127.0.0.0/8"]',
        MIM_IMAGES__ALLOWED_PORTS="[]",
        MIM_INDEX__RETRY_INITIAL_SECONDS="0.1",
        MIM_INDEX__RETRY_MAX_ATTEMPTS="2",
    )
    async with feeding(settings) as feed, center(settings) as index:
        await feed.publish("bare", "", image_url=pictures.url + "one")
        await until(lambda: read_all(settings, "dead-letters"), lambda found: len(found) == 1)
        await until(lambda: index.fetch(["bare"], pending=True), lambda rows: rows["bare"].is_deleted)
        requeue = process("dead-letters", "requeue", "--reason", "image_unavailable", cold=True)
        assert await asyncio.to_thread(requeue.wait, 60) == 0, requeue.output()
        # two letters, one note of sending again
        await until(lambda: read_all(settings, "dead-letters"), lambda found: len(found) == 3)
        found = [r for r in await read_all(settings, "dead-letters") if r.value is not None]
        newest = max((DeadLetter.from_record(r.value, r.headers) for r in found), key=lambda letter: letter.failed_at)
        pictures.there["one"] = picture("blue")
        assert await asyncio.to_thread(command, settings, "requeue", "--all") == 0
        await until(lambda: index.fetch(["bare"]))
    assert (newest.topic, newest.attempts) == ("items-retry", 2)
    assert newest.requeued_from is not None
    assert newest.first_failed_at is not None and newest.first_failed_at < newest.failed_at
