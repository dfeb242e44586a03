"""The Faust application of the item path without a broker: what Faust is told, and when a worker goes on or ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import errors as kafka_errors
from faust.types import TP

from schemas.errors import BrokerUnavailable, Fenced
from streams.broker.clients import BrokerConfig
from streams.broker.heartbeats import Heartbeats
from streams.broker.topics import TopicsConfig
from streams.indexing import app as index_app
from streams.indexing.app import WrongAssignment, create_index_app, run_app
from streams.indexing.config import IndexConfig
from streams.indexing.flow import Flow
from streams.indexing.take_over import RecentWrites
from streams.runtime.delivery import BackOffConfig, Patience
from tests.factories.item_path import ItemPath, allowed
from tests.factories.waiting import Clock, until

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.timeout(60)]


@pytest.fixture
async def flow() -> Flow:
    return Flow(check_role=allowed)


async def test_faust_is_told_what_keeps_records_from_being_lost_and_what_is_set(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, remembered = Clock(), list[dict[str, Any]]()

    def recent_writes(**given: Any) -> RecentWrites:
        remembered.append(given)
        return RecentWrites(**given)

    monkeypatch.setattr(index_app, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(index_app, "RecentWrites", recent_writes)
    config = IndexConfig(
        session_timeout_seconds=100, commit_interval_seconds=3, topic_check_seconds=7, batch_max_items=5
    )
    broker = BrokerConfig(bootstrap_servers="one:1,two:2", client_id="me", max_record_bytes=3_000_000)
    ready_calls: list[bool] = []
    app = create_index_app(
        ItemPath(config).context,
        flow,
        broker=broker,
        topics=TopicsConfig(prefix="shop."),
        instance_id="index-3",
        folder=tmp_path,
        on_report=lambda report: None,
        on_ready=lambda: ready_calls.append(True),
    )
    conf: Any = app.conf
    assert conf.id == TopicsConfig(prefix="shop.").group("index") and conf.consumer_group_instance_id == "index-3"
    assert [str(url) for url in conf.broker] == ["kafka://one:1", "kafka://two:2"] and conf.broker_client_id == "me"
    assert (conf.consumer_auto_offset_reset, conf.key_serializer, conf.value_serializer) == ("earliest", "raw", "raw")
    assert (conf.broker_session_timeout, conf.broker_heartbeat_interval, conf.broker_request_timeout) == (100, 10, 110)
    assert (conf.broker_commit_interval, conf.consumer_metadata_max_age_ms) == (3, 7_000)
    assert (conf.broker_max_poll_records, conf.stream_buffer_maxsize) == (5, 10)
    assert conf.consumer_max_fetch_size > broker.max_record_bytes
    assert conf.broker_max_poll_interval >= 86_400 and conf.table_standby_replicas > 0
    assert not (conf.topic_allow_declare or conf.stream_wait_empty or conf.web_enabled)
    assert conf.topic_disable_leader and conf.datadir == tmp_path
    consumer: Any = app.consumer
    assert isinstance(consumer, index_app._CommittedConsumer)
    worker = consumer._thread._create_worker_consumer(app.transport)
    worker._closed = True  # it was never started
    assert worker._isolation_level == "read_committed"
    assert sorted(topic for agent in app.agents.values() for topic in agent.channel.topics) == [
        "shop.behaviours", "shop.items", "shop.items-retry",
    ]  # fmt: skip
    group = Group(flow)
    group.sizes = {"shop.items": 4, "shop.items-retry": 4}
    consumer._thread._consumer = group.app.consumer._thread._consumer
    await app.on_partitions_assigned.send({TP("shop.items", 0), TP("shop.items-retry", 0)})
    clock.now = config.silence_seconds
    await flow.guard()()
    clock.now += 0.1  # a write that begins now may end after the session
    with pytest.raises(BrokerUnavailable):
        await flow.guard()()
    (given,) = remembered
    assert (given["window_seconds"], given["max_taken_over"]) == (config.recheck_seconds, config.held_records)
    await app.on_partitions_revoked.send(set())
    assert (ready_calls, flow.epoch) == ([True], 1)
    consumer._thread.thread_loop.close()


def test_the_newest_acknowledged_record_is_the_one_to_commit_whatever_offsets_lie_before_it() -> None:
    consumer = index_app._CommittedConsumer.__new__(index_app._CommittedConsumer)
    one, other = TP("items", 0), TP("items", 1)
    consumer._acked = {one: [0, 9, 5], other: []}
    consumer._acked_index = {one: {0, 9, 5}, other: set()}
    assert (consumer._new_offset(one), consumer._new_offset(one), consumer._new_offset(other)) == (10, None, None)
    assert consumer._acked_index[one] == set()


# ---- assignments -----------------------------------------------------------------------------------------------------


class Group:
    """What the group gives to a worker, and how many partitions the topics have."""

    def __init__(self, flow: Flow) -> None:
        self.flow, self.ready, self.clock = flow, 0, Clock()
        self.sizes = {"mim.items": 4, "mim.items-retry": 4}
        cluster = SimpleNamespace(partitions_for_topic=lambda topic: set(range(self.sizes[topic])) or None)
        self.coordinator = SimpleNamespace(_do_heartbeat=self.beat)
        driver = SimpleNamespace(_coordinator=self.coordinator, _client=SimpleNamespace(cluster=cluster))
        self.app: Any = SimpleNamespace(
            consumer=SimpleNamespace(_thread=SimpleNamespace(_consumer=driver)), consumer_generation_id=7
        )
        self.recent = RecentWrites(window_seconds=1, max_records=9, max_taken_over=9, clock=self.clock)
        self.writing = asyncio.Lock()
        self.heartbeats = Heartbeats(self.clock)
        self.assignment = index_app._Assignment(
            self.app, TopicsConfig(), flow, self.writing, self.heartbeats, self.recent, self.on_ready
        )

    async def beat(self) -> bool:
        return True

    def on_ready(self) -> None:
        self.ready += 1

    async def assign(self, items: list[int], retries: list[int]) -> None:
        given = {TP("mim.items", one) for one in items} | {TP("mim.items-retry", one) for one in retries}
        await self.assignment.on_assigned(self.app, given)

    def is_current(self, generation: int) -> bool:
        event: Any = SimpleNamespace(message=SimpleNamespace(generation_id=generation))
        return self.assignment.is_current(event)


@pytest.fixture
def group(flow: Flow) -> Group:
    return Group(flow)


async def test_only_what_was_read_under_the_present_assignment_counts(group: Group) -> None:
    await group.assign([0, 2], [2, 0])
    assert (group.ready, group.is_current(7), group.is_current(6)) == (1, True, False)
    epoch = group.flow.epoch
    await group.assignment.on_revoked(group.app, set())
    assert group.flow.epoch == epoch + 1
    assert not group.is_current(7)  # until the next assignment the generation is still that of the old one
    group.app.consumer_generation_id = 8
    await group.assign([0], [0])
    assert (group.ready, group.is_current(7), group.is_current(8)) == (2, False, True)
    assert group.assignment.partitions == {"items": 4, "items-retry": 4}


async def test_from_an_assignment_on_writes_are_remembered_and_count_as_after_a_take_over(group: Group) -> None:
    path = ItemPath()
    group.recent.add([path.publish("before any", title="x")])
    await group.assign([0], [0])
    group.recent.add([path.publish("a", title="x")])
    group.clock.now = 5
    await group.assign([0], [0])
    assert [(write.record.key, write.is_after_take_over) for write in group.recent.pop_due()] == [(b"a", True)]


async def test_with_an_assignment_heartbeats_are_counted(group: Group) -> None:
    await group.assign([0], [0])
    group.clock.now = 60
    with pytest.raises(BrokerUnavailable):
        await group.heartbeats.assert_within(18)


@pytest.mark.parametrize(
    ("items", "retries", "sizes"), [([0, 1], [0], (4, 4)), ([0], [0], (4, 3)), ([0], [1], (4, 4)), ([0], [0], (0, 4))]
)
async def test_partitions_that_do_not_go_together_end_the_worker(
    group: Group, items: list[int], retries: list[int], sizes: tuple[int, int]
) -> None:
    group.sizes = {"mim.items": sizes[0], "mim.items-retry": sizes[1]}
    await group.assign(items, retries)
    assert group.ready == 0 and isinstance(group.flow.failed.exception(), WrongAssignment)


async def test_a_rebalance_waits_for_a_write_under_way_and_not_for_ever(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    await group.writing.acquire()
    revoking = asyncio.create_task(group.assignment.on_revoked(group.app, set()))
    await asyncio.sleep(0.02)
    assert not revoking.done() and not group.is_current(7)
    group.writing.release()
    await asyncio.wait_for(revoking, 1)
    assert not group.writing.locked()  # the next write may begin
    await group.writing.acquire()
    monkeypatch.setattr(index_app, "REVOKE_PATIENCE_SECONDS", 0.02)
    await asyncio.wait_for(group.assignment.on_revoked(group.app, set()), 1)
    assert group.writing.locked()


# ---- running ---------------------------------------------------------------------------------------------------------


class FakeApp:
    """An application that starts, gives up when `give_up` is set, and stops."""

    def __init__(self, at_start: Exception | None = None) -> None:
        self.at_start, self.give_up = at_start, asyncio.Event()
        self.steps: list[str] = []
        self.crash_reason: BaseException | None = None

    async def start(self) -> None:
        self.steps.append("start")
        if self.at_start is not None:
            raise self.at_start

    async def wait_until_stopped(self) -> None:
        await self.give_up.wait()

    async def crash(self, error: BaseException) -> None:
        self.crash_reason = error

    async def stop(self) -> None:
        self.steps.append("stop")


class Run:
    """`run_app` over applications of the test's."""

    def __init__(self, flow: Flow, *apps: FakeApp, drain_seconds: float = 5) -> None:
        self.flow, self.left, self.made = flow, list(apps), list[FakeApp]()
        self.stop = asyncio.Event()
        config = BackOffConfig(initial_seconds=0.01, jitter=0)
        self.task = asyncio.create_task(
            run_app(
                self.make, flow, self.stop, drain_seconds=drain_seconds, patience=Patience(config, draw=lambda: 0.0)
            )
        )

    def make(self) -> Any:
        self.made.append(self.left.pop(0))
        return self.made[-1]

    async def started(self, count: int) -> None:
        await until(lambda: len(self.made) == count and self.made[-1].steps, seconds=10, every=0.005)


