"""Leader election for a role: membership of a Kafka group elects one process, a transactional id fences it.

All candidates subscribe to one single-partition topic in one group; the member that is assigned the partition leads.
It then opens the role's transactional producer. Kafka gives each new one another (producer id, epoch) and refuses
every transaction of those before, so a former leader that was stopped or cut off can write nothing when it comes back.

The pairs have no order over time: the coordinator of a transactional id that expired takes the next one from a block of
its own, which may lie below. What has to be ordered outside Kafka therefore carries a term (`Fence.term`), claimed in a
store between a proof of leadership (`prove`) and a compare-and-swap.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka import errors as kafka_errors
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata

from schemas.errors import Fenced
from schemas.manifests import Fence
from streams.broker.clients import BrokerConfig, broker_errors, make_consumer, make_producer

log = structlog.get_logger()

_RANK = struct.Struct(">qii")
_CLOSE_SECONDS = 5.0


class Leadership:
    """Candidacy of this process for one role. Use `async with leadership.candidate():`."""

    def __init__(
        self,
        broker: BrokerConfig,
        *,
        group: str,
        topic: str,
        transactional_id: str,
        session_timeout_ms: int = 10_000,
        heartbeat_interval_ms: int = 1_000,
    ) -> None:
        self._broker = broker
        self._group = group
        self._topic = topic
        self._transactional_id = transactional_id
        self._timing = {"session_timeout_ms": session_timeout_ms, "heartbeat_interval_ms": heartbeat_interval_ms}
        self._producer: AIOKafkaProducer | None = None
        self._one_transaction = asyncio.Lock()
        self._chosen = asyncio.Event()
        self._settled = False
        self._lost: str | None = None
        self.fence: Fence | None = None
        """Proof of leadership; None while this process waits."""

    @asynccontextmanager
    async def candidate(self) -> AsyncIterator[Leadership]:
        """Be a candidate until the block ends, then leave the group so that another process can take over at once."""
        consumer = make_consumer(
            self._broker,
            group_id=self._group,
            auto_offset_reset="latest",
            partition_assignment_strategy=(_KeepsTheLeader(self),),
            **self._timing,
        )
        consumer.subscribe([self._topic], listener=_Watch(self))
        membership: asyncio.Task[None] | None = None
        try:
            with broker_errors(self._broker):
                await consumer.start()
            membership = asyncio.create_task(self._stay_a_member(consumer))
            yield self
        finally:
            if membership is not None:
                membership.cancel()
                await asyncio.wait([membership])
            await self._close_producer()
            await _bounded(consumer.stop())

    async def elected(self, stop: asyncio.Event) -> bool:
        """Wait until this process leads (True) or `stop` is set (False)."""
        while not stop.is_set():
            waits = [asyncio.ensure_future(self._chosen.wait()), asyncio.ensure_future(stop.wait())]
            _, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in pending:
                wait.cancel()
            if stop.is_set():
                return False
            producer = make_producer(self._broker, transactional_id=self._transactional_id, linger_ms=0)
            with broker_errors(self._broker):
                await producer.start()
            self._producer = producer
            manager = producer._txn_manager
            if self._chosen.is_set():
                self.fence = Fence(producer_id=manager.producer_id, epoch=manager.producer_epoch)
                return True
            await self._close_producer()
        return False

    def confirm(self) -> None:
        """Raise `Fenced` if this process led and does not lead any more. The answer may be outdated at once."""
        if self._lost is not None:
            raise Fenced(f"{self._lost}: another process leads {self._group!r} now; this one released nothing since")

    @property
    def settled(self) -> bool:
        """Whether this process leads and no election is in progress."""
        return self._settled and self.fence is not None and self._lost is None

    def claimed(self, term: int) -> Fence:
        """Carry this term from here on; returns the fence with it."""
        assert self.fence is not None, "not elected"
        self.fence = self.fence.model_copy(update={"term": term})
        return self.fence

    async def prove(self) -> None:
        """Have Kafka confirm that no other process was elected before this call; leaves nothing behind.

        Raises as `transact` does.
        """
        with contextlib.suppress(_Undone):
            await self._transact((), {TopicPartition(self._topic, 0): 0}, undo=True)

    async def transact(
        self,
        records: Sequence[tuple[str, bytes, bytes | None]] = (),
        offsets: Mapping[TopicPartition, int] | None = None,
    ) -> None:
        """Write records (topic, key, value or None) and the group's offsets, all or nothing, as the one leader.

        The offsets go through the transaction because a member may commit only offsets of its own partitions, and
        because a former leader must not move them.

        Raises `Fenced` if another process has taken over, `BrokerUnavailable` if the broker does not answer.
        """
        await self._transact(records, offsets or {}, undo=False)

    async def _transact(
        self, records: Sequence[tuple[str, bytes, bytes | None]], offsets: Mapping[TopicPartition, int], *, undo: bool
    ) -> None:
        async with self._one_transaction:
            self.confirm()
            producer = self._producer
            assert producer is not None, "not elected"
            try:
                with broker_errors(self._broker):
                    async with producer.transaction():
                        sent = [await producer.send(topic, value, key=key) for topic, key, value in records]
                        await asyncio.gather(*sent)
                        if offsets:
                            await producer.send_offsets_to_transaction(dict(offsets), self._group)
                        if undo:
                            raise _Undone
            except Fenced:
                self._lose("Kafka refused this process's transaction")
                self.confirm()

    async def _stay_a_member(self, consumer: AIOKafkaConsumer) -> None:
        # the client leaves the group when it is not polled; the records themselves are not used
        while True:
            try:
                await consumer.getmany(timeout_ms=500)
            except kafka_errors.KafkaError as error:
                log.warning("leadership.trouble", group=self._group, error=repr(error))
                await asyncio.sleep(0.5)

    def _lose(self, why: str) -> None:
        if self._lost is None:
            self._lost = why

    def _assigned(self, given: bool) -> None:
        self._settled = given
        if given:
            self._chosen.set()
        else:
            self._chosen.clear()
            if self.fence is not None:
                self._lose("the group gave the role away")

    def _revoked(self) -> None:
        self._settled = False

    @property
    def _rank(self) -> tuple[int, int, int]:
        """Preference in an election: the holder of the newest term first, then the member chosen before."""
        return (-1 if self.fence is None else self.fence.term, 0, int(self._chosen.is_set()))

    async def _close_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await _bounded(producer.stop())


class _Undone(Exception):
    """Ends a transaction without its effects."""


class _Watch(ConsumerRebalanceListener):  # type: ignore[misc]
    """Forwards the client's callbacks."""

    def __init__(self, leadership: Leadership) -> None:
        self._leadership = leadership

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self._leadership._revoked()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._leadership._assigned(bool(set(assigned)))


