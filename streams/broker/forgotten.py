"""Users to be forgotten, as the topic `forgotten` names them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import structlog

from schemas.base import decode
from schemas.errors import BadMessage, Reason
from schemas.forgotten import ForgottenUser
from streams.broker.clients import BrokerConfig
from streams.broker.topic_follower import TopicFollower
from streams.broker.topics import TopicsConfig
from trainer.samples.forgotten import ForgottenUsers

log = structlog.get_logger()

_ANY_TIME = datetime.max.replace(tzinfo=UTC)
"""Offsets decide what is erased: nobody stays remembered because a clock was wrong, of the request or of its record."""


Tell = Callable[[Sequence[ForgottenUser], str, int], Awaitable[None]]
"""Gets users, the source that they were read from (a partition of this incarnation of the topic), the offset after."""


class ForgottenFollower(TopicFollower):
    """Reads `forgotten` from given positions on. `tell` may raise what is `Unavailable`: the users come again."""

    def __init__(self, broker: BrokerConfig, topics: TopicsConfig, tell: Tell) -> None:
        async def tell_records(records: Sequence[Any], source: str, next_offset: int) -> None:
            await tell(read_forgotten(records, max_bytes=broker.max_record_bytes), source, next_offset)

        super().__init__(broker, topics.full_name("forgotten"), tell_records)


def read_forgotten(records: Sequence[Any], *, max_bytes: int) -> list[ForgottenUser]:
    """Decode records of `forgotten`; one that cannot be read is told loudly, since somebody waits for it."""
    users = []
    for record in records:
        try:
            if record.value is None:
                continue  # nobody writes these; a request is not taken back
            user = decode(ForgottenUser, record.value, now=_ANY_TIME, max_bytes=max_bytes)
            if record.key != user.user_id.encode():
                raise BadMessage(Reason.KEY_MISMATCH, "the key is not the user_id")
        except BadMessage as error:
            log.error("forgotten.unreadable", partition=record.partition, offset=record.offset, error=str(error))
        else:
            users.append(user)
    return users


async def read_forgotten_users(
    broker: BrokerConfig, topics: TopicsConfig, *, cluster_id: str | None, topic_id: str | None
) -> ForgottenUsers:
    """Everybody who was forgotten so far in the click log of this id. Raises as `ForgottenFollower.open` does."""
    gone = ForgottenUsers(cluster_id, topic_id)

    async def tell(users: Sequence[ForgottenUser], source: str, next_offset: int) -> None:
        for user in users:
            gone.add(user)

    follower = ForgottenFollower(broker, topics, tell)
    try:
        await follower.open()
        await follower.catch_up()
    finally:
        await follower.close()
    return gone
