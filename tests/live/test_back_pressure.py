"""While a sink is away, or a step blocks, for longer than a session: little is taken on, and nobody loses his place."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from encoders.hashing import HashingEncoder
from streams.broker.clients import make_consumer
from streams.broker.cluster import TopicIncarnation, read_incarnation
from streams.broker.leadership import Leadership
from streams.broker.log_reader import read_ends
from streams.dead_letters.producer import InMemoryDeadLetters
from streams.recording.config import RecordConfig
from streams.recording.recorder import Recorder
from streams.runtime.interval import IntervalTimer
from streams.settings import Settings
from streams.stack.parts import PartName
from streams.stack.run import RunningStack
from streams.stores.histories.client import make_redis
from streams.stores.histories.redis_store import RedisBehaviourStore
from streams.stores.vectors.milvus_index import MilvusItemIndex
from streams.training.input import TrainingInput
from streams.training.loop import TrainingLoop
from streams.training.offset_commits import OffsetCommits
from streams.training.reports import TrainReports
from streams.training.trainer_thread import TrainerThread
from tests.factories.click_world import World, produce
from tests.factories.index_app import Worker
from tests.factories.item_feed import feeding, held
from tests.factories.recorded_log import click_log, expected, send, view_of
from tests.factories.waiting import until
from trainer.online.config import TrainerConfig
from trainer.online.embedding_wait import EmbeddingWait
from trainer.online.trainer import OnlineTrainer

pytestmark = [
    pytest.mark.timeout(240),
    # Faust leaves threads' sockets to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]

SESSION_SECONDS = 6.0
"""The shortest that the broker allows."""
A_DAY = 86_400.0


@asynccontextmanager
async def frozen(stack: RunningStack, part: PartName) -> AsyncIterator[None]:
    """The part is there and answers nothing; it goes on at the end."""
    pid = stack.pid(part)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
    await asyncio.to_thread(stack.wait_ready, part)


async def outlast_a_session() -> None:
    await asyncio.sleep(SESSION_SECONDS + 1.5)


def place_in(consumer: Any) -> tuple[str, int]:
    coordinator = consumer._coordinator
    assert coordinator._max_poll_interval >= A_DAY, "an outage that long would cost the partitions"
    return coordinator.member_id, coordinator.generation


async def test_a_recorder_without_valkey_takes_on_one_batch_and_keeps_its_partitions(
    settings: Settings, stack: RunningStack
) -> None:
    redis = settings.redis.model_copy(update={"timeout_seconds": 1.0})
    topic, store, most = settings.topics.full_name("behaviours"), RedisBehaviourStore(make_redis(redis), redis), 100
    consumer = make_consumer(
        settings.kafka,
        group_id=settings.topics.group("record"),
        session_timeout_ms=round(SESSION_SECONDS * 1000),
        heartbeat_interval_ms=500,
        max_poll_interval_ms=round(A_DAY * 1000),
    )

    async def identify() -> TopicIncarnation:
        return await asyncio.to_thread(read_incarnation, settings.kafka, settings.topics, "behaviours")

    await consumer.start()
    stop = asyncio.Event()
    recorder = Recorder(
        consumer,
        store,
        InMemoryDeadLetters(),
        topic=topic,
        broker=settings.kafka,
        identify=identify,
        config=RecordConfig(max_records=most, identity_check_seconds=3600),
        clock=time.time,
    )
    try:
        with capture_logs() as logs:
            running = asyncio.create_task(recorder.run(stop))
            await send(settings, click_log(21, 300))
            await until(lambda: recorded_all(settings, store))
            place, taken = place_in(consumer), await positions(consumer)
            async with frozen(stack, "valkey"):
                await send(settings, click_log(22, 5_000))
                await outlast_a_session()
                more = sum((await positions(consumer)).values()) - sum(taken.values())
                assert 0 < more <= most
                assert len(consumer._fetcher._records) <= settings.topics.partitions  # an answer of the broker each
                assert any(line["event"] == "delivery.held" for line in logs) and not running.done()
            await until(lambda: recorded_all(settings, store))
            assert place_in(consumer) == place
            assert [line["event"] for line in logs].count("record.placed") == settings.topics.partitions
        assert await view_of(store) == await expected(settings)
    finally:
        stop.set()
        await asyncio.wait_for(running, 30)
        await consumer.stop()
        await store.close()


async def positions(consumer: Any) -> dict[Any, int]:
    return {partition: await consumer.position(partition) for partition in consumer.assignment()}


async def recorded_all(settings: Settings, store: RedisBehaviourStore) -> bool:
    ends = await read_ends(settings.kafka, settings.topics, "behaviours")
    return await store.positions() == {partition: end for partition, end in ends.items() if end}


async def test_an_index_worker_without_milvus_takes_on_a_few_batches_and_keeps_its_partitions(
    settings: Settings, stack: RunningStack, tmp_path: Path
) -> None:
    encoder = HashingEncoder(16)
    milvus = settings.milvus.model_copy(update={"timeout_seconds": 1.0})
    index = MilvusItemIndex(milvus, encoder_version=encoder.version, dim=16)
    await index.open()
    batch = 8
    worker = Worker(
        settings, tmp_path, index=index, session_timeout_seconds=SESSION_SECONDS, batch_max_items=batch, batches_ahead=1
    )
    try:
        async with feeding(settings) as feed:
            await feed.publish("a", "before")
            await until(lambda: holds(index, feed.expected))
            (app,) = worker.apps
            place = place_in(app.consumer._thread._consumer)
            async with frozen(stack, "milvus"):
                for n in range(40 * batch):
                    await feed.publish(f"i{n}", "meanwhile")
                await outlast_a_session()
                in_hand = len(app.consumer.unacked)
                # the stream's buffer, two batches in line and one being gathered, an answer of the broker
                assert 0 < in_hand <= 2 * batch + 3 * batch + batch
            await until(lambda: holds(index, feed.expected))
            assert worker.apps == [app] and worker.ready == 1
            assert place_in(app.consumer._thread._consumer) == place
    finally:
        worker.stop.set()
        await asyncio.wait_for(worker.running, 60)
        await index.close()


async def holds(index: MilvusItemIndex, titles: dict[str, str]) -> bool:
    return {item_id: row.title for item_id, row in (await held(index, set(titles))).items()} == titles


class Elections(Leadership):
    """Notes what came of each election."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.outcomes: list[bool] = []

    def _assigned(self, given: bool) -> None:
        self.outcomes.append(given)
        super()._assigned(given)


