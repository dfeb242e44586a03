"""The table of topics: name, key, schema, partitions, compaction and retention. All topics are created from here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from kafka import errors as kafka_errors
from kafka.admin import NewTopic
from pydantic import BaseModel, ConfigDict, Field

from schemas.behaviours import Behaviour
from schemas.errors import BrokerUnavailable
from schemas.forgotten import ForgottenUser
from schemas.item_states import ItemState
from schemas.items import ImageRetry, ItemEmbedding, ItemPublished
from schemas.manifests import ReleaseNotice
from schemas.queries import QueryEmbedding
from schemas.skew import SkewRecord
from streams.broker.clients import BrokerConfig, broker_errors, make_admin

TopicName = Literal[
    "items",
    "behaviours",
    "embeddings",
    "queries",
    "item-states",
    "skew",
    "models",
    "forgotten",
    "items-retry",
    "dead-letters",
]

DEAD_LETTER_HEADROOM_BYTES = 1_048_576
"""How much larger a dead letter may be than the records that feed it: the original bytes plus headers must fit."""

QUERY_REPEAT_HOURS = 24
"""How long after a query was announced it is announced again, if it is searched again."""

_HOUR_MS = 3600 * 1000
_DAY_MS = 24 * _HOUR_MS


class TopicsConfig(BaseModel):
    """Names and sizes of the topics."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prefix: str = Field(default="mim.", pattern=r"^[A-Za-z0-9._-]{0,64}$")
    """Put before every topic name and consumer group, so that several systems can share a cluster."""
    partitions: int = Field(default=4, ge=1, le=512)
    """Partitions of the keyed topics. Do not raise it later: a keyed topic would rehash its keys."""
    replication_factor: int | None = Field(default=None, ge=1, le=9)
    """Replicas of each partition; by default the cluster's own default. 3 in production."""
    min_insync_replicas: int | None = Field(default=None, ge=1, le=9)
    """How many replicas must have a record before it counts as written; by default 2 where `replication_factor` is 3 or
    more, else the cluster's own default."""
    behaviours_retention_days: int = Field(default=14, ge=1)
    """How long the click log is kept, by produce time."""
    tombstone_retention_hours: int = Field(default=7 * 24, ge=1)
    """How long a delete stays readable in the compacted topics; a worker that is away longer must rebuild."""

    def full_name(self, name: TopicName) -> str:
        """The name on the cluster."""
        return f"{self.prefix}{name}"

    def short_name(self, full_name: str) -> str:
        """The name without prefix."""
        return full_name.removeprefix(self.prefix)

    def group(self, role: str) -> str:
        """The consumer group of a role (`index`, `record`, `train`)."""
        return f"{self.prefix}{role}"


@dataclass(frozen=True)
class TopicSpec:
    """One row of the table."""

    name: TopicName
    key: str
    schema: type | None
    purpose: str
    compacted: bool = False
    expires_after_log: bool = False
    """Whether records of a compacted topic are removed with age too, after the behaviours that they were written for.
    For keys that no tombstone ever removes."""
    single_partition: bool = False
    extra: dict[str, str] = field(default_factory=dict)

    def partitions(self, config: TopicsConfig) -> int:
        """How many partitions the topic has."""
        return 1 if self.single_partition else config.partitions

    def max_record_bytes(self, broker: BrokerConfig) -> int:
        """The largest record that the topic must accept."""
        return broker.max_record_bytes + (DEAD_LETTER_HEADROOM_BYTES if self.name == "dead-letters" else 0)

    def settings(self, config: TopicsConfig, broker: BrokerConfig) -> dict[str, str]:
        """Topic configuration as Kafka wants it."""
        settings = {"max.message.bytes": str(self.max_record_bytes(broker)), **self.extra}
        insync = config.min_insync_replicas or (2 if (config.replication_factor or 0) >= 3 else None)
        if insync is not None:
            settings["min.insync.replicas"] = str(insync)
        if self.compacted:
            settings |= {
                "cleanup.policy": "compact,delete" if self.expires_after_log else "compact",
                "delete.retention.ms": str(config.tombstone_retention_hours * _HOUR_MS),
            }
            if self.expires_after_log:
                kept_ms = config.behaviours_retention_days * _DAY_MS + QUERY_REPEAT_HOURS * _HOUR_MS
                settings |= {"retention.ms": str(kept_ms), "retention.bytes": "-1"}
        else:
            # the cluster's own defaults may cut a topic off earlier, or keep the last record of each key alone
            settings |= {"cleanup.policy": "delete", "retention.bytes": "-1"}
            if self.name == "behaviours":
                settings["retention.ms"] = str(config.behaviours_retention_days * _DAY_MS)
        return settings


