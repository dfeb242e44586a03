"""What the cluster says of one topic: its partitions, and which incarnation of it stored offsets belong to."""

from __future__ import annotations

from typing import Any

from schemas.errors import BrokerUnavailable, Misconfigured
from streams.broker.clients import BrokerConfig, broker_errors, make_admin
from streams.stores.histories.redis_store import LogIdentity


def read_log_identity(broker: BrokerConfig, topic: str) -> LogIdentity:
    """Ask the cluster for its own id and the topic's. Blocking.

    Raises `Misconfigured` if the topic does not exist, `BrokerUnavailable` if nobody answers.
    """
    cluster_id, described = _describe(broker, topic)
    topic_id = described.get("topic_id")
    if not cluster_id or topic_id is None:
        raise BrokerUnavailable(
            "Kafka", f"{broker.bootstrap_servers} does not tell the ids of cluster and topic {topic}"
        )
    return LogIdentity(str(cluster_id), topic, str(topic_id))


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
