"""Items that were deleted, marked beside the behaviour store, and the sweep that removes what users took of them.

A take is stored with its user, and there is no index from an item to the users who took it. So a deletion is marked, in
one transaction with the position in `items` up to which marks are complete, and a *sweep* goes through all users later:
the server itself looks for takes of marked items, and only users who have some are read and written. Recording does not
read the marks. A mark stays as long as behaviours from before the deletion may still come, and every sweep applies all
marks: what is recorded late, or once more by a rebuild, is removed by the next one.

An item may have records in two partitions. Which is the newest is kept until all partitions were read past its time;
whatever is read of the item after that is newer.

    <prefix>record:deleted           sorted set: marked items, by when they were deleted (seconds since 1970)
    <prefix>record:deleted:order     sorted set: items of newly read records, by the place of the newest (`item_order`)
    <prefix>record:deleted:at        hash: next offset of each partition of each incarnation of the topic `items`
    <prefix>record:deleted:sweeps    hash: number of marks ever made, those that all users were swept for, and when; the
                                     same and the cursor of a sweep that is under way
    <prefix>record:deleted:leader    the process that follows `items` and sweeps

None belongs to a generation of the view: they outlive a rebuild. Needs Redis 6.2, or any Valkey.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from redis.asyncio import Redis
from typing_extensions import override

from schemas.errors import StoreUnavailable
from streams.stores.histories.client import MAX_CONFLICTS, RedisConfig, redis_errors, transact
from streams.stores.histories.item_order import ItemState, newer_states, place_at
from streams.stores.histories.packed_history import without_items
from streams.stores.histories.redis_store import View
from streams.stores.histories.store import InMemoryBehaviourStore


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A sweep that is under way, or that a process left when it ended."""

    cursor: int
    marks: str
    """`Sweeps.marks` when it began."""
    begun_at: float


@dataclass(frozen=True, slots=True)
class Sweeps:
    """State of marks and sweeps."""

    remembered: int
    """Items that are marked."""
    marks: str
    """Identifies all marks so far and the view of users; changes with every new mark and with a rebuild."""
    swept_marks: str | None
    """`marks` when the last sweep began; None before the first."""
    swept_at: float | None
    """When that was (wall clock)."""
    unfinished: Unfinished | None = None
    """The sweep to go on with, if it is of the present view of users."""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """One sweep over all users."""

    removed: int
    """Takes of deleted items."""
    remembered: int
    """Items that are marked as deleted."""
    seconds: float
    """Duration, pauses included."""


class DeletedItems(Protocol):
    """Marks of deleted items, and the sweep over all users. All operations are idempotent."""

    async def mark(self, states: Mapping[str, ItemState], *, source: str, next_offset: int) -> int:
        """Mark what was deleted, forget the marks of what is published again; how many items are marked anew.

        `states` were read from `source`, a partition of one incarnation of the topic `items`, up to `next_offset`,
        which is kept with them. A call with a smaller position than the kept one changes nothing. A state that is older
        than one that another partition held of its item changes nothing either.
        """

    async def settle(self, before_ms: int) -> None:
        """Forget the order of records from before this time: all partitions were read past it."""

    async def positions(self) -> dict[str, int]:
        """Next offset of each source of `mark`."""

    async def lead(self, who: str, *, seconds: float) -> bool:
        """Whether `who` may follow and sweep for so long; one at a time, and the last leader has priority.

        It only saves work: two processes that both believe to lead reach the same state.
        """

    async def resign(self, who: str) -> None:
        """Let another process lead at once."""

    async def sweeps(self) -> Sweeps:
        """Current state of marks and sweeps."""

    async def sweep(self, cursor: int) -> tuple[int, int]:
        """Remove takes of marked items from the users at `cursor`; the next cursor, and how many takes were removed.

        A sweep begins at 0 and is over when the next cursor is 0. Users who are added meanwhile may be passed over.
        """

    async def reached(self, sweep: Unfinished) -> None:
        """Note how far a sweep is, so that another process can go on.

        The cursor of a server that restarted may pass over users; the next sweep, which applies all marks again, finds
        them.
        """

    async def swept(self, sweep: Unfinished, *, forget_before: float) -> None:
        """Note the end of a sweep; removes marks of before `forget_before`."""


