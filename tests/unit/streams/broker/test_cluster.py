"""Whether stored offsets belong to the topics that the cluster has."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.errors import BrokerUnavailable, Misconfigured
from streams.broker import cluster
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics, TopicIncarnation, assigned_topics
from streams.broker.topics import TopicsConfig

FOUND = ClusterTopics("c1", {"items": "t1"}, {"items": [0, 1]})


def test_offsets_of_another_incarnation_are_refused_with_both_clusters_and_a_way_out() -> None:
    FOUND.refuse_other("release r1", "c1", {"items": "t1"}, or_else="train anew")
    for cluster_id, topic_ids in [("c2", {"items": "t1"}), ("c1", {"items": "t2"}), (None, {})]:
        with pytest.raises(Misconfigured, match=f"release r1 .* cluster {cluster_id}.* cluster c1.*, or train anew"):
            FOUND.refuse_other("release r1", cluster_id, topic_ids, or_else="train anew")


def test_topics_that_were_replaced_or_repartitioned_are_refused() -> None:
    FOUND.refuse_replaced(FOUND, way_out="Start again")
    others = {"hidden": frozenset({"skew"}), "replicas": {"items": 3}, "rights": {"items": frozenset()}, "brokers": 2}
    for name, value in others.items():  # what is not of the log itself may change
        FOUND.refuse_replaced(replace(FOUND, **{name: value}), way_out="Start again")
    for now in (replace(FOUND, topic_ids={"items": "t2"}), replace(FOUND, partitions={"items": [0, 1, 2]})):
        with pytest.raises(Misconfigured, match=r"deleted and created again.* Start again$"):
            FOUND.refuse_replaced(now, way_out="Start again")


def test_an_incarnation_has_the_full_name_and_needs_both_ids() -> None:
    assert FOUND.incarnation(TopicsConfig(), "items") == TopicIncarnation("c1", "mim.items", "t1")
    for incomplete in (replace(FOUND, cluster_id=None), replace(FOUND, topic_ids={})):
        with pytest.raises(BrokerUnavailable):
            incomplete.incarnation(TopicsConfig(), "items")


def test_a_member_has_the_topics_of_its_assignment_even_where_it_has_no_partition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def member(instance: str, held: Any) -> dict[str, Any]:
        return {"group_instance_id": instance, "member_assignment": held}

    given = {"assigned_partitions": [{"topic": "a", "partitions": [1]}, {"topic": "b", "partitions": []}]}
    members = [member("one", given), member("new", {"assigned_partitions": []}), member("joining", b"")]
    admin = SimpleNamespace(describe_groups=lambda names: {names[0]: {"members": members}}, close=lambda: None)
    monkeypatch.setattr(cluster, "make_admin", lambda _: admin)
    found = [assigned_topics(BrokerConfig(), "g", name) for name in ("one", "new", "joining", "nobody")]
    assert found == [{"a", "b"}, None, None, None]
