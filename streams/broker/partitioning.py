"""Which partition a key belongs to.

Java, kafka-python and aiokafka hash keys by murmur2, librdkafka by CRC32 unless it is told otherwise. Records of one
key that were sent by both lie in two partitions, and only their timestamps say which is newer.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from aiokafka.partitioner import murmur2

FIX = (
    "set partitioner=murmur2_random in producers that use librdkafka (confluent-kafka, Go, .NET, Node.js), and publish "
    "their items again"
)


def crc32_partition(key: bytes, partitions: int) -> int:
    """The partition that librdkafka's default (`consistent_random`) gives a key."""
    return zlib.crc32(key) % partitions


@dataclass(frozen=True, slots=True)
class Partitioning:
    """Where the keys of a topic lie."""

    keys: int
    by_murmur2: int
    """Keys that lie where murmur2 puts them."""
    by_crc32: int

    @classmethod
    def of(cls, keys: Iterable[tuple[bytes, int]], partitions: int) -> Partitioning:
        """Of (key, partition) pairs of a topic with so many partitions."""
        held = list(keys)
        return cls(
            len(held),
            sum(home_partition(key, partitions) == partition for key, partition in held),
            sum(crc32_partition(key, partitions) == partition for key, partition in held),
        )

    @property
    def is_mixed(self) -> bool:
        """Whether no one hash explains them: records of one key may lie in two partitions."""
        return self.keys not in (self.by_murmur2, self.by_crc32)


def home_partition(key: bytes, partitions: int) -> int:
    """The partition that murmur2 gives a key, of `partitions` in all."""
    return int((murmur2(key) & 0x7FFFFFFF) % partitions)
