"""What the trainer reads: all partitions of `embeddings` and `behaviours`, fetched, decoded and aligned.

No consumer group hands out the data and nothing is committed here: a trainer reads everything, from the beginning or
from where a checkpoint was taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors

from schemas.base import decode, produced_at
from schemas.errors import BadMessage, Misconfigured, Unavailable
from schemas.field_maps import FieldMap
from schemas.items import ItemEmbedding, parse_embedding_key
from schemas.queries import QueryEmbedding
from streams.broker.clients import BrokerConfig, broker_errors, make_consumer
from streams.broker.cluster import TRAINING_TOPICS, ClusterTopics, describe_topics
from streams.broker.records import behaviour_of
from streams.broker.topics import TopicName, TopicsConfig
from streams.stores.vectors.item_index import UNIT_TOLERANCE
from streams.training.open_transactions import OpenTransactions
from trainer.samples.partition_merge import Entry, PartitionMerge

log = structlog.get_logger()

_FAR = 1 << 62


@dataclass(frozen=True, slots=True)
class EmbeddingRecord:
    """One readable record of `embeddings` or `queries`; a query is named as `query_item` does.

    `embedding` is None for a tombstone, and for a query that cannot be encoded.
    """

    item_id: str
    embedding: ItemEmbedding | QueryEmbedding | None


class TrainingInput:
    """Both topics as the trainer reads them. `bounded` stops at the ends of the topics as they are at `open`, or of
    `behaviours` at `end_at` if that comes first.

    `start_at` says where to begin, per topic (without prefix) and partition; by default at the beginning. The consumer
    group's own offsets play no part. What was deleted of it since is an error unless `lost_is_fatal` says otherwise.

    `encoder_version` selects the embeddings; None selects that of the first one read. Behaviours are validated as of
    the moment they were produced, so that reading the log again next year has the same results.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        topics: TopicsConfig,
        *,
        field_map: FieldMap,
        encoder_version: str | None,
        fetch_max_records: int,
        buffered_records: int,
        idle_seconds: float,
        all_idle_seconds: float,
        open_transaction_seconds: float,
        bounded: bool,
        start_at: Mapping[str, Mapping[int, int]] | None = None,
        end_at: Mapping[int, int] | None = None,
        lost_is_fatal: bool = True,
        clock: Callable[[], float],
    ) -> None:
        self._broker = broker
        self._topics = topics
        self._field_map = field_map
        self._fetch_max_records = fetch_max_records
        self._buffered_records = buffered_records
        self._idle_seconds = idle_seconds
        self._all_idle_seconds = max(idle_seconds, all_idle_seconds)
        self.transactions = OpenTransactions(patience_seconds=open_transaction_seconds, clock=clock)
        """Where partitions of `behaviours` end while producers' transactions are open."""
        self.bounded = bounded
        """Whether reading ends with what the topics hold at `open`."""
        self._start_at = start_at or {}
        self._end_at = end_at or {}
        self._lost_is_fatal = lost_is_fatal
        self._clock = clock
        self._fetched: list[EmbeddingRecord] = []
        self._idle: set[int] = set()
        self.encoder_version = encoder_version
        self.broken_vectors = self.other_encoders = 0

    async def open(self) -> None:
        """Connect and seek to where reading begins.

        Raises `Misconfigured` if the log does not hold what comes next any more, or not yet.
        """
        found = await asyncio.to_thread(describe_topics, self._broker, self._topics, TRAINING_TOPICS)
        self._embeddings = self._numbered("embeddings", found)
        self._behaviours = self._numbered("behaviours", found)
        everything = [*self._embeddings.values(), *self._behaviours.values()]
        self._consumer = make_consumer(self._broker)
        with broker_errors(self._broker):
            await self._consumer.start()
            self._consumer.assign(everything)
            beginnings = await self._consumer.beginning_offsets(everything)
            self._ends = await self._consumer.end_offsets(everything)
        starts = self._starts(beginnings)
        for number, partition in self._behaviours.items():
            self._ends[partition] = max(starts[partition], min(self._ends[partition], self._end_at.get(number, _FAR)))
        for partition, offset in starts.items():
            self._consumer.seek(partition, offset)
        self.starts = {number: starts[partition] for number, partition in self._behaviours.items()}
        """Offset of each partition of `behaviours` at which reading began."""
        self.beginnings = {number: int(beginnings[partition]) for number, partition in self._behaviours.items()}
        """First offset there is of each partition of `behaviours`."""
        self.embedding_offsets = {number: starts[p] for number, p in self._embeddings.items()}
        """Next offset to read of each partition of `embeddings`."""
        room = max(100, self._buffered_records // len(self._behaviours))
        self._reading = PartitionMerge(self._behaviours, room_per_partition=room, silence_seconds=self._idle_seconds)
        self._active_at = dict.fromkeys(self._behaviours, self._clock())

    def _starts(self, beginnings: Mapping[TopicPartition, int]) -> dict[TopicPartition, int]:
        starts = {}
        for name, numbered in (("embeddings", self._embeddings), ("behaviours", self._behaviours)):
            wished = self._start_at.get(name, {})
            for number, partition in numbered.items():
                first, end = int(beginnings[partition]), int(self._ends[partition])
                start = wished.get(number, first)
                if start < first and name == "behaviours" and self._lost_is_fatal:
                    raise Misconfigured(
                        f"partition {number} of {partition.topic!r} begins at offset {first} now, and reading has to "
                        f"go on at {start}: the events between are gone, by retention or by hand. Restore the topic, "
                        "or train anew with an empty MIM_TRAIN__SNAPSHOT_FOLDER; and raise "
                        "MIM_TOPICS__BEHAVIOURS_RETENTION_DAYS"
                    )
                if start > end:
                    raise Misconfigured(
                        f"partition {number} of {partition.topic!r} ends at offset {end}, and reading has to go on at "
                        f"{start}: the topic has lost its end, or is another one. Restore it, or train anew with an "
                        "empty MIM_TRAIN__SNAPSHOT_FOLDER"
                    )
                starts[partition] = max(start, first)  # a compacted topic holds its newest state all the same
        return starts

    async def close(self) -> None:
        """Disconnect."""
        if hasattr(self, "_consumer"):
            await self._consumer.stop()

    def _numbered(self, name: TopicName, found: ClusterTopics) -> dict[int, TopicPartition]:
        return {number: TopicPartition(self._topics.full_name(name), number) for number in found.partitions[name]}

    @property
    def partitions(self) -> list[int]:
        """Partitions of `behaviours`."""
        return list(self._behaviours)

    # ---- fetching ------------------------------------------------------------------------------------------------

    async def fetch(self, *, embeddings: bool, behaviours: bool, wait_seconds: float) -> None:
        """Fetch what there is and there is room for, waiting up to `wait_seconds` for it.

        Raises `Misconfigured` if the log no longer holds what would come next.
        """
        wanted = list(self._embeddings.values()) if embeddings else []
        if behaviours:
            wanted += [self._behaviours[number] for number in self._reading.with_room()]
        if not wanted:
            await asyncio.sleep(wait_seconds)
            return
        try:
            with broker_errors(self._broker):
                self._take(
                    await self._consumer.getmany(
                        *wanted, timeout_ms=int(wait_seconds * 1000), max_records=self._fetch_max_records
                    )
                )
                for number, partition in self._embeddings.items():
                    self.embedding_offsets[number] = await self._position(partition)
                if behaviours:
                    await self._mark_exhausted()
        except kafka_errors.OffsetOutOfRangeError as error:
            raise Misconfigured(
                f"the log was cut off or replaced under the trainer ({error}); start it again, and if it was retention "
                "raise MIM_TOPICS__BEHAVIOURS_RETENTION_DAYS"
            ) from None
        except Unavailable as error:
            log.warning("train.broker_away", error=str(error))
            await asyncio.sleep(0.5)

    def _take(self, found: Mapping[TopicPartition, Sequence[Any]]) -> None:
        for partition, records in found.items():
            within = self._within_ends(partition, records)
            if self._embeddings.get(partition.partition) == partition:
                self._add_embeddings(within)
            else:
                self._reading.add(partition.partition, [self._entry(record) for record in within])

    def _within_ends(self, partition: TopicPartition, records: Sequence[Any]) -> Iterable[Any]:
        if not self.bounded:
            return records
        return [record for record in records if record.offset < self._ends[partition]]

    async def _position(self, partition: TopicPartition) -> int:
        position = int(await self._consumer.position(partition))
        return min(position, self._ends[partition]) if self.bounded else position

    async def _mark_exhausted(self) -> None:
        exhausted = {}
        for number, partition in self._behaviours.items():
            end = self._ends[partition] if self.bounded else self._end_with_open(number, partition)
            if end is not None and await self._position(partition) >= end:
                exhausted[number] = self._polled_at(partition)
        self._reading.set_exhausted(exhausted)

    def _polled_at(self, partition: TopicPartition) -> float:
        """When the broker last answered for this partition; one that is away says nothing about silence."""
        if self.bounded:
            return float("inf")
        polled_ms = self._consumer.last_poll_timestamp(partition)
        return float("-inf") if polled_ms is None else polled_ms / 1000

    def _end_with_open(self, number: int, partition: TopicPartition) -> int | None:
        return self.transactions.end(
            number, stable=self._consumer.last_stable_offset(partition), high=self._consumer.highwater(partition)
        )

    def _end_as_polled(self, partition: TopicPartition) -> int | None:
        """Where readable records ended in the broker's last answer; those of an open transaction lie beyond."""
        stable = self._consumer.last_stable_offset(partition)
        end = stable if stable is not None and stable >= 0 else self._consumer.highwater(partition)
        return None if end is None else int(end)

    # ---- vectors -------------------------------------------------------------------------------------------------

    @property
    def has_embeddings(self) -> bool:
        """Whether embeddings were fetched that `next_embeddings` has not returned."""
        return bool(self._fetched)

    def next_embeddings(self) -> list[EmbeddingRecord]:
        """The embeddings and tombstones that were fetched since the last call, oldest first."""
        fetched, self._fetched = self._fetched, []
        return fetched

    async def all_embeddings_at_start_read(self) -> bool:
        """Whether everything was fetched that `embeddings` held at `open`."""
        return all([await self._position(p) >= self._ends[p] for p in self._embeddings.values()])

    @property
    def embeddings_are_current(self) -> bool:
        """Whether `next_embeddings` has returned every embedding that the broker has."""
        return not self._fetched and all(
            (end := self._end_as_polled(partition)) is not None and self.embedding_offsets[number] >= end
            for number, partition in self._embeddings.items()
        )

    def _add_embeddings(self, records: Iterable[Any]) -> None:
        for record in records:
            try:
                version, item_id = parse_embedding_key(record.key)
                if self.encoder_version is None and record.value is not None:
                    self._embedding(record, version, item_id)  # a broken record names no encoder
                    self.encoder_version = version
                if version != self.encoder_version:
                    self.other_encoders += 1
                    if self.other_encoders == 1:
                        log.warning("train.other_encoder_ignored", ignored=version, used=self.encoder_version)
                    continue
                self._fetched.append(EmbeddingRecord(item_id, self._embedding(record, version, item_id)))
            except (ValueError, BadMessage) as error:
                self.broken_vectors += 1
                log.warning("train.broken_vector", partition=record.partition, offset=record.offset, error=str(error))

    def _embedding(self, record: Any, version: str, item_id: str) -> ItemEmbedding | None:
        if record.value is None:
            return None
        now = produced_at(record.timestamp)
        embedding = decode(ItemEmbedding, record.value, now=now, max_bytes=self._broker.max_record_bytes)
        if (embedding.encoder_version, embedding.item_id) != (version, item_id):
            raise ValueError(f"key {record.key!r} does not belong to item {embedding.item_id!r}")
        length = np.linalg.norm(np.frombuffer(embedding.vector, "<f4").astype(np.float64))
        if not abs(length - 1.0) <= UNIT_TOLERANCE:  # also true for NaN
            raise ValueError(f"vector of item {item_id!r} has the length {length}, not 1")
        return embedding

    # ---- behaviours ----------------------------------------------------------------------------------------------

    def next_behaviours(self, most: int, *, only: Collection[int] | None = None) -> list[Entry]:
        """Up to `most` behaviours that follow the last ones, aligned by event time; `only` of some partitions."""
        entries = self._reading.pop(most, only=only)
        now = self._clock()
        for partition in {entry.partition for entry in entries}:
            self._active_at[partition] = now
            self._idle.discard(partition)
        return entries

    def newly_idle(self, *, except_for: Iterable[int] = ()) -> list[int]:
        """Partitions with nothing more to read for a while (a bounded run: ever), each once until it has new events.

        Without any other the allowed lateness ends, so the partition that was read last waits `all_idle_seconds`.
        """
        candidates = set(self._reading.empty_and_exhausted()) - self._idle - set(except_for)
        silent = {number: self._polled_at(self._behaviours[number]) - self._active_at[number] for number in candidates}
        idle = sorted(number for number in candidates if silent[number] >= self._idle_seconds)
        if idle and len(self._idle) + len(idle) == len(self._behaviours):
            last = min(idle, key=lambda number: silent[number])
            if silent[last] < self._all_idle_seconds:
                idle.remove(last)
        self._idle.update(idle)
        return idle

    @property
    def waits_for_silence(self) -> bool:
        """Whether a partition has nothing more to read and has not been silent for long enough to be idle."""
        return bool(set(self._reading.empty_and_exhausted()) - self._idle)

    @property
    def all_handed_out(self) -> bool:
        """Whether `next_behaviours` has returned everything that was produced."""
        return len(self._reading.empty_and_exhausted()) == len(self._behaviours)

    def _entry(self, record: Any) -> Entry:
        behaviour = behaviour_of(record, self._broker, self._field_map)
        written_at = record.timestamp / 1000
        return Entry(record.partition, record.offset, min(written_at, self._clock()), behaviour, written_at)
