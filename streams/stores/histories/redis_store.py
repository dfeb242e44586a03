"""The behaviour store in Redis; the protocol is in `streams.stores.histories.store`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from redis.asyncio import Redis
from typing_extensions import override

from schemas.forgotten import ForgottenUser
from streams.broker.cluster import TopicIncarnation
from streams.broker.records import BehaviourRecord
from streams.stores.histories.client import MAX_CONFLICTS, RedisConfig, redis_errors, transact
from streams.stores.histories.config import BehaviourStoreConfig
from streams.stores.histories.erasure_marks import RedisErasureMarks
from streams.stores.histories.packed_history import (
    RecordReport,
    TakenItem,
    UserTakes,
    apply_batch,
    fresh_part,
    pack_takes,
    packed_history,
    packed_items,
    packed_takes,
    skipped,
    unpack_takes,
    without_erased,
)
from streams.stores.histories.store import (
    COUNTS,
    BehaviourStore,
    foreign_log,
    with_total,
)


@dataclass(frozen=True, slots=True)
class View:
    """The root of the view: one key, changed as a whole and watched by every write."""

    generation: int
    """Raised by `clear`; part of every key of the view."""
    log: TopicIncarnation | None
    """None until `bind`."""

    @staticmethod
    @lru_cache(maxsize=8)
    def parse(raw: bytes | None) -> View:
        """Read what `dump` wrote; cached, since every request reads it and it hardly ever changes."""
        if raw is None:
            return View(0, None)
        document = json.loads(raw)
        return View(document["generation"], TopicIncarnation(**document["log"]) if document["log"] else None)

    def dump(self) -> bytes:
        """Write for Redis."""
        return json.dumps({"generation": self.generation, "log": asdict(self.log) if self.log else None}).encode()


_SET_ALL = "for i = 1, #KEYS do redis.call('SET', KEYS[i], ARGV[i + 1], 'EX', ARGV[1]) end"
"""One command for all users of a batch: redis-py spends more on 500 commands than Redis does."""

_SCAN_PAGE = 1_000


class RedisBehaviourStore(BehaviourStore):
    """The protocol in Redis. Keys, below the prefix:

        record:view              generation and identity of the log
        record:G:p:P             hash: next_offset and counts of partition P
        record:G:partitions      set of the partitions seen
        record:G:t:USER          packed takes
        record:G:e:USER          packed hashes of recent event ids
        record:forgotten         see `streams.stores.histories.erasure_marks`
        record:deleted           see `streams.stores.histories.deleted_items`

    Every key of the view carries its generation G, so clearing is one write; older generations are deleted afterwards.
    A batch costs three round trips, whatever its size. Writes are optimistic: of two recorders that believe to own a
    partition only one succeeds. Durability is that of the server's own persistence; lost writes show in the position
    and are replayed.
    """

    def __init__(self, client: Redis, config: RedisConfig, keep: BehaviourStoreConfig | None = None) -> None:
        self._client: Any = client  # redis-py's stubs allow text everywhere; this client answers bytes
        self._config = config
        self._keep = keep or BehaviourStoreConfig()
        self._root = f"{config.key_prefix}record:"
        self._marks = RedisErasureMarks(self._root)
        self._view = View(0, None)

    @property
    def _view_key(self) -> str:
        return f"{self._root}view"

    def _key(self, generation: int, *parts: object) -> str:
        return f"{self._root}{generation}:" + ":".join(map(str, parts))

    @override
    async def bind(self, log: TopicIncarnation) -> None:
        def bound(found: View) -> View:
            if found.log is not None and found.log != log:
                raise foreign_log(found.log, log)
            return replace(found, log=log)

        await self._replace_view(bound)

    async def _replace_view(self, change: Callable[[View], View]) -> None:
        async def replace_it(pipe: Any) -> View:
            view = change(View.parse(await pipe.get(self._view_key)))
            pipe.multi()
            pipe.set(self._view_key, view.dump())
            return view

        conflict = "the behaviour view keeps being replaced by other processes"
        self._view = await transact(self._client, self._config, self._view_key, change=replace_it, conflict=conflict)

    async def bound_log(self) -> TopicIncarnation | None:
        """Return the log that the positions belong to; None before the first `bind`."""
        with redis_errors(self._config):
            return View.parse(await self._client.get(self._view_key)).log

    @override
    async def record(
        self, partition: int, events: Sequence[BehaviourRecord], *, first_offset: int, next_offset: int
    ) -> RecordReport:
        view = self._view
        position_key = self._key(view.generation, "p", partition)
        everyone = dict.fromkeys(e.behaviour.user_id for e in events if e.behaviour is not None)
        takers = dict.fromkeys(
            e.behaviour.user_id for e in events if e.behaviour is not None and e.behaviour.kind.is_take
        )
        user_keys = [
            *(self._key(view.generation, "e", user) for user in everyone),
            *(self._key(view.generation, "t", user) for user in takers),
        ]

        async def change(pipe: Any) -> RecordReport:
            stored_raw = await pipe.hget(position_key, "next_offset")
            raw_view, *values = await pipe.mget([self._view_key, *user_keys])
            stored = int(stored_raw or 0)
            if View.parse(raw_view) != view or view.log is None:
                return RecordReport(partition, 0, resume_from=0)  # cleared meanwhile: the caller has to bind again
            if stored < first_offset:
                return RecordReport(partition, stored, resume_from=stored)
            if stored >= next_offset:
                return RecordReport(partition, stored, replayed=len(events))
            ends = await self._marks.ends(
                pipe, list(everyone), cluster_id=view.log.cluster_id, topic_id=view.log.topic_id
            )
            unread = fresh_part(events, stored=stored)
            fresh = without_erased(unread, ends, partition=partition)
            users = {user: UserTakes() for user in everyone}
            for user, raw in zip(everyone, values, strict=False):
                users[user].recent = raw or b""
            for user, raw in zip(takers, values[len(everyone) :], strict=True):
                unpack_takes(raw, users[user])
            report, changed, took = apply_batch(
                users,
                fresh,
                partition=partition,
                next_offset=next_offset,
                length=self._keep.history_length,
                remembered=self._keep.remembered_event_ids,
            )
            report = skipped(report, replayed=len(events) - len(unread), erased=len(unread) - len(fresh))
            pipe.multi()
            self._write(pipe, view.generation, users, changed, took)
            pipe.hset(position_key, "next_offset", str(next_offset))
            for name in COUNTS:
                if getattr(report, name):
                    pipe.hincrby(position_key, name, getattr(report, name))
            pipe.sadd(self._key(view.generation, "partitions"), partition)
            return report

        watched = (self._view_key, position_key, self._marks.key, *user_keys)
        conflict = f"other processes keep writing to partition {partition} of the behaviour view"
        return await transact(self._client, self._config, *watched, change=change, conflict=conflict)

    @override
    async def forget(self, users: Sequence[ForgottenUser], *, source: str, next_offset: int) -> int:
        async def change(pipe: Any) -> int:
            generation = View.parse(await pipe.get(self._view_key)).generation
            if await self._marks.position(pipe, source) >= next_offset:
                return 0
            pipe.multi()
            self._marks.add(pipe, users, source=source, next_offset=next_offset)
            for user in users:
                pipe.delete(*(self._key(generation, kind, user.user_id) for kind in "te"))
            return len(users)

        watched = (self._view_key, self._marks.at_key)
        conflict = "other processes keep marking users as forgotten"
        return await transact(self._client, self._config, *watched, change=change, conflict=conflict)

    @override
    async def forgotten_positions(self) -> dict[str, int]:
        with redis_errors(self._config):
            return await self._marks.positions(self._client)

    @override
    async def drop_spent_marks(self, beginnings: Mapping[int, int], *, sources: Collection[str]) -> int:
        with redis_errors(self._config):
            log = View.parse(await self._client.get(self._view_key)).log
            if log is None:
                return 0
            positions = await self.positions()
            return await self._marks.drop(
                self._client, lambda mark: mark.is_spent(log, beginnings, positions), sources=sources
            )

    def _write(
        self, pipe: Any, generation: int, users: dict[str, UserTakes], changed: set[str], took: set[str]
    ) -> None:
        packed = {self._key(generation, "e", user): users[user].recent for user in changed}
        packed |= {self._key(generation, "t", user): pack_takes(users[user]) for user in took}
        if packed:
            pipe.eval(_SET_ALL, len(packed), *packed, self._keep.idle_days * 86_400, *packed.values())

    @override
    async def history(self, user_id: str) -> list[TakenItem]:
        return packed_history(await self._packed_takes(user_id))

    @override
    async def taken_items(self, user_id: str) -> list[str]:
        return packed_items(await self._packed_takes(user_id))

    @override
    async def takes(self, user_id: str) -> tuple[list[str], list[int]]:
        return packed_takes(await self._packed_takes(user_id))

    async def _packed_takes(self, user_id: str) -> bytes | None:
        with redis_errors(self._config):
            for _ in range(MAX_CONFLICTS):
                raw_view, packed = await self._client.execute_command(
                    "MGET", self._view_key, self._key(self._view.generation, "t", user_id)
                )
                found = View.parse(raw_view)
                if found.generation == self._view.generation:
                    taken: bytes | None = packed
                    return taken
                self._view = replace(self._view, generation=found.generation)
        return None

    @override
    async def positions(self) -> dict[int, int]:
        return {
            partition: int(fields.get(b"next_offset", 0)) for partition, fields in (await self._partitions()).items()
        }

    @override
    async def counts(self) -> dict[str, int]:
        rows = (await self._partitions()).values()
        return with_total({name: sum(int(row.get(name.encode(), 0)) for row in rows) for name in COUNTS})

    async def _partitions(self) -> dict[int, dict[bytes, bytes]]:
        with redis_errors(self._config):
            generation = View.parse(await self._client.get(self._view_key)).generation
            numbers = sorted(map(int, await self._client.smembers(self._key(generation, "partitions"))))
            async with self._client.pipeline(transaction=True) as pipe:
                for number in numbers:
                    pipe.hgetall(self._key(generation, "p", number))
                return dict(zip(numbers, await pipe.execute(), strict=True))

    @override
    async def clear(self) -> None:
        await self._replace_view(lambda found: View(found.generation + 1, None))
        with redis_errors(self._config):
            await self._unlink_before(self._view.generation)

    async def _unlink_before(self, generation: int) -> None:
        """Delete what older generations left behind, also those of a sweep that was cut short."""
        root = self._root.encode()
        cursor = 0
        while True:
            cursor, keys = await self._client.scan(cursor, match=f"{self._root}*", count=_SCAN_PAGE)
            old = [key for key in keys if (g := key[len(root) :].split(b":")[0]).isdigit() and int(g) < generation]
            if old:
                await self._client.unlink(*old)
            if cursor == 0:
                return

    @override
    async def ping(self) -> None:
        with redis_errors(self._config):
            await self._client.ping()

    @override
    async def close(self) -> None:
        await self._client.aclose()
