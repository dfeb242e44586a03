"""Behaviours into the behaviour store: read a batch, write dead letters, write data and position as one, commit.

Kafka's group assigns partitions. Reading starts at the store's own position, because only that is written together with
the data. The group's committed offset serves to show the lag, to notice a store that lost data, and to write the dead
letter of a broken record only once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka import errors as kafka_errors

from schemas.errors import Misconfigured
from streams.broker.clients import BrokerConfig, broker_errors
from streams.broker.cluster import TopicIncarnation
from streams.broker.records import read_batch
from streams.dead_letters.producer import DeadLetters
from streams.recording.config import RecordConfig
from streams.runtime.delivery import Patience, retry_until_available
from streams.stores.histories.packed_history import RecordReport
from streams.stores.histories.store import BehaviourStore

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where to read a partition from."""

    start: int
    lost: int = 0
    """Records that retention deleted before they were recorded."""
    behind_commit: int = 0
    """Records that had been committed and are no longer in the store: it lost them, they are replayed."""


def place(*, stored: int, committed: int | None, beginning: int, end: int) -> Placement:
    """Decide where to read, from the store's position, the group's commit and the log's bounds (end is exclusive).

    Raises `Misconfigured` if the store is ahead of the log.
    """
    if stored > end:
        raise Misconfigured(
            f"the behaviour store stands at offset {stored}, the log ends at {end}: the log lost its end or was "
            "replaced. Run 'mimstream record --rebuild'"
        )
    start = max(stored, beginning)
    return Placement(
        start=start,
        lost=start - stored,
        behind_commit=max(0, (committed or 0) - start),
    )


