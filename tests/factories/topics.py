"""Topics on a real broker: read whole, or deleted and created again."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from kafka import TopicPartition

from streams.broker.clients import make_admin
from streams.broker.log_reader import LogReader
from streams.broker.topics import TopicName, create_topics
from streams.settings import Settings
from tests.factories.waiting import wait_until


async def read_all(settings: Settings, topic: TopicName) -> list[Any]:
    """Every record of a topic up to its end now, one partition after another."""
    async with LogReader(settings.kafka, settings.topics) as reader:
        return [record async for record in reader.read_topic(topic)]


def create_anew(settings: Settings, topic: TopicName) -> None:
    """Delete a topic, and create it under the same name."""
    name = settings.topics.full_name(topic)
    with closing(make_admin(settings.kafka)) as admin:
        admin.delete_topics([name])
    wait_until(lambda: name in create_topics(settings.kafka, settings.topics), f"{name} to be there again")


def delete_records(settings: Settings, topic: TopicName, before: int) -> None:
    """Delete the records of every partition before an offset; -1 deletes all."""
    with closing(make_admin(settings.kafka)) as admin:
        partitions = [TopicPartition(settings.topics.full_name(topic), p) for p in range(settings.topics.partitions)]
        admin.delete_records(dict.fromkeys(partitions, before))
