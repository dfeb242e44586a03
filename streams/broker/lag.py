"""How far consumer groups are behind what was sent: asked from Kafka every now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from schemas.errors import Misconfigured
from streams.broker.clients import BrokerConfig, broker_errors, make_consumer
from streams.broker.topics import TopicName, TopicsConfig


class GroupPositions:
    """Committed positions of consumer groups, counted from where the topics ended when this was opened."""

    def __init__(self, broker: BrokerConfig, topics: TopicsConfig, followed: Mapping[TopicName, Sequence[str]]) -> None:
        """`followed` names the roles (`index`, `record`, `train`) whose groups read each topic."""
        self._broker = broker
        self._topics = topics
        self._followed = {name: list(roles) for name, roles in followed.items()}
        self._admin: AIOKafkaAdminClient | None = None
        self._base: dict[TopicPartition, int] = {}

    async def __aenter__(self) -> Self:
        self._admin = AIOKafkaAdminClient(**self._broker.client_options())
        consumer: AIOKafkaConsumer = make_consumer(self._broker)
        with broker_errors(self._broker):
            try:
                await self._admin.start()
                await consumer.start()
                topics = [self._topics.full_name(name) for name in self._followed]
                partitions = []
                for topic in await self._admin.describe_topics(topics):
                    if not topic["partitions"]:
                        raise Misconfigured(f"topic {topic['topic']} does not exist: run `mimstream topics create`")
                    partitions += [TopicPartition(topic["topic"], one["partition"]) for one in topic["partitions"]]
                consumer.assign(partitions)
                self._base = await consumer.end_offsets(partitions)
            except BaseException:
                await self._admin.close()
                raise
            finally:
                await consumer.stop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._admin is not None:
            await self._admin.close()

    async def consumed(self) -> dict[TopicName, dict[str, int]]:
        """Topic -> role -> records committed since this was opened."""
        assert self._admin is not None, "enter the context first"
        roles = sorted({role for roles in self._followed.values() for role in roles})
        with broker_errors(self._broker):
            answers = await asyncio.gather(
                *(self._admin.list_consumer_group_offsets(self._topics.group(role)) for role in roles)
            )
        committed = dict(zip(roles, answers, strict=True))
        result: dict[TopicName, dict[str, int]] = {}
        for name, followers in self._followed.items():
            partitions = [one for one in self._base if one.topic == self._topics.full_name(name)]
            result[name] = {
                role: sum(
                    max(0, committed[role][one].offset - self._base[one])
                    for one in partitions
                    if one in committed[role]
                )
                for role in followers
            }
        return result
