"""What the trainer reads: all partitions of `embeddings`, `queries` and `behaviours`, fetched, decoded and aligned.

No consumer group hands out the data and nothing is committed here: a trainer reads everything, from the beginning or
from where a checkpoint was taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import structlog
from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors

from schemas.errors import Misconfigured, Unavailable
from schemas.field_maps import FieldMap
from streams.broker.clients import BrokerConfig, broker_errors, make_consumer
from streams.broker.cluster import ClusterTopics, describe_topics, training_topics
from streams.broker.records import behaviour_of
from streams.broker.topics import TopicName, TopicsConfig
from streams.training.open_transactions import OpenTransactions
from streams.training.vector_records import EmbeddingRecord, VectorRecords
from trainer.samples.partition_merge import Entry, PartitionMerge

log = structlog.get_logger()

_FAR = 1 << 62


class TrainingInput:
    """The topics as the trainer reads them, `queries` only if told to. `bounded` stops at the ends of the topics as
    they are at `open`, or of `behaviours` at `end_at` if that comes first.

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
        queries: bool = False,
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
        self._topic_names = training_topics(queries=queries)
        self._start_at = start_at or {}
        self._end_at = end_at or {}
        self._lost_is_fatal = lost_is_fatal
        self._clock = clock
        self._vectors = VectorRecords(encoder_version, max_bytes=broker.max_record_bytes)
        self._idle: set[int] = set()

    async def open(self) -> None:
        """Connect and seek to where reading begins.

        Raises `Misconfigured` if the log does not hold what comes next any more, or not yet.
        """
        found = await asyncio.to_thread(describe_topics, self._broker, self._topics, self._topic_names)
        self._embeddings = self._numbered("embeddings", found)
        self._queries = self._numbered("queries", found)
        self._behaviours = self._numbered("behaviours", found)
        everything = [*self._of_vectors(), *self._behaviours.values()]
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
        self.query_offsets = {number: starts[p] for number, p in self._queries.items()}
        """Next offset to read of each partition of `queries`; empty if they are not read."""
        if self._queries and not any(self._ends[p] for p in self._queries.values()):
            log.warning(
                "train.no_queries", fix="run `mimstream index` with MIM_INDEX__QUERIES=true, as it is by default"
            )
        room = max(100, self._buffered_records // len(self._behaviours))
        self._reading = PartitionMerge(self._behaviours, room_per_partition=room, silence_seconds=self._idle_seconds)
        self._active_at = dict.fromkeys(self._behaviours, self._clock())

    def _starts(self, beginnings: Mapping[TopicPartition, int]) -> dict[TopicPartition, int]:
        starts = {}
        topics = {"embeddings": self._embeddings, "queries": self._queries, "behaviours": self._behaviours}
        for name, numbered in topics.items():
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
        if name not in self._topic_names:
            return {}
        return {number: TopicPartition(self._topics.full_name(name), number) for number in found.partitions[name]}

    def _of_vectors(self) -> list[TopicPartition]:
        return [*self._embeddings.values(), *self._queries.values()]

    @property
    def partitions(self) -> list[int]:
        """Partitions of `behaviours`."""
        return list(self._behaviours)

    # ---- fetching ------------------------------------------------------------------------------------------------

    async def fetch(self, *, embeddings: bool, behaviours: bool, wait_seconds: float) -> None:
        """Fetch what there is and there is room for, waiting up to `wait_seconds` for it.

        Raises `Misconfigured` if the log no longer holds what would come next.
        """
        wanted = self._of_vectors() if embeddings else []
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
                for numbered, offsets in self._vector_places():
                    for number, partition in numbered.items():
                        offsets[number] = await self._position(partition)
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
                self._vectors.add_embeddings(within)
            elif self._queries.get(partition.partition) == partition:
                self._vectors.add_queries(within)
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
        return bool(self._vectors)

    @property
    def encoder_version(self) -> str | None:
        """The encoder whose vectors are read; None before the first of them."""
        return self._vectors.encoder_version

    @property
    def broken_vectors(self) -> int:
        """Records of `embeddings` and `queries` that could not be read."""
        return self._vectors.broken

    @property
    def other_encoders(self) -> int:
        """Records of both that are of another encoder."""
        return self._vectors.other_encoders

    def next_embeddings(self) -> list[EmbeddingRecord]:
        """The embeddings and tombstones that were fetched since the last call, oldest first, queries among them."""
        return self._vectors.pop()

    async def all_embeddings_at_start_read(self) -> bool:
        """Whether everything was fetched that `embeddings` and `queries` held at `open`."""
        return all([await self._position(p) >= self._ends[p] for p in self._of_vectors()])

    @property
    def embeddings_are_current(self) -> bool:
        """Whether `next_embeddings` has returned every embedding that the broker has."""
        return not self._vectors and all(
            (end := self._end_as_polled(partition)) is not None and offsets[number] >= end
            for numbered, offsets in self._vector_places()
            for number, partition in numbered.items()
        )

    def _vector_places(self) -> Iterable[tuple[dict[int, TopicPartition], dict[int, int]]]:
        return ((self._embeddings, self.embedding_offsets), (self._queries, self.query_offsets))

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
