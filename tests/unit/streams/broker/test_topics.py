"""Which topics are made, how, and when they count as there."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
from kafka import errors as kafka_errors

from schemas.errors import BrokerUnavailable
from streams.broker import topics as topics_module
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics
from streams.broker.topics import TOPICS, TopicsConfig, create_topics
from streams.commands import topics as command
from streams.settings import Settings


class Admin:
    """A broker that has some topics, and shows a new one's leader after so many looks."""

    def __init__(self, *existing: str) -> None:
        self.existing, self.made, self.closed = list(existing), list[Any](), False
        self.faster: set[str] = set()
        self.looks, self.described = 0, list[list[str]]()

    def list_topics(self) -> list[str]:
        return self.existing

    def create_topics(self, new: list[Any]) -> None:
        if new[0].name in self.faster:
            raise kafka_errors.TopicAlreadyExistsError
        self.made += new

    def describe_topics(self, names: list[str]) -> list[dict[str, Any]]:
        self.described.append(list(names))
        self.looks -= 1
        parts = [{"leader_id": 1}, {"leader_id": -1 if self.looks >= 0 else 0}]
        return [{"name": name, "error_code": 0, "partitions": parts} for name in names]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Admin:
    made = Admin()
    monkeypatch.setattr(topics_module, "make_admin", lambda broker: made)
    monkeypatch.setattr(topics_module.time, "sleep", lambda seconds: None)
    return made


def test_what_is_missing_is_made_as_the_table_says_and_what_is_there_is_left(admin: Admin) -> None:
    config = TopicsConfig(partitions=5, replication_factor=3)
    admin.existing, admin.faster = ["mim.items", "models"], {"mim.behaviours"}
    created = create_topics(BrokerConfig(), config)
    assert created == [config.full_name(name) for name in TOPICS if name not in ("items", "behaviours")]
    assert [new.name for new in admin.made] == created and admin.closed
    for new in admin.made:
        spec = TOPICS[new.name.removeprefix("mim.")]
        assert (new.num_partitions, new.replication_factor) == (
            1 if spec.name in ("models", "item-states", "skew") else 5,
            3,
        )
        assert new.topic_configs == spec.settings(config, BrokerConfig())
    assert create_topics(BrokerConfig(), TopicsConfig(prefix="x."))[0] == "x.items"
    assert admin.made[-1].replication_factor == -1  # the cluster's own


def test_a_topic_counts_once_every_partition_has_a_leader_or_is_told(
    admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin.looks = 3
    assert len(create_topics(BrokerConfig(), TopicsConfig())) == len(TOPICS)
    assert len(admin.described) == 4
    admin.existing = [new.name for new in admin.made]
    assert create_topics(BrokerConfig(), TopicsConfig()) == [] and len(admin.described) == 4
    admin.existing, admin.looks = [], 99
    now = iter(range(0, 1_000, 10))
    monkeypatch.setattr(topics_module.time, "monotonic", lambda: next(now))
    with pytest.raises(BrokerUnavailable, match=r"topics mim\.items, .* have no leader yet"):
        create_topics(BrokerConfig(), TopicsConfig())


@pytest.mark.parametrize(
    ("topic", "led"),
    [
        ({"error_code": 0, "partitions": [{"leader_id": 0}]}, True),
        ({"error_code": 0, "partitions": []}, False),
        ({"error_code": 3, "partitions": [{"leader_id": 0}]}, False),
        ({"error_code": 0, "partitions": [{"leader_id": 0}, {"leader_id": -1}]}, False),
    ],
)
def test_a_topic_is_led_if_all_its_partitions_are(topic: dict[str, Any], led: bool) -> None:
    assert topics_module._is_led(topic) is led


@pytest.mark.parametrize("name", TOPICS)
def test_compacted_topics_keep_deletes_and_others_keep_everything_for_their_time(name: Any) -> None:
    config = TopicsConfig(behaviours_retention_days=2, tombstone_retention_hours=3)
    settings = TOPICS[name].settings(config, BrokerConfig(max_record_bytes=5_000))
    headroom = 1_048_576 if name == "dead-letters" else 0
    assert settings["max.message.bytes"] == str(5_000 + headroom) and "min.insync.replicas" not in settings
    if name == "queries":  # a day longer than the log: that late, what was announced is announced again
        assert settings["cleanup.policy"] == "compact,delete" and settings["retention.bytes"] == "-1"
        assert settings["retention.ms"] == str(3 * 86_400_000)
        assert settings["delete.retention.ms"] == str(3 * 3_600_000)
    elif name in ("items", "embeddings", "item-states", "forgotten"):
        assert (settings["cleanup.policy"], settings["delete.retention.ms"]) == ("compact", str(3 * 3_600_000))
    else:
        days = {"behaviours": 2, "skew": 2, "items-retry": 7, "dead-letters": 30}.get(name)
        assert settings["cleanup.policy"] == "delete" and settings["retention.bytes"] == "-1"
        assert settings.get("retention.ms") == (None if days is None else str(days * 86_400_000))


@pytest.mark.parametrize(
    ("replicas", "given", "needed"),
    [(None, None, None), (2, None, None), (3, None, "2"), (4, None, "2"), (3, 1, "1"), (None, 2, "2")],
)
def test_of_three_replicas_two_have_to_have_a_record_unless_it_is_set(
    replicas: int | None, given: int | None, needed: str | None
) -> None:
    config = TopicsConfig(replication_factor=replicas, min_insync_replicas=given)
    for spec in TOPICS.values():
        assert spec.settings(config, BrokerConfig()).get("min.insync.replicas") == needed


def test_the_command_makes_them_or_shows_what_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> str:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        assert command.run(parser.parse_args(arguments), Settings()) == 0
        return capsys.readouterr().out

    monkeypatch.setattr(command, "create_topics", lambda *_: ["a", "b"])
    assert call("create") == "a\nb\n" and json.loads(call("create", "--json")) == {"created": ["a", "b"]}
    monkeypatch.setattr(command, "create_topics", lambda *_: [])
    assert call("create") == "nothing to create\n"
    found = ClusterTopics(
        "c", {}, {"items": [0, 1, 2]}, configs={}, hidden=frozenset({"models"}), replicas={"items": 2}, brokers=3
    )
    monkeypatch.setattr(command, "describe_topics", lambda *_, missing_ok: found)
    rows = {row["topic"]: row for row in json.loads(call("list", "--json"))}
    assert {name: rows[f"mim.{name}"]["exists"] for name in ("items", "models", "behaviours")} == {
        "items": True, "models": None, "behaviours": False,
    }  # fmt: skip
    assert (rows["mim.items"]["partitions"], rows["mim.items"]["replicas"], rows["mim.items"]["compacted"]) == (
        3,
        2,
        True,
    )
    assert rows["mim.behaviours"]["partitions"] is None and rows["mim.behaviours"]["wanted"]["partitions"] == 4
    assert "unknown: not visible to this login" in call("list")
