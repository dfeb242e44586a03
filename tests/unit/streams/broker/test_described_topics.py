"""What the cluster says of topics: which are there, hidden or missing, and what a stored offset is bound to."""

from __future__ import annotations

from typing import Any

import pytest
from aiokafka import TopicPartition
from kafka import errors as kafka_errors

from schemas.errors import BrokerUnavailable, Misconfigured
from streams.broker import cluster
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import TopicIncarnation, describe_topics, read_incarnation, remove_member
from streams.broker.topics import TOPICS, TopicName, TopicsConfig

BROKER, TOPIC_NAMES = BrokerConfig(bootstrap_servers="kafka-1:9093"), TopicsConfig(prefix="p.")
NAMES: list[TopicName] = ["items", "models"]


class Admin:
    """A broker with two topics; `rows` change what it says of them."""

    def __init__(self) -> None:
        self.cluster: dict[str, Any] = {"cluster_id": "c", "brokers": [1, 2, 3]}
        self.rows: dict[str, dict[str, Any]] = {name: self.row(name) for name in ("p.items", "p.models")}
        self.configs: dict[str, Any] = {"p.items": {"cleanup.policy": {"value": "compact"}, "plain": 7}, "p.models": {}}
        self.failure: Exception | None = None
        self.removed: Any = kafka_errors.NoError
        self.asked: list[Any] = []
        self.closed = 0

    @staticmethod
    def row(name: str, **changes: Any) -> dict[str, Any]:
        parts = [{"partition_index": n, "replica_nodes": [1, 2, 3][: 3 - n]} for n in (1, 0)]
        return {"name": name, "error_code": 0, "topic_id": f"{name}-id", "partitions": parts} | changes

    def describe_cluster(self) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        return self.cluster

    def describe_topics(self, names: list[str]) -> list[dict[str, Any]]:
        gone = {"error_code": 3, "partitions": []}
        return [self.rows.get(name, {"name": name, **gone}) for name in names]

    def describe_configs(self, resources: list[Any], **_: Any) -> dict[str, Any]:
        self.asked += [resource.name for resource in resources]
        return {"topic": {resource.name: self.configs[resource.name] for resource in resources}}

    def remove_group_members(self, group: str, members: list[Any]) -> dict[str, Any]:
        self.asked.append((group, [member.group_instance_id for member in members]))
        if self.failure is not None:
            raise self.failure
        return {members[0].group_instance_id: self.removed}

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Admin:
    made = Admin()
    monkeypatch.setattr(cluster, "make_admin", lambda _: made)
    return made


def test_topics_are_told_by_their_short_names_with_all_that_the_broker_says(admin: Admin) -> None:
    admin.rows["p.items"]["authorized_operations"] = ["READ", "WRITE"]
    found = describe_topics(BROKER, TOPIC_NAMES, NAMES, with_configs=True)
    assert (found.cluster_id, found.brokers) == ("c", 3)
    assert found.topic_ids == {"items": "p.items-id", "models": "p.models-id"}
    assert found.partitions == {"items": [0, 1], "models": [0, 1]} and found.replicas == {"items": 2, "models": 2}
    assert found.rights == {"items": frozenset({"READ", "WRITE"})} and found.hidden == frozenset()
    assert found.configs == {"items": {"cleanup.policy": "compact", "plain": "7"}}  # of the other none may be read
    assert found.topic_partitions(TOPIC_NAMES, "models", "items") == [
        TopicPartition(f"p.{name}", number) for name in ("models", "items") for number in (0, 1)
    ]
    assert admin.closed == 1 and sorted(admin.asked) == ["p.items", "p.models"]
    assert describe_topics(BROKER, TOPIC_NAMES, NAMES).configs == {} and len(admin.asked) == 2
    assert read_incarnation(BROKER, TOPIC_NAMES, "models") == TopicIncarnation("c", "p.models", "p.models-id")


