"""The recorder's loop over an in-memory log: where it reads, what it commits, which records get a dead letter."""

from __future__ import annotations

import asyncio
import json

from aiokafka import TopicPartition

from streams.broker.clients import BrokerConfig
from streams.broker.cluster import TopicIncarnation
from streams.dead_letters.producer import InMemoryDeadLetters
from streams.recording.config import RecordConfig
from streams.recording.recorder import Recorder
from streams.stores.histories.store import InMemoryBehaviourStore
from tests.factories.click_log import LOG
from tests.factories.fake_consumer import FakeConsumer, FakeRecord

PARTITION = TopicPartition(LOG.topic, 0)


def click(offset: int) -> FakeRecord:
    event = {"event_id": f"e{offset}", "kind": "click", "user_id": "u1", "item_id": "i", "occurred_at": 1_700_000_000}
    return FakeRecord(0, offset, b"u1", json.dumps(event).encode())


class Scene:
    """A recorder with everything in memory."""

    def __init__(self, *records: FakeRecord, beginning: int = 0) -> None:
        self.consumer = FakeConsumer({PARTITION: records}, beginning=beginning)
        self.store = InMemoryBehaviourStore()
        self.dead_letters = InMemoryDeadLetters()

    async def run(self, *, until: int) -> None:
        """Run until offset `until` is committed."""
        stop = asyncio.Event()

        async def identify() -> TopicIncarnation:
            return LOG

        recorder = Recorder(
            self.consumer,
            self.store,
            self.dead_letters,
            topic=LOG.topic,
            broker=BrokerConfig(),
            identify=identify,
            config=RecordConfig(),
            clock=asyncio.get_running_loop().time,
        )
        running = asyncio.create_task(recorder.run(stop))
        async with asyncio.timeout(30):
            await asyncio.sleep(0)
            await self.consumer.give(PARTITION)
            while self.consumer.commits.get(PARTITION) != until:
                assert not running.done(), running
                await asyncio.sleep(0)
        stop.set()
        await running


async def test_it_reads_from_the_stores_position_and_commits_what_was_written() -> None:
    scene = Scene(*map(click, range(5)))
    await scene.run(until=5)
    assert await scene.store.positions() == {0: 5}
    scene.consumer.log = {PARTITION: [*map(click, range(8))]}
    scene.consumer.commits.clear()
    await scene.run(until=8)
    assert (await scene.store.counts())["takes"] == 8
    assert (await scene.store.counts())["duplicates"] == 0


async def test_a_broken_record_gets_one_letter_though_the_store_lost_its_data() -> None:
    scene = Scene(click(0), FakeRecord(0, 1, b"u1", b"{broken"), click(2))
    await scene.run(until=3)
    scene.store = InMemoryBehaviourStore()
    scene.consumer.log = {PARTITION: [*scene.consumer.log[PARTITION], click(3)]}
    await scene.run(until=4)
    assert [letter.offset for letter in scene.dead_letters.letters] == [1]
    assert (await scene.store.counts())["takes"] == 3


async def test_records_that_retention_deleted_are_passed_over() -> None:
    scene = Scene(click(7), click(8), beginning=7)
    await scene.run(until=9)
    assert await scene.store.positions() == {0: 9}
    assert (await scene.store.counts())["takes"] == 2
