"""Naming a topic does not create it, and one that is not there is told at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.metadata import MetadataRequest_v5

from schemas.errors import Misconfigured
from streams.broker import cluster
from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicsConfig

BROKER = BrokerConfig(client_id="mimstream-record")


class Connection:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    async def send(self, request: Any) -> Any:
        self.sent.append(request.build(MetadataRequest_v5))
        return SimpleNamespace(brokers=[])


async def test_no_client_asks_a_broker_to_create_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    options = BROKER.client_options()
    assert options["client_id"] == "mimstream-record"
    client, connection = AIOKafkaClient(**options), Connection()

    async def connected(node: object) -> Connection:
        return connection

    monkeypatch.setattr(client, "_get_conn", connected)
    monkeypatch.setattr(client.cluster, "brokers", lambda: [SimpleNamespace(nodeId=1)])
    await client._metadata_update(client.cluster, ["mim.items"])
    await client._metadata_update(client.cluster, None)
    assert [
        request._vals["allow_auto_topic_creation"] if hasattr(request, "_vals") else request.allow_auto_topic_creation
        for request in connection.sent
    ] == [False, False]


class Admin:
    """A broker with `items`, that hides `models` and lacks the others."""

    def describe_cluster(self) -> dict[str, Any]:
        return {"cluster_id": "c", "brokers": [1, 2, 3]}

    def describe_topics(self, names: list[str]) -> list[dict[str, Any]]:
        there = [{"partition_index": 0, "replica_nodes": [1, 2, 3]}, {"partition_index": 1, "replica_nodes": [1, 2]}]
        rows = {"mim.items": (0, there), "mim.models": (29, [])}
        return [
            {
                "name": name,
                "error_code": rows.get(name, (3, []))[0],
                "partitions": rows.get(name, (3, []))[1],
                "topic_id": "t",
                "authorized_operations": ["READ"] if name == "mim.items" else None,
            }
            for name in names
        ]

    def describe_configs(self, resources: Any, config_filter: str) -> dict[str, dict[str, Any]]:
        return {"topic": {one.name: {} for one in resources}}

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _admin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "make_admin", lambda broker: Admin())


def test_a_topic_that_is_not_there_is_told_with_the_command_that_makes_it() -> None:
    with pytest.raises(Misconfigured, match=r"'mim.forgotten' does not exist.*mimstream topics create"):
        cluster.describe_topics(BROKER, TopicsConfig(), ["items", "forgotten"])


def test_a_topic_that_a_login_may_not_see_is_not_called_missing() -> None:
    with pytest.raises(Misconfigured, match=r"'mim.models'.* may not be seen.*MIM_KAFKA__SASL_USERNAME.*--rights"):
        cluster.describe_topics(BROKER, TopicsConfig(), ["items", "models"])


def test_what_the_cluster_says_beside_names_is_kept() -> None:
    names: Any = ["items", "models", "forgotten"]
    found = cluster.describe_topics(BROKER, TopicsConfig(), names, with_configs=True, missing_ok=True)
    assert found.hidden == {"models"} and found.brokers == 3
    assert found.replicas == {"items": 2} and found.rights == {"items": frozenset({"READ"})}
    assert found.configs == {}  # a broker gives no settings to a login that may not read them


def test_settings_of_topics_are_read_on_request_by_their_short_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Readable(Admin):
        asked = 0

        def describe_configs(self, resources: Any, config_filter: str) -> dict[str, dict[str, Any]]:
            self.asked += 1
            assert [one.name for one in resources] == ["mim.items"] and config_filter == "all"
            return {"topic": {"mim.items": {"cleanup.policy": {"value": "compact"}, "retention.ms": 5}}}

    admin = Readable()
    monkeypatch.setattr(cluster, "make_admin", lambda broker: admin)
    names: Any = ["items", "models", "forgotten"]
    found = cluster.describe_topics(BROKER, TopicsConfig(), names, with_configs=True, missing_ok=True)
    assert found.configs == {"items": {"cleanup.policy": "compact", "retention.ms": "5"}}
    assert cluster.describe_topics(BROKER, TopicsConfig(), names, missing_ok=True).configs == {} and admin.asked == 1
    cluster.describe_topics(BROKER, TopicsConfig(), ["forgotten"], with_configs=True, missing_ok=True)
    assert admin.asked == 1  # of nothing there is nothing to ask
    assert cluster.read_incarnation(BROKER, TopicsConfig(), "items").topic_id == "t"
