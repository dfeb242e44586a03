"""Which cluster and which incarnation of a topic stored offsets belong to."""

from __future__ import annotations

from schemas.errors import BrokerUnavailable, Misconfigured
from streams.broker import BrokerConfig, broker_errors, make_admin
from streams.stores.behaviours import LogIdentity


def read_log_identity(broker: BrokerConfig, topic: str) -> LogIdentity:
    """Ask the cluster for its own id and the topic's. Blocking.

    Raises `Misconfigured` if the topic does not exist, `BrokerUnavailable` if nobody answers.
    """
    admin = make_admin(broker)
    try:
        with broker_errors(broker):
            cluster_id = admin.describe_cluster().get("cluster_id")
            if topic not in {name if isinstance(name, str) else name["name"] for name in admin.list_topics()}:
                raise Misconfigured(
                    f"topic {topic!r} does not exist at {broker.bootstrap_servers} (MIM_TOPICS__PREFIX); "
                    "run 'mimstream topics create'"
                )
            described = admin.describe_topics([topic])[0]
    finally:
        admin.close()
    topic_id = described.get("topic_id")
    if not cluster_id or topic_id is None:
        raise BrokerUnavailable(
            "Kafka", f"{broker.bootstrap_servers} does not tell the ids of cluster and topic {topic}"
        )
    return LogIdentity(str(cluster_id), topic, str(topic_id))