class _KeepsTheLeader(AbstractPartitionAssignor):  # type: ignore[misc]
    """Assigns every partition to the member of the highest rank, so that a new member never takes the role over.

    The client's own assignors go by member id, which is random: each start of a standby could replace the leader.
    """

    name = "leader"

    def __init__(self, leadership: Leadership) -> None:
        self._leadership = leadership

    def metadata(self, topics: Iterable[str]) -> Any:
        """Send this member's rank to the group."""
        return ConsumerProtocolMemberMetadata(0, list(topics), _RANK.pack(*self._leadership._rank))

    def assign(self, cluster: Any, members: Mapping[str, Any]) -> dict[str, Any]:
        """Decide for the whole group; every member decides the same."""
        best = max(members, key=lambda member: (_RANK.unpack(members[member].user_data), member))
        topics = sorted({topic for metadata in members.values() for topic in metadata.subscription})
        everything = [(topic, sorted(cluster.partitions_for_topic(topic) or ())) for topic in topics]
        return {
            member: ConsumerProtocolMemberAssignment(0, everything if member == best else [], b"") for member in members
        }

    def on_assignment(self, assignment: Any) -> None:
        """Nothing to remember: the rank is enough."""


async def _bounded(closing: Any) -> None:
    with contextlib.suppress(TimeoutError, kafka_errors.KafkaError):
        await asyncio.wait_for(closing, _CLOSE_SECONDS)
