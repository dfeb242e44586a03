"""Marks of forgotten users, beside the data in Redis: up to which offsets of which log. No user id is kept.

    <prefix>record:forgotten       hash: cluster, topic id and ends, by a hash of the user's id
    <prefix>record:forgotten:at    hash: next offset of each partition of each incarnation of the topic `forgotten`

Neither belongs to a generation of the view: they outlive a rebuild. A mark goes once the click log holds no record from
before the erasure any more (`ErasureMark.is_spent`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from schemas.forgotten import ForgottenUser
from streams.broker.cluster import TopicIncarnation


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

    def is_spent(self, log: TopicIncarnation, beginnings: Mapping[int, int], positions: Mapping[int, int]) -> bool:
        """Whether no record of this log below the ends can come any more: retention deleted them, and what a recorder
        may still hold of them lies below the position of the store.

        A mark of another log says nothing about this one.
        """
        return all(
            min(beginnings.get(partition, 0), positions.get(partition, 0)) >= end
            for partition, end in self.ends_in(log.cluster_id, log.topic_id).items()
        )


_SCAN_PAGE = 1_000

_DROP = """
local dropped = 0
for i = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then
    dropped = dropped + redis.call('HDEL', KEYS[1], ARGV[i])
  end
end
return dropped
"""
"""Compare and delete: the user may have been forgotten once more meanwhile."""


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

    async def drop(self, client: Any, spent: Callable[[ErasureMark], bool], *, sources: Collection[str]) -> int:
        """Delete marks that are spent, and positions of sources that are not among `sources`; how many marks.

        So if another log is bound again later, its requests are read again.
        """
        if foreign := [source for source in await self.positions(client) if source not in sources]:
            await client.hdel(self.at_key, *foreign)
        cursor, dropped = 0, 0
        while True:
            cursor, page = await client.hscan(self.key, cursor, count=_SCAN_PAGE)
            old = [part for mark in page.items() if spent(ErasureMark.parse(mark[1])) for part in mark]
            if old:
                dropped += int(await client.eval(_DROP, 1, self.key, *old))
            if cursor == 0:
                return dropped

    async def positions(self, client: Any) -> dict[str, int]:
        """Next offset of each source."""
        found = await client.hgetall(self.at_key)
        return {source.decode(): int(offset) for source, offset in found.items()}


def _field(user_id: str) -> bytes:
    return blake2b(user_id.encode(), digest_size=16).digest()
