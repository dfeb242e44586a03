"""What the cluster says of topics: ids, partitions, settings, and the incarnation that stored positions belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiokafka import TopicPartition
from kafka import KafkaAdminClient
from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType, MemberToRemove

from schemas.errors import BrokerUnavailable, Misconfigured
from streams.broker.clients import BrokerConfig, broker_errors, make_admin
from streams.broker.topics import TopicName, TopicsConfig

TRAINING_TOPICS: tuple[TopicName, ...] = ("embeddings", "behaviours")
"""What any trainer reads and stores offsets of, and what a release is rebuilt from."""


def training_topics(*, queries: bool) -> tuple[TopicName, ...]:
    """What a trainer reads and stores offsets of; its own rows may need `queries` too."""
    return (*TRAINING_TOPICS, "queries") if queries else TRAINING_TOPICS


@dataclass(frozen=True, slots=True)
class TopicIncarnation:
    """Which log stored positions belong to. A topic that is deleted and created again has another id."""

    cluster_id: str
    topic: str
    topic_id: str


@dataclass(frozen=True, slots=True)
class ClusterTopics:
    """What the cluster says of the topics it has, by their names without prefix."""

    cluster_id: str | None
    topic_ids: dict[str, str]
    partitions: dict[str, list[int]]
    configs: dict[str, dict[str, str]] = field(default_factory=dict)
    """The settings of each topic that may be read; empty unless they were asked for."""
    hidden: frozenset[str] = field(default=frozenset(), compare=False)
    """Topics that this login may not see, whether they exist or not."""
    replicas: dict[str, int] = field(default_factory=dict, compare=False)
    """The smallest number of replicas that a partition of the topic has."""
    rights: dict[str, frozenset[str]] = field(default_factory=dict, compare=False)
    """What this login may do with each topic (`READ`, `WRITE`, ...), where the broker tells."""
    brokers: int = field(default=0, compare=False)
    """How many brokers the cluster has."""

    def incarnation(self, topics: TopicsConfig, name: TopicName) -> TopicIncarnation:
        """Which incarnation of the topic this is. Raises `BrokerUnavailable` if the broker gives no ids."""
        topic, topic_id = topics.full_name(name), self.topic_ids.get(name)
        if not self.cluster_id or topic_id is None:
            raise BrokerUnavailable("Kafka", f"the broker gives no ids of cluster and topic {topic}")
        return TopicIncarnation(self.cluster_id, topic, topic_id)

    def topic_partitions(self, topics: TopicsConfig, *names: TopicName) -> list[TopicPartition]:
        """The partitions of topics, in order, as clients name them."""
        return [TopicPartition(topics.full_name(name), number) for name in names for number in self.partitions[name]]

    def has_incarnations(self, cluster_id: str | None, topic_ids: Mapping[str, str]) -> bool:
        """Whether offsets that were stored with these ids belong to these topics."""
        return (cluster_id, topic_ids) == (self.cluster_id, self.topic_ids)

    def refuse_other(self, what: str, cluster_id: str | None, topic_ids: Mapping[str, str], *, or_else: str) -> None:
        """Raise `Misconfigured` if `what`, stored with these ids, has offsets of other topics than these.

        `or_else` ends the message: what can be done apart from pointing to the former topics.
        """
        if not self.has_incarnations(cluster_id, topic_ids):
            raise Misconfigured(
                f"{what} comes from other topics, in cluster {cluster_id}: its offsets mean nothing in cluster "
                f"{self.cluster_id}. Set MIM_KAFKA__BOOTSTRAP_SERVERS and MIM_TOPICS__PREFIX to where it came from, "
                f"or {or_else}"
            )

    def refuse_replaced(self, now: ClusterTopics, *, way_out: str) -> None:
        """Raise `Misconfigured` if the topics are not the same `now`; `way_out` ends the message."""
        if now != self:
            raise Misconfigured(
                "a topic was deleted and created again, or got more partitions, since the start: what was learned and "
                f"its offsets no longer belong to it. {way_out}"
            )


def describe_topics(
    broker: BrokerConfig,
    topics: TopicsConfig,
    names: Iterable[TopicName],
    *,
    with_configs: bool = False,
    missing_ok: bool = False,
) -> ClusterTopics:
    """Ask the cluster for its id and for topics, all in one connection. Blocking.

    Raises `BrokerUnavailable` if no broker answers. Raises `Misconfigured` if a topic does not exist or may not be
    seen, and `BrokerUnavailable` if the broker gives no ids, unless `missing_ok` leaves them out.
    """
    full_names = {name: topics.full_name(name) for name in names}
    admin = make_admin(broker)
    try:
        with broker_errors(broker):
            cluster = admin.describe_cluster()
            cluster_id = cluster.get("cluster_id")
            described = admin.describe_topics(list(full_names.values()))
            by_full_name = {row["name"]: row for row in described if not row["error_code"] and row["partitions"]}
            found = {name: by_full_name[full] for name, full in full_names.items() if full in by_full_name}
            configs = _read_configs(admin, by_full_name) if with_configs and found else {}
    finally:
        admin.close()
    denied = {row["name"] for row in described if row["error_code"] == _DENIED}
    hidden = frozenset(name for name, full in full_names.items() if full in denied)
    if hidden and not missing_ok:
        names_of_hidden = ", ".join(repr(full_names[name]) for name in sorted(hidden))
        raise Misconfigured(
            f"topic {names_of_hidden} at {broker.bootstrap_servers} may not be seen by this login "
            "(MIM_KAFKA__SASL_USERNAME), or does not exist: 'mimstream check --rights' lists the rights that it needs"
        )
    missing = [repr(full) for name, full in full_names.items() if name not in found]
    if missing and not missing_ok:
        raise Misconfigured(
            f"topic {', '.join(missing)} does not exist at {broker.bootstrap_servers} (MIM_TOPICS__PREFIX); "
            "run 'mimstream topics create'"
        )
    topic_ids: dict[str, str] = {
        name: str(row["topic_id"]) for name, row in found.items() if row.get("topic_id") is not None
    }
    if not missing_ok and not (cluster_id and topic_ids.keys() == found.keys()):  # stored offsets are bound to them
        raise BrokerUnavailable("Kafka", f"{broker.bootstrap_servers} gives no ids of its cluster and topics")
    return ClusterTopics(
        cluster_id=cluster_id,
        topic_ids=topic_ids,
        partitions={
            name: sorted(int(one["partition_index"]) for one in row["partitions"]) for name, row in found.items()
        },
        # without the right to read them the broker gives none
        configs={name: configs[full_names[name]] for name in found if configs.get(full_names[name])},
        hidden=hidden,
        replicas={name: min(len(one["replica_nodes"]) for one in row["partitions"]) for name, row in found.items()},
        rights={name: rights for name, row in found.items() if (rights := _rights(row)) is not None},
        brokers=len(cluster.get("brokers", ())),
    )


_DENIED = kafka_errors.TopicAuthorizationFailedError.errno


def _rights(row: Mapping[str, Any]) -> frozenset[str] | None:
    """What the broker says that this login may do with a topic; None where it does not say."""
    told = row.get("authorized_operations")
    return frozenset(map(str, told)) if told else None


def read_incarnation(broker: BrokerConfig, topics: TopicsConfig, name: TopicName) -> TopicIncarnation:
    """Ask which incarnation of a topic the cluster has. Blocking; raises as `describe_topics` does."""
    return describe_topics(broker, topics, [name]).incarnation(topics, name)


def _read_configs(admin: KafkaAdminClient, full_names: Iterable[str]) -> dict[str, dict[str, str]]:
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in full_names]
    return {
        topic: {key: str(row["value"] if isinstance(row, dict) else row) for key, row in settings.items()}
        for by_name in admin.describe_configs(resources, config_filter="all").values()
        for topic, settings in by_name.items()
    }


def assigned_topics(broker: BrokerConfig, group: str, instance_id: str) -> frozenset[str] | None:
    """The topics of which a static member of a group has partitions, or may have; None if it has no assignment.

    Blocking. Raises `BrokerUnavailable`.
    """
    admin = make_admin(broker)
    try:
        with broker_errors(broker):
            described = admin.describe_groups([group])[group]
    finally:
        admin.close()
    for member in described.get("members") or ():
        held = member.get("member_assignment")
        if member.get("group_instance_id") == instance_id and isinstance(held, Mapping):
            return frozenset(one["topic"] for one in held["assigned_partitions"]) or None
    return None


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
