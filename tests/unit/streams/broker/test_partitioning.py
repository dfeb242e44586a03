"""Which hash put the keys of a topic where they are."""

from __future__ import annotations

from aiokafka.partitioner import DefaultPartitioner

from streams.broker.partitioning import Partitioning, crc32_partition, home_partition

KEYS = [f"item-{n}".encode() for n in range(200)]


def test_home_is_where_other_clients_put_a_key() -> None:
    for count in (1, 4, 6, 7):
        every = list(range(count))
        assert all(home_partition(key, count) == DefaultPartitioner()(key, every, every) for key in KEYS)


def test_a_topic_is_mixed_only_if_no_one_hash_explains_all_its_keys() -> None:
    java = [(key, home_partition(key, 4)) for key in KEYS]
    librdkafka = [(key, crc32_partition(key, 4)) for key in KEYS]
    assert not Partitioning.of(java, 4).is_mixed
    assert not Partitioning.of(librdkafka, 4).is_mixed
    assert not Partitioning.of([], 4).is_mixed
    assert Partitioning.of(java[:100] + librdkafka[100:], 4).is_mixed
    assert Partitioning.of(java, 6).is_mixed  # partitions were added
    assert Partitioning.of(librdkafka, 4).by_murmur2 < 100
