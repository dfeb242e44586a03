"""The one leader: who is elected, what its transactions hold, and what ends them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors

from schemas.errors import BrokerUnavailable, Fenced
from schemas.manifests import Fence
from streams.broker import leadership as module
from streams.broker.clients import BrokerConfig
from streams.broker.leadership import Leadership, _KeepsTheLeader, _Watch

PARTITION = TopicPartition("models", 0)


class Producer:
    """A transactional producer: what was committed, and what was undone."""

    def __init__(self, number: int) -> None:
        self._txn_manager = SimpleNamespace(producer_id=number, producer_epoch=number + 1)
        self.committed: list[Any] = []
        self.undone: list[Any] = []
        self.failure: Exception | None = None
        self.stopped = False
        self.on_start: Any = lambda: None

    async def start(self) -> None:
        self.on_start()

    async def stop(self) -> None:
        self.stopped = True

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        self.open: list[Any] = []
        try:
            yield
        except BaseException:
            self.undone.append(self.open)
            raise
        self.committed.append(self.open)

    async def send(self, topic: str, value: bytes, *, key: bytes) -> asyncio.Future[None]:
        place = self.open

        async def confirmed() -> None:
            await asyncio.sleep(0)
            if self.failure is not None:
                raise self.failure
            place.append((topic, key, value))

        return asyncio.ensure_future(confirmed())

    async def send_offsets_to_transaction(self, offsets: Any, group: str) -> None:
        if self.failure is not None:
            raise self.failure
        self.open.append((group, offsets))


class Scene:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.producers: list[Producer] = []
        self.on_start: Any = lambda: None
        self.options: Any = None
        monkeypatch.setattr(module, "make_producer", self.make_producer)
        self.leads = Leadership(BrokerConfig(), group="g", topic="models", transactional_id="t")
        self.watch = _Watch(self.leads)
        self.stop = asyncio.Event()

    def make_producer(self, _: Any, **options: Any) -> Producer:
        self.options = options
        made = Producer(len(self.producers) + 1)
        made.on_start = self.on_start
        self.producers.append(made)
        return made

    async def elect(self) -> bool:
        self.watch.on_partitions_assigned([PARTITION])
        return await asyncio.wait_for(self.leads.elected(self.stop), 5)


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


async def test_a_process_leads_once_the_partition_is_its_own_with_the_fence_that_kafka_gave(scene: Scene) -> None:
    waiting = asyncio.create_task(scene.leads.elected(scene.stop))
    scene.watch.on_partitions_assigned([])
    await asyncio.sleep(0)
    assert not waiting.done() and not scene.leads.settled and scene.leads.fence is None
    scene.watch.on_partitions_assigned([PARTITION])
    assert await waiting and scene.options["transactional_id"] == "t"
    assert scene.leads.fence == Fence(producer_id=1, epoch=2) and scene.leads.settled
    assert scene.leads.claimed(7) == Fence(producer_id=1, epoch=2, term=7) == scene.leads.fence


async def test_a_process_that_is_stopped_while_it_waits_does_not_lead(scene: Scene) -> None:
    waiting = asyncio.create_task(scene.leads.elected(scene.stop))
    await asyncio.sleep(0)
    scene.stop.set()
    assert not await waiting and scene.producers == []
    assert not await scene.leads.elected(scene.stop)


async def test_a_role_that_is_given_away_while_its_producer_starts_is_waited_for_again(scene: Scene) -> None:
    scene.on_start = lambda: scene.watch.on_partitions_assigned([])
    waiting = asyncio.create_task(scene.elect())
    async with asyncio.timeout(5):
        while not scene.producers or not scene.producers[0].stopped:
            await asyncio.sleep(0)
    assert scene.leads.fence is None
    scene.leads.confirm()  # it never led
    scene.on_start = lambda: None
    scene.watch.on_partitions_assigned([PARTITION])
    assert await waiting and scene.leads.fence == Fence(producer_id=2, epoch=3)


async def test_an_election_unsettles_and_a_role_that_another_has_is_lost_for_good(scene: Scene) -> None:
    await scene.elect()
    scene.watch.on_partitions_revoked([PARTITION])
    assert not scene.leads.settled
    scene.leads.confirm()
    scene.watch.on_partitions_assigned([PARTITION])
    assert scene.leads.settled
    scene.watch.on_partitions_assigned([])
    for _ in range(2):
        assert not scene.leads.settled
        with pytest.raises(Fenced, match="gave the role away: another process leads 'g'"):
            scene.leads.confirm()
        scene.watch.on_partitions_assigned([PARTITION])
    with pytest.raises(Fenced):
        await scene.leads.transact([("models", b"k", b"v")])
    assert scene.producers[0].committed == []


async def test_a_transaction_holds_its_records_and_the_groups_offsets_and_only_one_is_open_at_a_time(
    scene: Scene,
) -> None:
    await scene.elect()
    records = [("models", b"a", b"1"), ("models", b"b", b"2")]
    await asyncio.gather(scene.leads.transact(records, {PARTITION: 7}), scene.leads.transact(records[:1]))
    assert scene.producers[0].committed == [[*records, ("g", {PARTITION: 7})], records[:1]]


async def test_a_proof_asks_kafka_and_leaves_nothing_behind(scene: Scene) -> None:
    await scene.elect()
    await scene.leads.prove()
    (producer,) = scene.producers
    assert producer.committed == [] and producer.undone == [[("g", {PARTITION: 0})]]
    producer.failure = kafka_errors.ProducerFenced()
    with pytest.raises(Fenced, match="Kafka refused this process's transaction"):
        await scene.leads.prove()
    producer.failure = None
    with pytest.raises(Fenced):  # whatever Kafka says later
        await scene.leads.transact([("models", b"k", b"v")])
    assert not scene.leads.settled


async def test_a_broker_that_is_away_ends_no_leadership(scene: Scene) -> None:
    await scene.elect()
    scene.producers[0].failure = kafka_errors.KafkaConnectionError("away")
    with pytest.raises(BrokerUnavailable):
        await scene.leads.transact([("models", b"k", b"v")])
    scene.producers[0].failure = None
    await scene.leads.transact([("models", b"k", b"v")])
    assert scene.leads.settled and scene.producers[0].committed == [[("models", b"k", b"v")]]


async def test_a_candidate_joins_the_group_and_leaves_it_with_its_producer(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls: list[int] = []
    seen: dict[str, Any] = {}

    class Consumer:
        def subscribe(self, topics: list[str], listener: Any) -> None:
            seen["topics"], seen["listener"] = topics, listener

        async def start(self) -> None:
            seen["listener"].on_partitions_assigned([PARTITION])

        async def stop(self) -> None:
            seen["stopped"] = len(polls)

        async def getmany(self, *, timeout_ms: int) -> None:
            polls.append(timeout_ms)
            await asyncio.sleep(0)

    def make_consumer(_: Any, **options: Any) -> Consumer:
        seen.update(options)
        return Consumer()

    monkeypatch.setattr(module, "make_consumer", make_consumer)
    async with scene.leads.candidate() as leads:
        assert await leads.elected(scene.stop)
        await asyncio.sleep(0)
        assert polls
    assert (seen["group_id"], seen["topics"], scene.producers[0].stopped) == ("g", ["models"], True)
    assert seen["session_timeout_ms"] == 10_000 and seen["heartbeat_interval_ms"] == 1_000 and "stopped" in seen
    count = len(polls)
    await asyncio.sleep(0)
    assert len(polls) == count


async def test_a_group_that_cannot_be_joined_is_left_and_one_in_trouble_is_not(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[Exception] = [kafka_errors.KafkaConnectionError("away")]
    stopped: list[int] = []
    polls: list[int] = []

    class Consumer:
        def subscribe(self, topics: list[str], listener: Any) -> None: ...

        async def start(self) -> None:
            if failures:
                raise failures.pop()

        async def stop(self) -> None:
            stopped.append(len(polls))
            raise kafka_errors.KafkaConnectionError("away")

        async def getmany(self, *, timeout_ms: int) -> None:
            polls.append(timeout_ms)
            if len(polls) == 1:
                raise kafka_errors.CorruptRecordException("x")
            await asyncio.sleep(60)

    async def no_pause(seconds: float, sleep: Any = asyncio.sleep) -> None:
        await sleep(0 if seconds < 1 else seconds)

    monkeypatch.setattr(module, "make_consumer", lambda *_, **__: Consumer())
    with pytest.raises(BrokerUnavailable):
        async with scene.leads.candidate():
            raise AssertionError("it is no member")
    assert stopped == [0]
    monkeypatch.setattr("streams.broker.leadership.asyncio.sleep", no_pause)
    async with scene.leads.candidate():
        async with asyncio.timeout(5):
            while len(polls) < 2:
                await asyncio.sleep(0)
    assert stopped == [0, 2]


@pytest.mark.parametrize("order", ["abc", "cba"])
def test_of_equal_members_every_one_chooses_the_same_and_it_gets_every_partition(order: str) -> None:
    leads = Leadership(BrokerConfig(), group="g", topic="models", transactional_id="t")
    own, cluster = _KeepsTheLeader(leads), SimpleNamespace(partitions_for_topic={"models": {1, 0}, "x": None}.get)
    assigned = own.assign(cluster, {name: own.metadata(["x", "models"]) for name in order})
    assert {name: one.assignment for name, one in assigned.items() if one.assignment} == {
        "c": [("models", [0, 1]), ("x", [])]
    }


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_before_any_term_the_member_that_was_chosen_keeps_the_role(names: str) -> None:
    def metadata(chosen: bool) -> Any:
        leads = Leadership(BrokerConfig(), group="g", topic="models", transactional_id="t")
        if chosen:
            _Watch(leads).on_partitions_assigned([PARTITION])
        return _KeepsTheLeader(leads).metadata(["models"])

    members = dict(zip(names, (metadata(True), metadata(False)), strict=True))
    cluster = SimpleNamespace(partitions_for_topic=lambda topic: {0})
    own = _KeepsTheLeader(Leadership(BrokerConfig(), group="g", topic="models", transactional_id="t"))
    assigned = own.assign(cluster, members)
    assert {name: one.assignment for name, one in assigned.items()} == {names[0]: [("models", [0])], names[1]: []}
