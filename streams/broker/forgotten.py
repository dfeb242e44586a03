"""Follows the topic `forgotten`: users who asked to be forgotten."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from schemas.forgotten import ForgottenUser
from streams.broker.clients import BrokerConfig
from streams.broker.records import read_forgotten
from streams.broker.topic_follower import TopicFollower
from streams.broker.topics import TopicsConfig
from trainer.samples.forgotten import ForgottenUsers

ForgetUsers = Callable[[Sequence[ForgottenUser], str, int], Awaitable[None]]
"""Called with users, the source that they were read from (a partition of this incarnation of the topic), and the offset
after them."""


class ForgottenFollower(TopicFollower):
    """Reads `forgotten` from given positions on. `forget` may raise `Unavailable`: the users come again."""

    def __init__(self, broker: BrokerConfig, topics: TopicsConfig, forget: ForgetUsers) -> None:
        async def handle(records: Sequence[Any], source: str, next_offset: int) -> None:
            await forget(read_forgotten(records, max_bytes=broker.max_record_bytes), source, next_offset)

        super().__init__(broker, topics, "forgotten", handle)


async def read_forgotten_users(
    broker: BrokerConfig, topics: TopicsConfig, *, cluster_id: str | None, topic_id: str | None
) -> ForgottenUsers:
    """All users forgotten so far in the click log of this id. Raises as `ForgottenFollower.open` does."""
    gone = ForgottenUsers(cluster_id, topic_id)

    async def add(users: Sequence[ForgottenUser], source: str, next_offset: int) -> None:
        for user in users:
            gone.add(user)

    follower = ForgottenFollower(broker, topics, add)
    try:
        await follower.open()
        await follower.catch_up()
    finally:
        await follower.close()
    return gone
