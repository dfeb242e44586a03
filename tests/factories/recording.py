"""A recorder over an in-memory log and store, run until an offset is committed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from aiokafka import TopicPartition

from streams.broker.clients import BrokerConfig
from streams.broker.cluster import TopicIncarnation
from streams.dead_letters.producer import InMemoryDeadLetters
from streams.recording.config import RecordConfig
from streams.recording.recorder import Recorder
from streams.runtime.delivery import Patience
from streams.stores.histories.packed_history import RecordReport
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
        self.reports: list[RecordReport] = []
        self.log, self.log_replaced = LOG, False
        self.clock: Callable[[], float] | None = None
        self.config, self.broker = RecordConfig(), BrokerConfig()
        self.ready = 0

    def on_ready(self) -> None:
        assert self.consumer.positions and not self.consumer.paused, "not placed yet"
        self.ready += 1

    async def run(self, *, until: int, then: Callable[[], int] | None = None) -> None:
        """Run until offset `until` is committed, do `then`, and run on until what it returns is."""
        stop = asyncio.Event()

        async def identify() -> TopicIncarnation:
            return self.log

        recorder = Recorder(
            self.consumer,
            self.store,
            self.dead_letters,
            topic=LOG.topic,
            broker=self.broker,
            identify=identify,
            config=self.config,
            clock=self.clock or asyncio.get_running_loop().time,
            log_replaced=self.log_replaced,
            patience=Patience(sleep=lambda seconds: asyncio.sleep(0)),
            on_report=self.reports.append,
            on_ready=self.on_ready,
        )
        running = asyncio.create_task(recorder.run(stop))
        async with asyncio.timeout(30):
            await asyncio.sleep(0)
            await self.consumer.give(PARTITION)
            for wanted in (until, then):
                if callable(wanted):
                    wanted = wanted()
                while wanted is not None and self.consumer.commits.get(PARTITION) != wanted:
                    assert not running.done(), running
                    await asyncio.sleep(0)
        stop.set()
        await running
