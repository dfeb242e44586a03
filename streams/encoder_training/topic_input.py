"""What an encoder learns from on the stream: all of `items` and `behaviours` as they are now, with offsets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import structlog
from aiokafka import TopicPartition

from encoders.base import ItemContent
from schemas.base import decode, produced_at
from schemas.behaviours import Behaviour
from schemas.errors import BadMessage, Misconfigured
from schemas.items import ItemPublished
from streams.broker.clients import BrokerConfig, broker_errors, make_admin, make_consumer
from streams.broker.cluster import read_log_identity
from streams.broker.forgotten import read_forgotten_users
from streams.broker.records import read_batch
from streams.broker.topics import TopicName, TopicsConfig
from trainer.samples.forgotten import ForgottenUsers

log = structlog.get_logger()


@dataclass
class TopicContent:
    """Items as they now stand and the click log, with where reading ended."""

    items: dict[str, ItemPublished] = field(default_factory=dict)
    behaviours: list[tuple[int, int, Behaviour]] = field(default_factory=list)
    """(partition, offset, event) in the order of each partition."""
    offsets: dict[str, dict[int, int]] = field(default_factory=dict)
    """Per topic (without prefix) and partition, the next offset after what was read."""
    cluster_id: str | None = None
    broken: int = 0
    """Records that could not be read; somebody else writes their dead letters."""
    erased: int = 0
    """Behaviours of users who asked to be forgotten since: passed over."""

    @property
    def behaviours_read(self) -> int:
        """How many behaviours were readable."""
        return len(self.behaviours)

    def contents(self) -> list[ItemContent]:
        """The items, by id, with the pictures that travelled in the topic.

        A picture by URL is not fetched: what a host answers today would decide what an encoder learns. The log says
        how many were left out.
        """
        left_out = sum(item.image is None and item.image_url is not None for item in self.items.values())
        if left_out:
            log.warning(
                "pictures.left_out",
                items=left_out,
                of=len(self.items),
                reason="these items name their picture by image_url, which is not fetched here: only their words teach",
                advice="to learn from their pictures, make a data-set folder with images.parquet and give it as --data",
            )
        return [ItemContent.of(item, item.image) for _, item in sorted(self.items.items())]


async def read_topics(
    broker: BrokerConfig,
    topics: TopicsConfig,
    item_fields: dict[str, str],
    behaviour_fields: dict[str, str],
    *,
    only_items: bool = False,
) -> TopicContent:
    """Read from the beginnings to the ends as they are at the start. Nothing is committed.

    Raises `Misconfigured` if a topic does not exist, `BrokerUnavailable` if nobody answers.
    """
    names: list[TopicName] = ["items"] if only_items else ["items", "behaviours"]
    found = TopicContent()
    gone = ForgottenUsers(None, None) if only_items else await _forgotten(broker, topics)
    partitions = await asyncio.to_thread(_describe, broker, topics, names, found)
    consumer = make_consumer(broker)
    with broker_errors(broker):
        await consumer.start()
    try:
        with broker_errors(broker):
            consumer.assign(list(partitions))
            ends = await consumer.end_offsets(list(partitions))
            for partition, offset in (await consumer.beginning_offsets(list(partitions))).items():
                consumer.seek(partition, offset)
            waiting = set(partitions)
            while waiting:
                for partition in list(waiting):
                    if await consumer.position(partition) >= ends[partition]:
                        waiting.discard(partition)
                        consumer.pause(partition)
                if waiting:
                    batches = await consumer.getmany(*waiting, timeout_ms=500, max_records=2_000)
                    for partition, records in batches.items():
                        inside = [record for record in records if record.offset < ends[partition]]
                        if partitions[partition] == "items":
                            _take_items(found, inside, broker, item_fields)
                        else:
                            _take_behaviours(found, partition.partition, inside, broker, behaviour_fields, gone)
    finally:
        await consumer.stop()
    for partition, name in partitions.items():
        found.offsets.setdefault(name, {})[partition.partition] = int(ends[partition])
    counts = {"behaviours": len(found.behaviours), "broken": found.broken, "erased": found.erased}
    log.info("csft.topics_read", items=len(found.items), **counts)
    return found


async def _forgotten(broker: BrokerConfig, topics: TopicsConfig) -> ForgottenUsers:
    log_now = await asyncio.to_thread(read_log_identity, broker, topics.full_name("behaviours"))
    return await read_forgotten_users(broker, topics, cluster_id=log_now.cluster_id, topic_id=log_now.topic_id)


def _describe(
    broker: BrokerConfig, topics: TopicsConfig, names: list[TopicName], found: TopicContent
) -> dict[TopicPartition, TopicName]:
    admin = make_admin(broker)
    try:
        with broker_errors(broker):
            found.cluster_id = admin.describe_cluster().get("cluster_id")
            described = admin.describe_topics([topics.full_name(name) for name in names])
    finally:
        admin.close()
    partitions: dict[TopicPartition, TopicName] = {}
    for name in names:
        full_name = topics.full_name(name)
        topic = next((one for one in described if one["name"] == full_name and not one["error_code"]), None)
        if topic is None or not topic["partitions"]:
            raise Misconfigured(
                f"topic {full_name!r} does not exist at {broker.bootstrap_servers} (MIM_TOPICS__PREFIX); run "
                "'mimstream topics create'"
            )
        for partition in topic["partitions"]:
            partitions[TopicPartition(full_name, int(partition["partition_index"]))] = name
    return partitions


def _take_items(found: TopicContent, records: list[Any], broker: BrokerConfig, fields: dict[str, str]) -> None:
    for record in records:
        item_id = (record.key or b"").decode(errors="replace")
        if record.value is None:
            found.items.pop(item_id, None)
            continue
        try:
            now = produced_at(record.timestamp)
            item = decode(ItemPublished, record.value, now=now, max_bytes=broker.max_record_bytes, field_map=fields)
        except BadMessage:
            found.broken += 1
            continue
        found.items[item.item_id] = item


def _take_behaviours(
    found: TopicContent,
    partition: int,
    records: list[Any],
    broker: BrokerConfig,
    fields: dict[str, str],
    gone: ForgottenUsers,
) -> None:
    events, letters = read_batch(
        records,
        partition=partition,
        now=datetime.fromtimestamp(0, UTC),
        max_bytes=broker.max_record_bytes,
        field_map=fields,
    )
    found.broken += len(letters)
    for event in events:
        if event.behaviour is None:
            continue
        if gone.erases(event.behaviour.user_id, partition, event.offset):
            found.erased += 1
        else:
            found.behaviours.append((partition, event.offset, event.behaviour))
