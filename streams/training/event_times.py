"""Where in the click log an event time is reached: a sparse index, since records are stamped when they are produced.

```text
partition 0   offset     0     1000     2000    every thousandth record, with the newest event time up to it
              time   10:00    10:07    10:09
```

A partition reaches a moment with its first event of that time or later; stragglers behind it belong to what follows.
The index is built by reading the log once, kept beside the snapshots, and extended from where it ends.
"""

from __future__ import annotations

import bisect
import json
import os
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog
from aiokafka import TopicPartition

from schemas.errors import StoreUnavailable
from schemas.field_maps import FieldMap
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics
from streams.broker.log_reader import LogReader
from streams.broker.records import behaviour_of
from streams.broker.topics import TopicsConfig

log = structlog.get_logger()

_STRIDE = 1_000
_PROGRESS_SECONDS = 2.0


class EventTimes:
    """The index of one log. `seconds` of a partition never fall: each is the newest event time up to its offset."""

    def __init__(self, topic_id: str, parts: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        self.topic_id = topic_id
        self._offsets: dict[int, list[int]] = {}
        self._seconds: dict[int, list[float]] = {}
        self._next: dict[int, int] = {}
        for number, part in (parts or {}).items():
            self._offsets[number], self._seconds[number] = list(part["offsets"]), list(part["seconds"])
            self._next[number] = int(part["next"])

    def indexed_below(self, partition: int) -> int:
        """Where the index of a partition ends; 0 if there is none."""
        return self._next.get(partition, 0)

    def newest(self, partition: int) -> float:
        """The newest event time indexed."""
        seconds = self._seconds.get(partition)
        return seconds[-1] if seconds else float("-inf")

    def add(self, partition: int, offset: int, newest: float) -> None:
        """Say that events below `offset` reach `newest`. Offsets and times rise."""
        self._offsets.setdefault(partition, []).append(offset)
        self._seconds.setdefault(partition, []).append(newest)
        self._next[partition] = offset

    def span(self, partition: int, moment: float, first: int, end: int) -> tuple[int, int]:
        """Offsets between which the moment is reached."""
        offsets = self._offsets.get(partition, [])
        place = bisect.bisect_left(self._seconds.get(partition, []), moment)
        before = offsets[place - 1] if place else first
        after = offsets[place] if place < len(offsets) else end
        return max(before, first), min(max(after, first), end)

    def dump(self) -> str:
        """As JSON text."""
        parts = {
            str(number): {
                "next": self._next[number],
                "offsets": self._offsets[number],
                "seconds": self._seconds[number],
            }
            for number in self._next
        }
        return json.dumps({"topic_id": self.topic_id, "partitions": parts})

    @classmethod
    def parse(cls, text: str, topic_id: str) -> EventTimes:
        """What `dump` wrote; an empty index if that was of another topic, or is damaged."""
        try:
            kept = json.loads(text)
            if kept["topic_id"] == topic_id:
                return cls(topic_id, {int(number): part for number, part in kept["partitions"].items()})
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("event_times.damaged")
        return cls(topic_id)


class EventTimeFinder:
    """Finds offsets by event time, keeping its index in `file`."""

    def __init__(
        self,
        broker: BrokerConfig,
        topics: TopicsConfig,
        *,
        field_map: FieldMap,
        log_now: ClusterTopics,
        file: Path,
    ) -> None:
        self._broker = broker
        self._topics = topics
        self._field_map = dict(field_map)
        self._log_now = log_now
        self._file = file

    async def reached(self, *moments: datetime) -> list[dict[int, int]]:
        """For each moment: per partition of `behaviours` the offset of its first event at or after it, else its end.

        Raises `BrokerUnavailable`, and `StoreUnavailable` if the index cannot be kept.
        """
        index = self._load()
        found: list[dict[int, int]] = [{} for _ in moments]
        async with LogReader(self._broker, self._topics) as reader:
            partitions = await reader.partitions("behaviours")
            for partition, (first, end) in (await reader.bounds(partitions)).items():
                await self._extend(reader, index, partition, first, end)
                for place, moment in zip(found, moments, strict=True):
                    place[partition.partition] = await self._search(reader, index, partition, moment, first, end)
        self._keep(index)
        return found

    async def _extend(
        self, reader: LogReader, index: EventTimes, partition: TopicPartition, first: int, end: int
    ) -> None:
        number = partition.partition
        start, newest = max(index.indexed_below(number), first), index.newest(number)
        told_at, read = time.monotonic(), 0
        async for record in reader.read(partition, start, end - (end - start) % _STRIDE):
            newest = max(newest, self._second(record))
            read += 1
            if (record.offset + 1 - start) % _STRIDE == 0:
                index.add(number, record.offset + 1, newest)
            if time.monotonic() - told_at >= _PROGRESS_SECONDS:
                told_at = time.monotonic()
                log.info("event_times.indexing", partition=number, events=read, offset=record.offset, end=end)

    async def _search(
        self, reader: LogReader, index: EventTimes, partition: TopicPartition, moment: datetime, first: int, end: int
    ) -> int:
        start, stop = index.span(partition.partition, moment.timestamp(), first, end)
        async for record in reader.read(partition, start, stop):
            if self._second(record) >= moment.timestamp():
                return int(record.offset)
        return stop

    def _second(self, record: Any) -> float:
        behaviour = behaviour_of(record, self._broker, self._field_map)
        return float("-inf") if behaviour is None else behaviour.occurred_at.timestamp()

    def _load(self) -> EventTimes:
        topic_id = self._log_now.topic_ids["behaviours"]
        try:
            return EventTimes.parse(self._file.read_text(), topic_id)
        except FileNotFoundError:
            return EventTimes(topic_id)
        except OSError as error:
            raise StoreUnavailable("event-time index", f"{self._file}: {error}") from error

    def _keep(self, index: EventTimes) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._file.with_name(f".{self._file.name}-{os.getpid()}")
            fresh.write_text(index.dump())
            os.replace(fresh, self._file)
        except OSError as error:
            raise StoreUnavailable("event-time index", f"{self._file}: {error}") from error