class InMemoryDeletedItems(DeletedItems):
    """The protocol over a store in memory."""

    def __init__(self, store: InMemoryBehaviourStore) -> None:
        self._store = store
        self._deleted: dict[str, float] = {}
        self.places: dict[str, int] = {}
        """Place of the newest record of each item that is not settled."""
        self._positions: dict[str, int] = {}
        self._marks = 0
        self._swept: tuple[str, float] | None = None
        self._unfinished: Unfinished | None = None
        self._leader: str | None = None

    @override
    async def mark(self, states: Mapping[str, ItemState], *, source: str, next_offset: int) -> int:
        if self._positions.get(source, 0) >= next_offset:
            return 0
        new = 0
        for item, (place, is_deleted) in newer_states(states, self.places, partition=_partition(source)).items():
            self.places[item] = place
            known = self._deleted.pop(item, None)
            if is_deleted:
                self._deleted[item] = states[item].time_ms / 1000
                new += known is None
        self._marks += new
        self._positions[source] = next_offset
        return new

    @override
    async def settle(self, before_ms: int) -> None:
        self.places = {item: place for item, place in self.places.items() if place >= place_at(before_ms)}

    @override
    async def positions(self) -> dict[str, int]:
        return dict(self._positions)

    @override
    async def lead(self, who: str, *, seconds: float) -> bool:
        self._leader = self._leader or who
        return self._leader == who

    @override
    async def resign(self, who: str) -> None:
        if self._leader == who:
            self._leader = None

    @override
    async def sweeps(self) -> Sweeps:
        marks, at = self._swept or (None, None)
        return Sweeps(len(self._deleted), str(self._marks), marks, at, self._unfinished)

    @override
    async def sweep(self, cursor: int) -> tuple[int, int]:
        return 0, sum(user.remove_items(self._deleted) for user in self._store.users.values())

    @override
    async def reached(self, sweep: Unfinished) -> None:
        self._unfinished = sweep

    @override
    async def swept(self, sweep: Unfinished, *, forget_before: float) -> None:
        self._swept, self._unfinished = (sweep.marks, sweep.begun_at), None
        self._deleted = {item: at for item, at in self._deleted.items() if at >= forget_before}


def _partition(source: str) -> int:
    return int(source.rsplit(":", 1)[1])


_PAGE = 30
"""Keys per script call: some milliseconds, in which the server answers no other client."""

_FIND = """
local found = {}
for i = 2, #KEYS do
  local packed = redis.call('GET', KEYS[i])
  if packed and #packed > 5 and string.byte(packed, 1) == 1 then
    local a, b, c, d = string.byte(packed, 2, 5)
    local items, taken = {}, string.sub(packed, 6 + 17 * (a + 256 * (b + 256 * (c + 256 * d))))
    for item in string.gmatch(taken, '[^\\n]+') do items[#items + 1] = item end
    local marked = {}
    for first = 1, #items, 1000 do
      local last = math.min(first + 999, #items)
      local at = redis.call('ZMSCORE', KEYS[1], unpack(items, first, last))
      for j = first, last do
        if at[j - first + 1] then marked[#marked + 1] = items[j] end
      end
    end
    if #marked > 0 then found[#found + 1] = {KEYS[i], packed, marked} end
  end
end
return found
"""
"""Of packed takes (layout: `packed_history.pack_takes`), those with marked items: key, bytes, the items."""

_SWAP = """
local swapped = {}
for i = 1, #KEYS do
  swapped[i] = 0
  if redis.call('GET', KEYS[i]) == ARGV[2 * i - 1] then
    swapped[i] = 1
    if ARGV[2 * i] == '' then
      redis.call('DEL', KEYS[i])
    else
      redis.call('SET', KEYS[i], ARGV[2 * i], 'KEEPTTL')
    end
  end
end
return swapped
"""
"""Compare and swap: replace each value only if it is still the old one, since a recorder may write meanwhile."""