@pytest.mark.parametrize("error", [None, kafka_errors.KafkaConnectionError("away"), OSError("no route")])
async def test_another_application_takes_over_where_one_gave_up_and_reads_in_another_epoch(
    flow: Flow, error: Exception | None
) -> None:
    first = FakeApp(error)
    run = Run(flow, first, FakeApp())
    if error is None:
        await run.started(1)
        first.give_up.set()
    await run.started(2)
    assert (first.steps, flow.epoch, first.crash_reason) == (["start", "stop"], 1, error)
    run.stop.set()
    await asyncio.wait_for(run.task, 5)
    assert run.made[1].steps == ["start", "stop"] and flow.epoch == 1


async def test_a_stop_waits_for_what_is_in_hand_before_the_application_ends(flow: Flow) -> None:
    run, done = Run(flow, FakeApp()), asyncio.Event()

    async def work() -> None:
        async with flow.hand():
            await done.wait()
            run.made[0].steps.append("written")

    await run.started(1)
    working = asyncio.create_task(work())
    await asyncio.sleep(0)
    run.stop.set()
    await asyncio.sleep(0.05)
    assert run.made[0].steps == ["start"]
    done.set()
    await asyncio.wait_for(asyncio.gather(run.task, working), 5)
    assert run.made[0].steps == ["start", "written", "stop"]