@pytest.mark.parametrize("changes", [None, {"error_code": 3}, {"partitions": []}], ids=repr)
def test_a_topic_that_is_missing_is_told_unless_it_may_be(admin: Admin, changes: dict[str, Any] | None) -> None:
    if changes is None:
        del admin.rows["p.models"]
    else:
        admin.rows["p.models"] |= changes
    with pytest.raises(Misconfigured, match=r"topic 'p\.models' does not exist at kafka-1:9093 .*topics create"):
        describe_topics(BROKER, TOPIC_NAMES, NAMES)
    found = describe_topics(BROKER, TOPIC_NAMES, NAMES, missing_ok=True)
    assert (list(found.partitions), list(found.topic_ids), found.hidden) == (["items"], ["items"], frozenset())
    assert admin.closed == 2


def test_a_topic_that_this_login_may_not_see_is_told_as_such(admin: Admin) -> None:
    admin.rows["p.models"] |= {"error_code": kafka_errors.TopicAuthorizationFailedError.errno, "partitions": []}
    with pytest.raises(Misconfigured, match=r"topic 'p\.models' .*may not be seen by this login .*check --rights"):
        describe_topics(BROKER, TOPIC_NAMES, NAMES)
    found = describe_topics(BROKER, TOPIC_NAMES, NAMES, missing_ok=True)
    assert (found.hidden, list(found.partitions)) == (frozenset({"models"}), ["items"])


@pytest.mark.parametrize("without", ["cluster", "topic"])
def test_without_ids_no_offset_can_be_bound_to_a_topic(admin: Admin, without: str) -> None:
    if without == "cluster":
        admin.cluster["cluster_id"] = None
    else:
        admin.rows["p.items"]["topic_id"] = None
    with pytest.raises(BrokerUnavailable, match="gives no ids of its cluster and topics"):
        describe_topics(BROKER, TOPIC_NAMES, NAMES)
    found = describe_topics(BROKER, TOPIC_NAMES, NAMES, missing_ok=True)
    assert list(found.partitions) == NAMES and ("items" in found.topic_ids) is (without == "cluster")


def test_a_broker_that_is_away_leaves_no_connection_open(admin: Admin) -> None:
    admin.failure = kafka_errors.KafkaConnectionError("away")
    with pytest.raises(BrokerUnavailable):
        describe_topics(BROKER, TOPIC_NAMES, NAMES)
    with pytest.raises(BrokerUnavailable):
        remove_member(BROKER, "p.index", "index-0")
    assert admin.closed == 2


def test_a_member_is_removed_once_and_another_refusal_is_told(admin: Admin) -> None:
    assert remove_member(BROKER, "p.index", "index-0") and admin.asked == [("p.index", ["index-0"])]
    admin.removed = kafka_errors.UnknownMemberIdError
    assert not remove_member(BROKER, "p.index", "index-0")
    admin.removed = kafka_errors.GroupAuthorizationFailedError
    with pytest.raises(Misconfigured, match="MIM_KAFKA__SASL_USERNAME"):
        remove_member(BROKER, "p.index", "index-0")
    assert admin.closed == 3


@pytest.mark.parametrize(
    ("replication", "asked_for", "insync"),
    [(None, None, None), (1, None, None), (2, None, None), (3, None, "2"), (5, None, "2"), (3, 1, "1"), (None, 2, "2")],
)
def test_with_three_replicas_two_have_to_have_a_record(
    replication: int | None, asked_for: int | None, insync: str | None
) -> None:
    config = TopicsConfig(replication_factor=replication, min_insync_replicas=asked_for)
    for spec in TOPICS.values():
        assert spec.settings(config, BROKER).get("min.insync.replicas") == insync


def test_names_on_the_cluster_begin_with_the_prefix() -> None:
    assert (TOPIC_NAMES.full_name("items"), TOPIC_NAMES.group("index")) == ("p.items", "p.index")
    assert TOPIC_NAMES.short_name("p.items-retry") == "items-retry" and TOPIC_NAMES.short_name("other") == "other"
