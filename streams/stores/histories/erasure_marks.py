"""Marks of forgotten users, beside the data in Redis: up to which offsets of which log. No user id is kept.

    <prefix>record:forgotten       hash: cluster, topic id and ends, by a hash of the user's id
    <prefix>record:forgotten:at    hash: next offset of each partition of each incarnation of the topic `forgotten`

Neither belongs to a generation of the view: they outlive a rebuild.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from schemas.forgotten import ForgottenUser


@dataclass(frozen=True, slots=True)
class ErasureMark:
    """Up to which offsets of which log a user's records are ignored."""

    cluster_id: str
    topic_id: str
    ends: dict[int, int]

    @classmethod
    def of(cls, user: ForgottenUser) -> ErasureMark:
        """The mark of a user who asked to be forgotten."""
        return cls(user.cluster_id, user.topic_id, {partition: end for partition, end in user.ends.items() if end})

    @classmethod
    def parse(cls, raw: bytes) -> ErasureMark:
        """Read what `dump` wrote."""
        cluster_id, topic_id, ends = json.loads(raw)
        return cls(cluster_id, topic_id, {int(partition): offset for partition, offset in ends.items()})

    def dump(self) -> bytes:
        """Write for Redis."""
        return json.dumps([self.cluster_id, self.topic_id, self.ends]).encode()

    def ends_in(self, cluster_id: str, topic_id: str) -> dict[int, int]:
        """The ends, if they are those of this log; empty otherwise, since all of this log came later."""
        return self.ends if (self.cluster_id, self.topic_id) == (cluster_id, topic_id) else {}


class RedisErasureMarks:
    """The marks under one key prefix. The caller passes its pipeline, so that marks and data change atomically."""

    def __init__(self, root: str) -> None:
        self.key = f"{root}forgotten"
        self.at_key = f"{root}forgotten:at"

    async def ends(
        self, pipe: Any, users: Sequence[str], *, cluster_id: str, topic_id: str
    ) -> dict[str, dict[int, int]]:
        """Ends of those of `users` who were forgotten, in this log. `pipe` is in immediate mode (before `multi`)."""
        if not users or not await pipe.exists(self.key):
            return {}
        found = await pipe.hmget(self.key, [_field(user) for user in users])
        marks = {user: ErasureMark.parse(raw) for user, raw in zip(users, found, strict=True) if raw is not None}
        return {user: mark.ends_in(cluster_id, topic_id) for user, mark in marks.items()}

    async def position(self, pipe: Any, source: str) -> int:
        """Next offset of a source. `pipe` is in immediate mode (before `multi`)."""
        return int(await pipe.hget(self.at_key, source) or 0)

    def add(self, pipe: Any, users: Sequence[ForgottenUser], *, source: str, next_offset: int) -> None:
        """Queue marks and the new position in the transaction of `pipe`."""
        for user in users:
            pipe.hset(self.key, _field(user.user_id), ErasureMark.of(user).dump())
        pipe.hset(self.at_key, source, next_offset)

    async def positions(self, client: Any) -> dict[str, int]:
        """Next offset of each source."""
        found = await client.hgetall(self.at_key)
        return {source.decode(): int(offset) for source, offset in found.items()}


def _field(user_id: str) -> bytes:
    return blake2b(user_id.encode(), digest_size=16).digest()