class Blocking(OnlineTrainer):
    """Its first step does not end before it is told to."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.blocked, self.go_on = threading.Event(), threading.Event()

    def step(self) -> Any:
        if not self.blocked.is_set():
            self.blocked.set()
            self.go_on.wait(60)
        return super().step()


async def test_a_trainer_whose_step_blocks_reads_no_further_and_keeps_the_lead_through_an_election(
    settings: Settings,
) -> None:
    world = World()
    await produce(settings, world=world, behaviours=world.behaviours(300))
    made: list[Blocking] = []

    def make(encoder_version: str, dim: int, partitions: Any) -> OnlineTrainer:
        config = TrainerConfig(batch_rows=16, space_negatives=4, time_negatives=4)
        made.append(Blocking(config, encoder_version=encoder_version, dim=dim, partitions=partitions))
        return made[0]

    def stands() -> Elections:
        return Elections(
            settings.kafka,
            group=settings.topics.group("train"),
            topic=settings.topics.full_name("models"),
            transactional_id=settings.topics.group("train"),
            session_timeout_ms=round(SESSION_SECONDS * 1000),
        )

    reads = TrainingInput(
        settings.kafka,
        settings.topics,
        field_map={},
        encoder_version=None,
        fetch_max_records=100,
        buffered_records=400,
        idle_seconds=0.5,
        all_idle_seconds=0.5,
        open_transaction_seconds=60,
        bounded=False,
        clock=time.time,
    )
    stop = asyncio.Event()
    async with stands().candidate() as leader, stands().candidate() as rival:
        assert isinstance(leader, Elections) and isinstance(rival, Elections)
        assert await leader.elected(stop)
        fence = leader.fence
        await until(lambda: leader.settled)
        thread = TrainerThread(reads, make, waits=EmbeddingWait(timeout_seconds=120))
        commits = OffsetCommits(
            leader,
            thread.committed_offsets,
            topic=settings.topics.full_name("behaviours"),
            interval_seconds=2,
            clock=time.time,
        )
        reports = TrainReports(interval=IntervalTimer(1, time.time))
        loop = TrainingLoop(reads, thread, reports, commits=commits, clock=time.time)
        running = asyncio.create_task(loop.run(stop))
        try:
            await until(lambda: made and made[0].blocked.is_set())
            elections = list(leader.outcomes)
            await produce(settings, behaviours=world.behaviours(3_000))
            ends = await read_ends(settings.kafka, settings.topics, "behaviours")
            await outlast_a_session()
            assert leader.outcomes == elections and leader.settled and not running.done()
            read = [await reads._consumer.position(p) for p in reads._behaviours.values()]
            assert 0 < sum(read) <= 400 + 4 * 100 < sum(ends.values())

            async with stands().candidate() as newcomer:
                assert isinstance(newcomer, Elections)
                await until(lambda: newcomer.outcomes)  # the one that blocks takes part, or nothing would come of it
                await until(lambda: leader.settled)
                assert newcomer.outcomes == [False] and leader.fence == fence
                made[0].go_on.set()
                await until(lambda: loop.report().accounts["received"] == sum(ends.values()))
            assert leader.settled and not any(rival.outcomes)
        finally:
            stop.set()
            for trainer in made:
                trainer.go_on.set()
            await asyncio.wait_for(running, 60)
