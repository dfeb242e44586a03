"""Where a topic ends now, open transactions included: whoever has sent a record has sent it below."""

from __future__ import annotations

import asyncio

from aiokafka import TopicPartition

from streams.broker.clients import BrokerConfig, broker_errors, make_consumer
from streams.broker.cluster import read_partitions


async def read_ends(broker: BrokerConfig, topic: str) -> dict[int, int]:
    """Offset after the last record of each partition. Raises `BrokerUnavailable`, `Misconfigured`."""
    partitions = [TopicPartition(topic, number) for number in await asyncio.to_thread(read_partitions, broker, topic)]
    consumer = make_consumer(broker, isolation_level="read_uncommitted")
    try:
        with broker_errors(broker):
            await consumer.start()
            ends = await consumer.end_offsets(partitions)
    finally:
        await consumer.stop()
    return {partition.partition: int(end) for partition, end in ends.items()}