TOPICS: dict[TopicName, TopicSpec] = {
    spec.name: spec
    for spec in (
        TopicSpec("items", "item_id", ItemPublished, "publish, update, delete (tombstone) of items", compacted=True),
        TopicSpec("behaviours", "user_id", Behaviour, "exposures, clicks, carts, purchases"),
        TopicSpec(
            "embeddings",
            "encoder_version:item_id",
            ItemEmbedding,
            "what the representation center now holds, vector included",
            compacted=True,
        ),
        TopicSpec(
            "queries",
            "encoder_version:query",
            QueryEmbedding,
            "vectors of what users searched for, as long as behaviours name it",
            compacted=True,
            expires_after_log=True,
        ),
        TopicSpec(
            "item-states",
            "feature_version:hash of item_id",
            ItemState,
            "what the takes of each item left behind, as the trainer counted them",
            compacted=True,
            single_partition=True,  # a write ends with its head, for those who read it too
        ),
        TopicSpec(
            "skew",
            "kind of the record",
            SkewRecord,
            "rows that servers scored, and whether the trainer computes the same features",
            single_partition=True,
            extra={"retention.ms": str(2 * _DAY_MS)},
        ),
        TopicSpec("forgotten", "user_id", ForgottenUser, "users who asked to be forgotten", compacted=True),
        TopicSpec("models", "release_id", ReleaseNotice, "notices of releases", single_partition=True),
        TopicSpec(
            "items-retry",
            "item_id",
            ImageRetry,
            "items whose picture is fetched again later; same partitions as items",
            # base64 of the picture inside JSON inside JSON
            extra={"retention.ms": str(7 * _DAY_MS)},
        ),
        TopicSpec(
            "dead-letters",
            "topic/partition/offset of the source",
            None,
            "original bytes of what could not be processed, reason in headers",
            extra={"retention.ms": str(30 * _DAY_MS)},
        ),
    )
}


BROKER_DEFAULT = -1
"""How a creation asks for the cluster's own number of replicas."""

_VISIBLE_WITHIN_SECONDS = 30.0


def create_topics(broker: BrokerConfig, config: TopicsConfig) -> list[str]:
    """Create what is missing; existing topics are left as they are. Returns the names created. Blocking.

    A broker answers a creation before all brokers can see the topic. So this returns once each partition has a leader:
    the next process to start must not find them missing.
    """
    admin = make_admin(broker)
    created: list[str] = []
    try:
        with broker_errors(broker):
            existing = set(admin.list_topics())
            for spec in TOPICS.values():
                name = config.full_name(spec.name)
                if name in existing:
                    continue
                new = NewTopic(
                    name=name,
                    num_partitions=spec.partitions(config),
                    replication_factor=config.replication_factor or BROKER_DEFAULT,
                    topic_configs=spec.settings(config, broker),
                )
                try:
                    admin.create_topics([new])
                except kafka_errors.TopicAlreadyExistsError:
                    continue  # another process was faster
                created.append(name)
            _wait_until_visible(admin, created, broker)
    finally:
        admin.close()
    return created


def _wait_until_visible(admin: Any, names: list[str], broker: BrokerConfig) -> None:
    deadline = time.monotonic() + _VISIBLE_WITHIN_SECONDS
    while names:
        described = admin.describe_topics(names)
        names = [topic["name"] for topic in described if not _is_led(topic)]
        if not names:
            return
        if time.monotonic() > deadline:
            raise BrokerUnavailable(
                "Kafka", f"{broker.bootstrap_servers}: topics {', '.join(names)} were created and have no leader yet"
            )
        time.sleep(0.1)


def _is_led(topic: dict[str, Any]) -> bool:
    partitions = topic["partitions"]
    return bool(partitions) and not topic["error_code"] and all(one["leader_id"] >= 0 for one in partitions)
