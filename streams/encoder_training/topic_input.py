"""Training data of an encoder from the topics: all of `items` and `behaviours` as they are now, with offsets."""

from __future__ import annotations

import asyncio
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import structlog

from encoders.base import ItemContent
from schemas.behaviours import Behaviour
from schemas.errors import BadMessage
from schemas.field_maps import FieldMap
from schemas.items import ItemPublished
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import describe_topics
from streams.broker.forgotten import read_forgotten_users
from streams.broker.log_reader import LogReader
from streams.broker.records import behaviour_of, read_item, read_item_id
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
    """Records that could not be read; the index worker and the recorder write their dead letters."""
    erased: int = 0
    """Behaviours of users who asked to be forgotten since; they are left out."""

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
    item_fields: FieldMap,
    behaviour_fields: FieldMap,
    *,
    only_items: bool = False,
    outcomes: Container[str] = (),
) -> TopicContent:
    """Read from the beginnings to the ends as they are at the start, without attributes that are `outcomes`. Nothing is
    committed.

    Raises `Misconfigured` if a topic does not exist, `BrokerUnavailable` if no broker answers.
    """
    names: list[TopicName] = ["items"] if only_items else ["items", "behaviours"]
    described = await asyncio.to_thread(describe_topics, broker, topics, names)
    found = TopicContent(cluster_id=described.cluster_id)
    gone = ForgottenUsers(None, None)
    if not only_items:
        log_now = described.incarnation(topics, "behaviours")
        gone = await read_forgotten_users(broker, topics, cluster_id=log_now.cluster_id, topic_id=log_now.topic_id)
    async with LogReader(broker, topics) as reader:
        bounds = await reader.bounds(described.topic_partitions(topics, *names))
        for partition, (start, end) in bounds.items():
            name = topics.short_name(partition.topic)
            found.offsets.setdefault(name, {})[partition.partition] = end
            async for record in reader.read(partition, start, end):
                if name == "items":
                    _add_item(found, record, broker, item_fields, outcomes)
                else:
                    _add_behaviour(found, record, broker, behaviour_fields, gone)
    counts = {"behaviours": len(found.behaviours), "broken": found.broken, "erased": found.erased}
    log.info("csft.topics_read", items=len(found.items), **counts)
    return found


def _add_item(
    found: TopicContent, record: Any, broker: BrokerConfig, fields: FieldMap, outcomes: Container[str] = ()
) -> None:
    try:
        item_id = read_item_id(record.key)
        if record.value is None:
            found.items.pop(item_id, None)
            return
        item = read_item(
            record.value, record.timestamp, record.headers, max_bytes=broker.max_record_bytes, field_map=fields
        )
    except BadMessage:
        found.broken += 1
        return
    if item.item_id == item_id:
        found.items[item_id] = item.without(outcomes)
    else:
        found.broken += 1


def _add_behaviour(
    found: TopicContent, record: Any, broker: BrokerConfig, fields: FieldMap, gone: ForgottenUsers
) -> None:
    behaviour = behaviour_of(record, broker, fields)
    if behaviour is None:
        found.broken += 1
    elif gone.erases(behaviour.user_id, record.partition, record.offset):
        found.erased += 1
    else:
        found.behaviours.append((record.partition, record.offset, behaviour))