_LEAD = """
local leader = redis.call('GET', KEYS[1])
if leader and leader ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

_RESIGN = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class RedisDeletedItems(DeletedItems):
    """The protocol in Redis, beside `RedisBehaviourStore` with the same client and configuration."""

    def __init__(self, client: Redis, config: RedisConfig) -> None:
        self._client: Any = client
        self._config = config
        self._root = f"{config.key_prefix}record:"
        self._marks = f"{self._root}deleted"
        self._order = f"{self._root}deleted:order"
        self._at = f"{self._root}deleted:at"
        self._sweeps = f"{self._root}deleted:sweeps"
        self._leader = f"{self._root}deleted:leader"

    @override
    async def mark(self, states: Mapping[str, ItemState], *, source: str, next_offset: int) -> int:
        async def change(pipe: Any) -> int:
            if int(await pipe.hget(self._at, source) or 0) >= next_offset:
                return 0
            places = await pipe.zmscore(self._order, list(states)) if states else []
            known = {item: None if at is None else int(at) for item, at in zip(states, places, strict=True)}
            newer = newer_states(states, known, partition=_partition(source))
            deleted = {item: states[item].time_ms / 1000 for item, (_, is_deleted) in newer.items() if is_deleted}
            published = [item for item in newer if item not in deleted]
            marked = await pipe.zmscore(self._marks, list(deleted)) if deleted else []
            new = sum(at is None for at in marked)
            pipe.multi()
            if newer:
                pipe.zadd(self._order, {item: place for item, (place, _) in newer.items()})
            if published:
                pipe.zrem(self._marks, *published)
            if deleted:
                pipe.zadd(self._marks, deleted)
            if new:
                pipe.hincrby(self._sweeps, "marks", new)
            pipe.hset(self._at, source, next_offset)
            return new

        conflict = "other processes keep marking items as deleted"
        watched = (self._at, self._marks, self._order)
        return await transact(self._client, self._config, *watched, change=change, conflict=conflict)

    @override
    async def settle(self, before_ms: int) -> None:
        with redis_errors(self._config):
            await self._client.zremrangebyscore(self._order, "-inf", f"({place_at(before_ms)}")

    @override
    async def positions(self) -> dict[str, int]:
        with redis_errors(self._config):
            found = await self._client.hgetall(self._at)
        return {source.decode(): int(offset) for source, offset in found.items()}

    @override
    async def lead(self, who: str, *, seconds: float) -> bool:
        with redis_errors(self._config):
            return bool(await self._client.eval(_LEAD, 1, self._leader, who, round(seconds * 1000)))

    @override
    async def resign(self, who: str) -> None:
        with redis_errors(self._config):
            await self._client.eval(_RESIGN, 1, self._leader, who)

    @override
    async def sweeps(self) -> Sweeps:
        with redis_errors(self._config):
            async with self._client.pipeline(transaction=True) as pipe:
                pipe.get(f"{self._root}view")
                pipe.zcard(self._marks)
                pipe.hgetall(self._sweeps)
                view, remembered, fields = await pipe.execute()
        at, cursor = fields.get(b"swept_at"), fields.get(b"cursor")
        swept_marks = fields.get(b"swept_marks")
        generation = View.parse(view).generation
        unfinished = None
        if cursor is not None:
            marks = fields[b"cursor_marks"].decode()
            if marks.split(":")[0] == str(generation):
                unfinished = Unfinished(int(cursor), marks, float(fields[b"cursor_begun_at"]))
        return Sweeps(
            remembered=remembered,
            marks=f"{generation}:{int(fields.get(b'marks', 0))}",
            swept_marks=None if swept_marks is None else swept_marks.decode(),
            swept_at=None if at is None else float(at),
            unfinished=unfinished,
        )

    @override
    async def sweep(self, cursor: int) -> tuple[int, int]:
        with redis_errors(self._config):
            generation = View.parse(await self._client.get(f"{self._root}view")).generation
            after, keys = await self._client.scan(cursor, match=f"{self._root}{generation}:t:*", count=_PAGE)
            removed = 0
            for _ in range(MAX_CONFLICTS):
                found = await self._client.eval(_FIND, 1 + len(keys), self._marks, *keys) if keys else []
                if not found:
                    return int(after), removed
                changes: list[bytes] = []
                counts = []
                for _, packed, items in found:
                    changed, removed_here = without_items(packed, {item.decode() for item in items})
                    changes += [packed, changed]
                    counts.append(removed_here)
                keys = [key for key, _, _ in found]
                swapped = await self._client.eval(_SWAP, len(keys), *keys, *changes)
                removed += sum(count for count, done in zip(counts, swapped, strict=True) if done)
                keys = [key for key, done in zip(keys, swapped, strict=True) if not done]
        raise StoreUnavailable("Redis", "recorders keep writing to the same users of the behaviour view")

    @override
    async def reached(self, sweep: Unfinished) -> None:
        fields = {"cursor": sweep.cursor, "cursor_marks": sweep.marks, "cursor_begun_at": repr(sweep.begun_at)}
        with redis_errors(self._config):
            await self._client.hset(self._sweeps, mapping=fields)

    @override
    async def swept(self, sweep: Unfinished, *, forget_before: float) -> None:
        with redis_errors(self._config):
            async with self._client.pipeline(transaction=True) as pipe:
                pipe.hset(self._sweeps, mapping={"swept_marks": sweep.marks, "swept_at": repr(sweep.begun_at)})
                pipe.hdel(self._sweeps, "cursor", "cursor_marks", "cursor_begun_at")
                pipe.zremrangebyscore(self._marks, "-inf", f"({forget_before!r}")
                await pipe.execute()