class Recorder(ConsumerRebalanceListener):  # type: ignore[misc]
    """Reads its partitions of `behaviours` and records them until stopped.

    While the store or the broker is away it tries again; no record is skipped. Newly assigned partitions are paused
    until their position is known.

    `log_replaced`: the topic was deleted and created again since the store was filled. The group's commits may then
    belong to the former topic, and do not say which broken records have a dead letter.
    """

    def __init__(
        self,
        consumer: AIOKafkaConsumer,
        store: BehaviourStore,
        dead_letters: DeadLetters,
        *,
        topic: str,
        broker: BrokerConfig,
        identify: Callable[[], Awaitable[TopicIncarnation]],
        config: RecordConfig,
        clock: Callable[[], float],
        log_replaced: bool = False,
        patience: Patience | None = None,
        on_report: Callable[[RecordReport], None] = lambda report: None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._consumer = consumer
        self._store = store
        self._dead_letters = dead_letters
        self._topic = topic
        self._broker = broker
        self._identify = identify
        self._config = config
        self._clock = clock
        self._log_replaced = log_replaced
        self._patience = patience or Patience()
        self._on_report = on_report
        self._on_ready = on_ready
        self._committed_anew: set[TopicPartition] = set()
        self._unplaced: set[TopicPartition] = set()
        self._positions: dict[TopicPartition, int] = {}
        self._lettered_below: dict[TopicPartition, int] = {}
        self._assigned = False
        self._identified_at = float("-inf")

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Pause the new partitions until `run` has asked the store for their positions."""
        self._positions.clear()
        self._unplaced.clear()
        for partition in assigned:
            self._set_aside(partition)
        self._assigned = True

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Forget the partitions. A batch in progress may still be written: the store refuses it if it is too late."""
        self._positions.clear()
        self._unplaced.clear()

    def _set_aside(self, partition: TopicPartition) -> None:
        self._consumer.pause(partition)
        self._consumer.seek(partition, 0)  # a position, so that the client does not ask for one
        self._positions.pop(partition, None)
        self._unplaced.add(partition)

    async def run(self, stop: asyncio.Event) -> None:
        """Record until `stop` is set; a batch in progress is finished.

        Raises `Misconfigured` if the log was replaced under the store.
        """
        self._consumer.subscribe([self._topic], listener=self)
        ready = False
        while not stop.is_set():
            since = self._clock() - self._identified_at
            if self._unplaced or not 0 <= since <= self._config.identity_check_seconds:  # a clock may be set back
                await retry_until_available(self._place_all, what="record", patience=self._patience)
            if self._assigned and not ready and not self._unplaced:
                ready = True
                self._on_ready()
            written: dict[TopicPartition, int] = {}
            for partition, records in (
                await retry_until_available(self._fetch, what="record.fetch", patience=self._patience)
            ).items():
                if partition not in self._positions:
                    continue  # taken away, or set aside, since it was fetched
                next_offset = await self._record(partition, records)
                if next_offset is not None:
                    written[partition] = next_offset
            if written:
                await self._commit(written)

    async def _fetch(self) -> dict[TopicPartition, list[Any]]:
        try:
            with broker_errors(self._broker):
                found: dict[TopicPartition, list[Any]] = await self._consumer.getmany(
                    timeout_ms=200, max_records=self._config.max_records
                )
        except (kafka_errors.OffsetOutOfRangeError, kafka_errors.NoOffsetForPartitionError) as error:
            log.warning("record.position_lost", error=str(error))
            for partition in self._consumer.assignment():
                self._set_aside(partition)
            return {}
        return found

    async def _place_all(self) -> None:
        await self._store.bind(await self._identify())
        self._identified_at = self._clock()
        waiting = sorted(self._unplaced)
        if not waiting:
            return
        stored = await self._store.positions()
        with broker_errors(self._broker):
            beginnings = await self._consumer.beginning_offsets(waiting)
            ends = await self._consumer.end_offsets(waiting)
            committed = {partition: await self._consumer.committed(partition) for partition in waiting}
        foreign = set(waiting) - self._committed_anew if self._log_replaced else set()
        foreign |= {partition for partition in waiting if (committed[partition] or 0) > ends[partition]}
        committed |= dict.fromkeys(foreign)
        ahead: dict[TopicPartition, int] = {}
        for partition in waiting:
            number, at = partition.partition, stored.get(partition.partition, 0)
            found = place(
                stored=at, committed=committed[partition], beginning=beginnings[partition], end=ends[partition]
            )
            if found.lost:
                # a view of recent takes: an incomplete one is better than none
                report = log.error if at else log.warning
                report("record.log_begins_later", partition=number, stored=at, earliest=found.start, missing=found.lost)
                await self._store.record(number, [], first_offset=at, next_offset=found.start)
            if found.behind_commit:
                log.warning("record.replaying", partition=number, start=found.start, lost_by_store=found.behind_commit)
            if partition not in self._unplaced:
                continue  # taken away meanwhile
            self._consumer.seek(partition, found.start)
            self._consumer.resume(partition)
            self._unplaced.discard(partition)
            self._positions[partition] = found.start
            self._lettered_below[partition] = committed[partition] or 0
            if partition in foreign or found.start > (committed[partition] or 0):
                ahead[partition] = found.start  # killed between write and commit: else the lag shown stays
                self._committed_anew.add(partition)
            log.info("record.placed", partition=number, start=found.start, end=ends[partition])
        await self._commit(ahead)

    async def _record(self, partition: TopicPartition, records: Sequence[Any]) -> int | None:
        """Write a batch and its dead letters. The offset to commit; None if the partition has to be placed anew."""
        started = self._clock()
        first_offset, next_offset = self._positions[partition], int(records[-1].offset) + 1
        events, letters = read_batch(
            records,
            now=datetime.fromtimestamp(started, UTC),
            max_bytes=self._broker.max_record_bytes,
            field_map=self._config.field_map,
        )
        lettered_below = self._lettered_below.get(partition, 0)
        new_letters = [letter for letter in letters if letter.offset >= lettered_below]
        if new_letters:
            await retry_until_available(
                partial(self._dead_letters.publish, new_letters), what="record.bury", patience=self._patience
            )
        report = await retry_until_available(
            partial(
                self._store.record, partition.partition, events, first_offset=first_offset, next_offset=next_offset
            ),
            what="record",
            patience=self._patience,
        )
        if report.resume_from is not None:
            log.warning(
                "record.store_behind", partition=partition.partition, stored=report.resume_from, read=first_offset
            )
            if partition in self._consumer.assignment():
                self._set_aside(partition)
            return None
        report = replace(report, seconds=self._clock() - started)
        if partition in self._positions:
            self._positions[partition] = report.next_offset
        self._on_report(report)
        log.info(
            "behaviours.recorded",
            partition=report.partition,
            takes=report.takes,
            exposures=report.exposures,
            duplicates=report.duplicates,
            broken=report.broken,
            replayed=report.replayed,
            next_offset=report.next_offset,
        )
        return next_offset

    async def _commit(self, offsets: dict[TopicPartition, int]) -> None:
        """Commit to the group. A failure only leaves a stale lag, since the store's position is the one that counts."""
        assigned = self._consumer.assignment()
        own = {partition: offset for partition, offset in offsets.items() if partition in assigned}
        if not own:
            return
        try:
            await self._consumer.commit(own)
        except kafka_errors.KafkaError as error:
            log.warning("record.commit_failed", error=repr(error))
