"""The click log that a replay of a folder writes, as the trainer would read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from streams.broker.clients import BrokerConfig
from streams.broker.partitioning import home_partition
from streams.broker.records import behaviour_of
from streams.replay.timeline import Timeline
from trainer.samples.partition_merge import Entry


@dataclass(slots=True)
class Record:
    """A record as Kafka's clients give it."""

    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]] = ()


def click_log(timeline: Timeline, broker: BrokerConfig, *, partitions: int) -> Iterator[Entry]:
    """The records of `behaviours` in the order of sending, with the partition and offset that each gets.

    The payloads are those of a replay, decoded as the trainer decodes them; what cannot be read has no behaviour. All
    are produced at `timeline.now`. Any order that keeps the offsets of a partition gives the same training rows.
    """
    produced = timeline.now.timestamp()
    ends: Counter[int] = Counter()
    for outgoing in timeline.behaviour_records():
        partition = home_partition(outgoing.key, partitions)
        record = Record(partition, ends[partition], int(1000 * produced), outgoing.key, outgoing.value)
        ends[partition] += 1
        yield Entry(partition, record.offset, produced, behaviour_of(record, broker, {}), produced)
