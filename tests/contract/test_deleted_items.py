"""One suite for marks of deleted items and the sweep that removes their takes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from streams.stores.histories.client import RedisConfig, make_redis
from streams.stores.histories.config import BehaviourStoreConfig
from streams.stores.histories.deleted_items import (
    DeletedItems,
    InMemoryDeletedItems,
    RedisDeletedItems,
    Unfinished,
)
from streams.stores.histories.item_order import ItemState
from streams.stores.histories.redis_store import RedisBehaviourStore
from streams.stores.histories.store import BehaviourStore, InMemoryBehaviourStore
from tests.factories.click_log import KEEP, LOG, event, random_log
from tests.factories.small_redis import small_redis


def gone(at: float) -> ItemState:
    return ItemState(int(at * 1000), is_deleted=True)


def live(at: float = 0.0) -> ItemState:
    return ItemState(int(at * 1000), is_deleted=False)


@dataclass
class Both:
    store: BehaviourStore
    deleted: DeletedItems

    async def take(self, offset: int, user: str, *items: str) -> int:
        """Record one take after the other from `offset` on; the offset after."""
        batch = [event(offset + n, user=user, item=item, at=offset + n) for n, item in enumerate(items)]
        report = await self.store.record(0, batch, first_offset=offset, next_offset=offset + len(items))
        assert report.resume_from is None
        return offset + len(items)

    async def items(self, user: str) -> list[str]:
        return [take.item_id for take in await self.store.history(user)]

    async def sweep(self, *, forget_before: float = 0.0) -> int:
        """A whole sweep; how many takes were removed."""
        begun_with, cursor, removed = await self.deleted.sweeps(), 0, 0
        while True:
            cursor, went = await self.deleted.sweep(cursor)
            removed += went
            if cursor == 0:
                await self.deleted.swept(Unfinished(0, begun_with.marks, 1_000.0), forget_before=forget_before)
                return removed


class DeletedItemsContract:
    async def test_takes_of_a_deleted_item_are_removed_from_every_user_and_nothing_else_is(self, both: Both) -> None:
        n = await both.take(0, "u1", "a", "b", "a", "c")
        await both.take(n, "u2", "a")
        states = {"a": gone(50.0), "never taken": gone(50.0), "b": live()}
        assert await both.deleted.mark(states, source="t:0", next_offset=9) == 2
        assert await both.sweep() == 2
        assert await both.items("u1") == ["b", "c"] and await both.items("u2") == []
        assert [(take.item_id, take.occurred_at) for take in await both.store.history("u1")] == [("b", 1.0), ("c", 3.0)]
        assert await both.sweep() == 0

    async def test_what_is_recorded_after_the_deletion_goes_with_the_next_sweep(self, both: Both) -> None:
        await both.deleted.mark({"a": gone(50.0)}, source="t:0", next_offset=1)
        await both.sweep()
        await both.take(0, "u1", "b", "a")
        assert await both.sweep() == 1 and await both.items("u1") == ["b"]

    async def test_an_event_that_comes_twice_does_not_bring_the_take_back(self, both: Both) -> None:
        await both.store.record(0, [event(0, "once", item="a")], first_offset=0, next_offset=1)
        await both.deleted.mark({"a": gone(50.0)}, source="t:0", next_offset=1)
        await both.sweep()
        again = await both.store.record(0, [event(1, "once", item="a")], first_offset=1, next_offset=2)
        assert again.duplicates == 1 and await both.items("u1") == []

    async def test_an_item_that_is_published_again_keeps_what_is_taken_of_it_then(self, both: Both) -> None:
        n = await both.take(0, "u1", "a", "b")
        await both.deleted.mark({"a": gone(50.0), "b": gone(50.0)}, source="t:0", next_offset=2)
        await both.deleted.mark({"b": live()}, source="t:0", next_offset=3)  # before anybody swept
        await both.sweep()
        assert await both.items("u1") == ["b"]
        await both.deleted.mark({"a": live()}, source="t:0", next_offset=4)
        await both.take(n, "u1", "a")
        assert await both.sweep() == 0 and await both.items("u1") == ["b", "a"]

    async def test_marking_again_below_the_position_changes_nothing(self, both: Both) -> None:
        await both.take(0, "u1", "a", "b")
        await both.deleted.mark({"a": gone(50.0)}, source="t:0", next_offset=5)
        await both.deleted.mark({"a": live(), "b": gone(60.0)}, source="t:0", next_offset=8)
        assert await both.deleted.mark({"a": gone(50.0), "b": live()}, source="t:0", next_offset=7) == 0
        assert await both.deleted.positions() == {"t:0": 8}
        await both.sweep()
        assert await both.items("u1") == ["a"]

    async def test_across_partitions_the_newest_time_decides_whoever_is_read_first(self, both: Both) -> None:
        n = await both.take(0, "u1", "live", "gone", "tie")
        await both.deleted.mark({"live": live(2.0), "gone": live(1.0), "tie": live(3.0)}, source="t:0", next_offset=1)
        states = {"live": gone(1.0), "gone": gone(2.0), "tie": gone(3.0)}
        assert await both.deleted.mark(states, source="t:1", next_offset=1) == 2
        assert await both.sweep() == 2 and await both.items("u1") == ["live"]
        await both.deleted.mark({"gone": live(1.5), "tie": live(3.001)}, source="t:0", next_offset=2)
        await both.take(n, "u1", "gone", "tie")
        assert await both.sweep() == 1 and await both.items("u1") == ["live", "tie"]

    async def test_within_a_partition_the_last_record_counts_whatever_its_clock_says(self, both: Both) -> None:
        await both.take(0, "u1", "a", "b")
        await both.deleted.mark({"a": live(9.0), "b": gone(9.0)}, source="t:0", next_offset=1)
        await both.deleted.mark({"a": gone(3.0), "b": live(3.0)}, source="t:0", next_offset=2)
        await both.deleted.mark({"a": live(8.0), "b": gone(8.0)}, source="t:1", next_offset=1)  # older than 9
        assert await both.sweep() == 1 and await both.items("u1") == ["b"]

    async def test_what_is_read_after_the_order_was_settled_counts_as_newer(self, both: Both) -> None:
        await both.take(0, "u1", "a", "b")
        await both.deleted.mark({"a": live(5.0), "b": live(6.0)}, source="t:0", next_offset=1)
        await both.deleted.settle(6_000)
        assert await both.deleted.mark({"a": gone(4.0), "b": gone(4.0)}, source="t:1", next_offset=1) == 1
        assert await both.sweep() == 1 and await both.items("u1") == ["b"]

    async def test_sources_have_positions_of_their_own(self, both: Both) -> None:
        await both.deleted.mark({"a": gone(50.0)}, source="t:0", next_offset=5)
        await both.deleted.mark({}, source="t:1", next_offset=2)
        assert await both.deleted.positions() == {"t:0": 5, "t:1": 2}

    async def test_only_new_marks_ask_for_another_sweep(self, both: Both) -> None:
        await both.deleted.mark({"a": gone(50.0)}, source="t:0", next_offset=1)
        fresh = await both.deleted.sweeps()
        assert (fresh.remembered, fresh.swept_marks, fresh.swept_at) == (1, None, None)
        await both.sweep()
        swept = await both.deleted.sweeps()
        assert swept.marks == swept.swept_marks == fresh.marks and swept.swept_at == 1_000.0
        assert await both.deleted.mark({"a": gone(70.0), "x": live()}, source="t:0", next_offset=3) == 0
        assert (await both.deleted.sweeps()).marks == swept.marks
        await both.deleted.mark({"a": live()}, source="t:0", next_offset=4)
        assert await both.deleted.mark({"a": gone(90.0)}, source="t:0", next_offset=5) == 1
        again = await both.deleted.sweeps()
        assert again.marks != again.swept_marks

    async def test_a_mark_that_comes_while_all_are_swept_asks_for_another_sweep(self, both: Both) -> None:
        await both.deleted.mark({"a": gone(50.0)}, source="t:0", next_offset=1)
        begun_with = await both.deleted.sweeps()
        await both.deleted.sweep(0)
        await both.deleted.mark({"b": gone(51.0)}, source="t:0", next_offset=2)
        await both.deleted.swept(Unfinished(0, begun_with.marks, 1.0), forget_before=0.0)
        after = await both.deleted.sweeps()
        assert after.marks != after.swept_marks

    async def test_a_sweep_that_was_left_is_known_until_one_is_over(self, both: Both) -> None:
        await both.deleted.mark({"a": gone(50.0)}, source="t:0", next_offset=1)
        state = await both.deleted.sweeps()
        assert state.unfinished is None
        left = Unfinished(12_345_678_901_234_567_890, state.marks, 17.25)
        await both.deleted.reached(left)
        await both.deleted.mark({"b": gone(51.0)}, source="t:0", next_offset=2)
        assert (await both.deleted.sweeps()).unfinished == left
        await both.deleted.swept(left, forget_before=0.0)
        after = await both.deleted.sweeps()
        assert (after.unfinished, after.swept_marks, after.swept_at) == (None, state.marks, 17.25)
        assert after.marks != after.swept_marks

    async def test_marks_are_forgotten_when_nothing_can_come_any_more(self, both: Both) -> None:
        await both.deleted.mark({"old": gone(50.0), "new": gone(60.5)}, source="t:0", next_offset=1)
        await both.take(0, "u1", "old", "new")
        assert await both.sweep(forget_before=60.5) == 2
        await both.take(2, "u1", "old", "new")
        await both.sweep()
        assert await both.items("u1") == ["old"]

    async def test_marks_outlive_a_rebuild(self, both: Both) -> None:
        await both.take(0, "u1", "a", "b")
        await both.deleted.mark({"a": gone(50.0)}, source="t:0", next_offset=1)
        await both.sweep()
        await both.store.clear()
        await both.store.bind(LOG)
        await both.take(0, "u1", "a", "b")
        assert await both.deleted.positions() == {"t:0": 1}
        assert await both.sweep() == 1 and await both.items("u1") == ["b"]

    async def test_one_leads_until_it_resigns(self, both: Both) -> None:
        assert await both.deleted.lead("x", seconds=60) and await both.deleted.lead("x", seconds=60)
        assert not await both.deleted.lead("y", seconds=60)
        await both.deleted.resign("y")
        assert not await both.deleted.lead("y", seconds=60)
        await both.deleted.resign("x")
        assert await both.deleted.lead("y", seconds=60)

    async def test_ids_in_any_script_and_of_any_length_are_found(self, both: Both) -> None:
        odd = ["é", "商品:7", "a b", "x" * 200, "%d", "12"]
        n = await both.take(0, "用户", *odd[:3])
        await both.take(n, "*[a]", *odd[3:], "stays")
        await both.deleted.mark(dict.fromkeys(odd, gone(50.0)), source="t:0", next_offset=1)
        assert await both.sweep() == len(odd)
        assert await both.items("用户") == [] and await both.items("*[a]") == ["stays"]


class TestInMemoryDeletedItems(DeletedItemsContract):
    @pytest.fixture
    async def both(self) -> Both:
        store = InMemoryBehaviourStore(KEEP)
        await store.bind(LOG)
        return Both(store, InMemoryDeletedItems(store))


class RedisDeletedItemsContract(DeletedItemsContract):
    @pytest.fixture
    def config(self) -> RedisConfig:
        raise NotImplementedError

    @pytest.fixture
    async def client(self, config: RedisConfig) -> AsyncIterator[Any]:
        client = make_redis(config)
        yield client
        await client.aclose()

    @pytest.fixture
    async def both(self, client: Any, config: RedisConfig) -> Both:
        store = RedisBehaviourStore(client, config, KEEP)
        await store.bind(LOG)
        return Both(store, RedisDeletedItems(client, config))

    async def test_it_agrees_with_the_one_in_memory(self, both: Both) -> None:
        memory = InMemoryBehaviourStore(KEEP)
        await memory.bind(LOG)
        beside = Both(memory, InMemoryDeletedItems(memory))
        log, away = random_log(8, 2_000), {f"i{n}": gone(n) for n in range(0, 50, 3)}
        crowd = [one._replace(behaviour=one.behaviour and one.behaviour.model_copy(update={"user_id": f"u{n % 400}"}))
                 for n, one in enumerate(log)]  # fmt: skip
        counts = []
        for each in (both, beside):
            await each.store.record(0, crowd, first_offset=0, next_offset=crowd[-1].offset + 1)
            await each.deleted.mark(away, source="t:0", next_offset=1)
            counts.append(await each.sweep())
        assert counts[0] == counts[1] > 100
        for user in range(400):
            assert await both.store.history(f"u{user}") == await memory.history(f"u{user}")

    async def test_a_long_history_is_searched_to_its_end(self, client: Any, config: RedisConfig) -> None:
        keep = BehaviourStoreConfig(history_length=5_000)
        store = RedisBehaviourStore(client, config, keep)
        await store.bind(LOG)
        both = Both(store, RedisDeletedItems(client, config))
        await both.take(0, "u1", *(f"i{n}" for n in range(4_321)))
        await both.deleted.mark(
            {"i0": gone(1.0), "i999": gone(1.0), "i1000": gone(1.0), "i4320": gone(1.0)}, source="t:0", next_offset=1
        )
        assert await both.sweep() == 4 and len(await both.items("u1")) == 4_317

    async def test_a_take_recorded_between_search_and_write_is_kept(self, both: Both, client: Any) -> None:
        n = await both.take(0, "u1", "a", "b")
        await both.deleted.mark({"a": gone(50.0)}, source="t:0", next_offset=1)
        evaluate, scripts = client.eval, 0

        async def overtaken(script: str, *given: Any) -> Any:
            nonlocal n, scripts
            scripts += 1
            if scripts == 2:  # the search is over, the write comes
                client.eval = evaluate
                n = await both.take(n, "u1", "c", "a")
            return await evaluate(script, *given)

        client.eval = overtaken
        assert await both.sweep() == 1 and await both.items("u1") == ["b", "c"]

    async def test_a_sweep_between_a_recorders_read_and_its_write_is_not_undone(self, both: Both) -> None:
        assert isinstance(both.store, RedisBehaviourStore)
        n = await both.take(0, "u1", "a", "b")
        await both.deleted.mark({"a": gone(50.0)}, source="t:0", next_offset=1)
        read, reads = both.store._marks.ends, 0

        async def read_before_the_sweep(*given: Any, **named: Any) -> dict[str, dict[int, int]]:
            nonlocal reads
            seen, reads = await read(*given, **named), reads + 1
            if reads == 1:
                assert await both.sweep() == 1
            return seen

        both.store._marks.ends = read_before_the_sweep  # type: ignore[method-assign]
        await both.take(n, "u1", "c")
        assert reads == 2 and await both.items("u1") == ["b", "c"]

    async def test_a_sweep_neither_prolongs_a_users_days_nor_keeps_an_empty_one(
        self, both: Both, client: Any, config: RedisConfig
    ) -> None:
        n = await both.take(0, "u1", "a", "b")
        await both.take(n, "u2", "a")
        (key,) = await client.keys(f"{config.key_prefix}record:*:t:u1")
        await client.expire(key, 1_000)
        await both.deleted.mark({"a": gone(50.0)}, source="t:0", next_offset=1)
        await both.sweep()
        assert 900 < await client.ttl(key) <= 1_000
        assert await client.keys(f"{config.key_prefix}record:*:t:*") == [key]

    async def test_a_leader_whose_lease_ended_is_replaced(self, both: Both) -> None:
        assert await both.deleted.lead("x", seconds=0.05)
        while not await both.deleted.lead("y", seconds=60):
            pass
        assert not await both.deleted.lead("x", seconds=60)

    async def test_a_sweep_of_the_view_before_a_rebuild_is_not_gone_on_with(self, both: Both) -> None:
        await both.deleted.mark({"a": gone(50.0)}, source="t:0", next_offset=1)
        await both.deleted.reached(Unfinished(7, (await both.deleted.sweeps()).marks, 1.0))
        await both.store.clear()
        await both.store.bind(LOG)
        assert (await both.deleted.sweeps()).unfinished is None

    async def test_a_rebuild_asks_for_another_sweep(self, both: Both) -> None:
        await both.deleted.mark({"a": gone(50.0)}, source="t:0", next_offset=1)
        await both.sweep()
        await both.store.clear()
        after = await both.deleted.sweeps()
        assert after.marks != after.swept_marks


class TestRedisDeletedItemsHere(RedisDeletedItemsContract):
    @pytest.fixture
    async def config(self) -> AsyncIterator[RedisConfig]:
        async with small_redis() as url:
            yield RedisConfig(url=url)


@pytest.mark.live
class TestRedisDeletedItems(RedisDeletedItemsContract):
    @pytest.fixture
    def config(self, valkey: str) -> RedisConfig:
        return RedisConfig(url=valkey, key_prefix=f"t{os.urandom(4).hex()}:")