async def test_a_stop_does_not_wait_longer_than_is_set(flow: Flow) -> None:
    run = Run(flow, FakeApp(), drain_seconds=0.05)

    async def work() -> None:
        async with flow.hand():
            await asyncio.Event().wait()

    await run.started(1)
    working = asyncio.create_task(work())
    await asyncio.sleep(0)
    run.stop.set()
    await asyncio.wait_for(run.task, 5)
    assert run.made[0].steps == ["start", "stop"]
    working.cancel()


@pytest.mark.parametrize("while_stopping", [False, True])
async def test_what_the_agents_cannot_go_on_from_ends_the_process_after_the_application(
    flow: Flow, while_stopping: bool
) -> None:
    run = Run(flow, FakeApp())
    await run.started(1)
    if while_stopping:
        run.stop.set()
    flow.fail(Fenced("slot taken"))
    with pytest.raises(Fenced, match="slot taken"):
        await asyncio.wait_for(run.task, 5)
    assert run.made[0].steps == ["start", "stop"]


async def test_a_worker_that_is_told_to_stop_while_the_broker_is_away_ends_at_once(flow: Flow) -> None:
    class NeverBack(BackOffConfig):
        def wait_seconds(self, attempt: int, draw: float) -> float:
            return 3_600.0

    stop, made = asyncio.Event(), list[FakeApp]()

    def make() -> Any:
        made.append(FakeApp(OSError("no route")))
        return made[-1]

    running = asyncio.create_task(
        run_app(make, flow, stop, drain_seconds=1, patience=Patience(NeverBack(), draw=lambda: 0.0))
    )
    await until(lambda: made and "stop" in made[0].steps, seconds=10, every=0.005)
    stop.set()
    await asyncio.wait_for(running, 5)
    assert len(made) == 1


@pytest.mark.parametrize("ending", ["never", "with an error"])
async def test_an_application_that_does_not_end_well_does_not_hold_the_worker(
    flow: Flow, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(index_app, "STOP_PATIENCE_SECONDS", 0.02)

    async def stop() -> None:
        if ending == "never":
            await asyncio.Event().wait()
        raise ConnectionResetError("gone")

    app = FakeApp()
    app.stop = stop  # type: ignore[method-assign]
    run = Run(flow, app)
    await run.started(1)
    run.stop.set()
    await asyncio.wait_for(run.task, 5)


async def test_waits_grow_while_the_broker_stays_away_and_begin_anew_after_half_a_minute(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []
    clock = {"now": 0.0}

    class Noted(BackOffConfig):
        def wait_seconds(self, attempt: int, draw: float) -> float:
            attempts.append(attempt)
            return 0.0

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "time", real_plus(loop.time, clock))
    lasts, stop = [0.0, 0.0, 31.0, 0.0], asyncio.Event()

    class Lasting(FakeApp):
        async def start(self) -> None:
            clock["now"] += lasts[len(attempts)]
            raise OSError("no route")

    def make() -> Any:
        if len(attempts) == len(lasts):
            stop.set()
            return FakeApp()
        return Lasting()

    await asyncio.wait_for(
        run_app(make, flow, stop, drain_seconds=1, patience=Patience(Noted(), draw=lambda: 0.0)), 100
    )
    assert attempts == [1, 2, 1, 2]


def real_plus(real: Callable[[], float], clock: dict[str, float]) -> Callable[[], float]:
    return lambda: real() + clock["now"]
