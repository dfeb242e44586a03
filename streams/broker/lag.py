"""How far consumer groups are behind what was sent."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Self

from aiokafka import TopicPartition
from typing_extensions import override

from streams.broker.clients import BrokerConfig
from streams.broker.cluster import describe_topics
from streams.broker.log_reader import LogReader
from streams.broker.topics import TopicName, TopicsConfig


class GroupPositions(LogReader):
    """Committed positions of consumer groups, counted from where the topics ended when this was opened."""

    def __init__(self, broker: BrokerConfig, topics: TopicsConfig, followed: Mapping[TopicName, Sequence[str]]) -> None:
        """`followed` names the roles (`index`, `record`, `train`) whose groups read each topic."""
        super().__init__(broker, topics)
        self._followed = {name: list(roles) for name, roles in followed.items()}
        self._base: dict[TopicPartition, int] = {}

    @override
    async def __aenter__(self) -> Self:
        await super().__aenter__()
        try:
            found = await asyncio.to_thread(describe_topics, self._broker, self._topics, self._followed)
            bounds = await self.bounds(found.topic_partitions(self._topics, *self._followed))
        except BaseException:
            await self._close()
            raise
        self._base = {partition: end for partition, (_, end) in bounds.items()}
        return self

    async def consumed(self) -> dict[TopicName, dict[str, int]]:
        """Topic -> role -> records committed since this was opened."""
        roles = sorted({role for roles in self._followed.values() for role in roles})
        committed = dict(zip(roles, await asyncio.gather(*map(self.committed, roles)), strict=True))
        result: dict[TopicName, dict[str, int]] = {}
        for name, followers in self._followed.items():
            base = {one: offset for one, offset in self._base.items() if one.topic == self._topics.full_name(name)}
            result[name] = {
                role: sum(max(0, committed[role].get(one, 0) - offset) for one, offset in base.items())
                for role in followers
            }
        return result
