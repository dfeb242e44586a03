"""What the cluster says of one topic: its partitions, and which incarnation of it stored offsets belong to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition
from kafka import errors as kafka_errors
from kafka.admin import MemberToRemove

from schemas.errors import BrokerUnavailable, Misconfigured
from streams.broker.clients import BrokerConfig, broker_errors, make_admin, make_consumer
from streams.broker.topics import TopicName, TopicsConfig


def read_log_identity(broker: BrokerConfig, topic: str) -> TopicIncarnation:
    """Ask the cluster for its own id and the topic's. Blocking.

    Raises `Misconfigured` if the topic does not exist, `BrokerUnavailable` if nobody answers.
    """
    cluster_id, described = _describe(broker, topic)
    topic_id = described.get("topic_id")
    if not cluster_id or topic_id is None:
        raise BrokerUnavailable(
            "Kafka", f"{broker.bootstrap_servers} does not tell the ids of cluster and topic {topic}"
        )
    return TopicIncarnation(str(cluster_id), topic, str(topic_id))


def read_partitions(broker: BrokerConfig, topic: str) -> list[int]:
    """Ask the cluster for the topic's partitions. Blocking; raises as `read_log_identity` does."""
    return sorted(int(partition["partition_index"]) for partition in _describe(broker, topic)[1]["partitions"])


def _describe(broker: BrokerConfig, topic: str) -> tuple[str | None, dict[str, Any]]:
    admin = make_admin(broker)
    try:
        with broker_errors(broker):
            cluster_id = admin.describe_cluster().get("cluster_id")
            found = [row for row in admin.describe_topics([topic]) if not row["error_code"] and row["partitions"]]
    finally:
        admin.close()
    if not found:
        raise Misconfigured(
            f"topic {topic!r} does not exist at {broker.bootstrap_servers} (MIM_TOPICS__PREFIX); "
            "run 'mimstream topics create'"
        )
    return cluster_id, found[0]


@dataclass(frozen=True, slots=True)
class TopicIncarnation:
    """Which log the positions belong to. A topic that is deleted and created again has another id."""

    cluster_id: str
    topic: str
    topic_id: str


INPUT_TOPICS: tuple[TopicName, ...] = ("embeddings", "behaviours")


@dataclass(frozen=True, slots=True)
class ClusterTopics:
    """What the cluster says of the topics, by their names without prefix."""

    cluster_id: str | None
    topic_ids: dict[str, str]
    partitions: dict[str, list[int]]


def describe_input(broker: BrokerConfig, topics: TopicsConfig) -> ClusterTopics:
    """Ask for ids and partitions of the input topics. Blocking.

    Raises `Misconfigured` if one does not exist, `BrokerUnavailable` if nobody answers.
    """
    admin = make_admin(broker)
    try:
        with broker_errors(broker):
            cluster_id = admin.describe_cluster().get("cluster_id")
            described = admin.describe_topics([topics.full_name(name) for name in INPUT_TOPICS])
    finally:
        admin.close()
    found = {topic["name"]: topic for topic in described if not topic["error_code"] and topic["partitions"]}
    for name in INPUT_TOPICS:
        if topics.full_name(name) not in found:
            raise Misconfigured(
                f"topic {topics.full_name(name)!r} does not exist at {broker.bootstrap_servers} (MIM_TOPICS__PREFIX); "
                "run 'mimstream topics create'"
            )
    by_name = {name: found[topics.full_name(name)] for name in INPUT_TOPICS}
    return ClusterTopics(
        cluster_id=cluster_id,
        topic_ids={name: str(topic["topic_id"]) for name, topic in by_name.items()},
        partitions={
            name: sorted(int(partition["partition_index"]) for partition in topic["partitions"])
            for name, topic in by_name.items()
        },
    )


def remove_member(broker: BrokerConfig, group: str, instance_id: str) -> bool:
    """Remove a static member; False if the group does not have it. Blocking.

    Only for a member that has ended: a living one would be thrown out. Raises `BrokerUnavailable`.
    """
    admin = make_admin(broker)
    try:
        with broker_errors(broker):
            answer = admin.remove_group_members(
                group, [MemberToRemove(group_instance_id=instance_id, reason="scaled in")]
            )
    finally:
        admin.close()
    (error,) = answer.values()
    if error is kafka_errors.UnknownMemberIdError:
        return False
    if error is not kafka_errors.NoError:
        with broker_errors(broker):
            raise error(f"removing {instance_id} from group {group}")
    return True


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
