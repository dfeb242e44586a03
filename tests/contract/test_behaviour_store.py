"""One suite for every behaviour store."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest

from schemas.errors import Misconfigured, StoreUnavailable
from schemas.forgotten import ForgottenUser
from streams.broker.cluster import TopicIncarnation
from streams.broker.records import BehaviourRecord
from streams.stores.histories.client import RedisConfig, make_redis
from streams.stores.histories.packed_history import RecordReport
from streams.stores.histories.redis_store import RedisBehaviourStore
from streams.stores.histories.store import BehaviourStore, InMemoryBehaviourStore
from tests.factories.click_log import KEEP, LOG, event, random_log
from tests.factories.small_redis import small_redis


def forgotten(user: str, ends: dict[int, int], *, topic_id: str = LOG.topic_id) -> ForgottenUser:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return ForgottenUser(user_id=user, forgotten_at=now, cluster_id=LOG.cluster_id, topic_id=topic_id, ends=ends)


async def contents(store: BehaviourStore) -> object:
    return {
        "histories": {f"u{u}": await store.history(f"u{u}") for u in range(6)},
        "counts": await store.counts(),
        "positions": await store.positions(),
    }


async def items(store: BehaviourStore, user: str = "u1") -> list[str]:
    return [take.item_id for take in await store.history(user)]


async def record(store: BehaviourStore, *batch: BehaviourRecord) -> RecordReport:
    """Record a batch of partition 0 that holds every offset from its first to its last."""
    return await store.record(0, list(batch), first_offset=batch[0].offset, next_offset=batch[-1].offset + 1)


async def feed(store: BehaviourStore, log: list[BehaviourRecord], cuts: list[int]) -> None:
    stored = 0
    for start, end in pairwise([0, *cuts, len(log)]):
        if batch := log[start:end]:
            next_offset = batch[-1].offset + 1
            report = await store.record(0, batch, first_offset=stored, next_offset=next_offset)
            assert report.resume_from is None
            stored = next_offset


class BehaviourStoreContract:
    async def test_takes_come_back_in_event_time_order(self, store: BehaviourStore) -> None:
        events = [event(0, item="c", at=20), event(1, item="a", at=10, kind="purchase"), event(2, item="b", at=15)]
        await record(store, *events)
        found = [(take.item_id, take.occurred_at, take.kind) for take in await store.history("u1")]
        assert found == [("a", 10.0, "purchase"), ("b", 15.0, "click"), ("c", 20.0, "click")]

    async def test_exposures_are_counted_and_not_kept(self, store: BehaviourStore) -> None:
        report = await record(store, event(0, kind="exposure"), event(1))
        assert (report.exposures, report.takes, report.stored) == (1, 1, 2)
        assert len(await store.history("u1")) == 1
        nothing = {"duplicates": 0, "broken": 0, "erased": 0}
        assert await store.counts() == {"stored": 2, "exposures": 1, "takes": 1} | nothing

    async def test_a_forgotten_user_is_gone_and_no_replay_or_late_recorder_brings_them_back(
        self, store: BehaviourStore
    ) -> None:
        await record(store, event(0), event(1, user="u2"), event(2))
        assert await store.forget([forgotten("u1", {0: 5})], source="t:3", next_offset=8) == 1
        assert await store.history("u1") == [] and len(await store.history("u2")) == 1

        late = await record(store, event(3), event(4, user="u2"))
        assert (late.erased, late.takes) == (1, 1) and await store.history("u1") == []
        again = await record(store, event(5, item="new"))
        assert again.takes == 1
        assert await items(store) == ["new"]  # a new user of the same id

        await store.clear()
        await store.bind(LOG)
        assert await store.forgotten_positions() == {"t:3": 8}  # marks outlive a rebuild
        replayed = await record(store, event(0), event(1, user="u2"), event(2), event(3), event(5, item="new"))
        assert (replayed.erased, replayed.takes) == (3, 2)
        assert await items(store) == ["new"]
        assert (await store.counts())["erased"] == 3

    async def test_reading_an_erasure_again_does_not_erase_the_user_who_came_back(self, store: BehaviourStore) -> None:
        await store.forget([forgotten("u1", {0: 5})], source="t:0", next_offset=1)
        await store.record(0, [event(5)], first_offset=0, next_offset=6)
        assert await store.forget([forgotten("u1", {0: 5})], source="t:0", next_offset=1) == 0
        assert len(await store.history("u1")) == 1
        await store.forget([forgotten("u1", {0: 6})], source="t:0", next_offset=2)
        assert await store.history("u1") == []

    @pytest.mark.parametrize("other", [{"topic_id": "an older one"}, {"cluster_id": "another"}])
    async def test_ends_of_another_log_erase_nothing_that_comes_in_this_one(
        self, store: BehaviourStore, other: dict[str, str]
    ) -> None:
        gone = forgotten("u1", {0: 100}).model_copy(update=other)
        await store.forget([gone], source="t:0", next_offset=1)
        report = await record(store, event(0))
        assert report.erased == 0 and len(await store.history("u1")) == 1

    async def test_ends_hold_for_their_own_partition_and_their_own_user(self, store: BehaviourStore) -> None:
        users = [forgotten("u1", {0: 5}), forgotten("u2", {1: 3})]
        assert await store.forget(users, source="t:0", next_offset=2) == 2
        both = [event(4, "a"), event(4, "b", user="u2")]
        assert (await store.record(0, both, first_offset=0, next_offset=5)).erased == 1
        again = [event(2, "c"), event(2, "d", user="u2"), event(2, "e", user="u3")]
        report = await store.record(1, again, first_offset=0, next_offset=3)
        assert (report.erased, report.takes, report.users) == (1, 2, 2)
        assert [len(await store.history(user)) for user in ("u1", "u2", "u3")] == [1, 1, 1]

    async def test_of_a_forgotten_user_no_event_counts_as_seen(self, store: BehaviourStore) -> None:
        await record(store, event(0, "a"), event(1, "b", kind="exposure"))
        await store.forget([forgotten("u1", {0: 2})], source="t:0", next_offset=1)
        report = await record(store, event(2, "a"), event(3, "b", kind="exposure"))
        assert (report.takes, report.exposures, report.duplicates) == (1, 1, 0)

    async def test_as_many_events_are_recognised_as_the_settings_say(self, store: BehaviourStore) -> None:
        shown = [event(n, kind="exposure") for n in range(KEEP.remembered_event_ids + 1)]
        await record(store, *shown)
        oldest, beyond = shown[1]._replace(offset=9), shown[0]._replace(offset=10)
        report = await record(store, oldest, beyond)
        assert (report.duplicates, report.exposures) == (1, 1)

    async def test_a_mark_goes_when_the_log_and_the_store_are_past_the_erasure_and_no_sooner(
        self, store: BehaviourStore
    ) -> None:
        await store.forget([forgotten("u1", {0: 5, 1: 3})], source="t:0", next_offset=1)
        await store.record(0, [], first_offset=0, next_offset=9)
        await store.record(1, [], first_offset=0, next_offset=2)
        for beginnings in ({0: 4, 1: 9}, {0: 9}, {0: 9, 1: 9}):  # the store stands before the end in partition 1
            assert await store.drop_spent_marks(beginnings, sources={"t:0"}) == 0
        assert (await store.record(1, [event(2)], first_offset=0, next_offset=3)).erased == 1
        assert await store.drop_spent_marks({0: 5, 1: 3}, sources={"t:0"}) == 1
        assert await store.drop_spent_marks({0: 5, 1: 3}, sources={"t:0"}) == 0
        assert await store.forgotten_positions() == {"t:0": 1}

    async def test_marks_of_another_log_go_and_its_requests_are_read_again(self, store: BehaviourStore) -> None:
        await store.forget([forgotten("u1", {0: 5}, topic_id="former")], source="former:0", next_offset=7)
        await store.forget([forgotten("u2", {0: 5})], source="t:0", next_offset=1)
        assert await store.drop_spent_marks({0: 0}, sources={"t:0"}) == 1
        assert await store.forgotten_positions() == {"t:0": 1}
        assert (await record(store, event(0, user="u2"))).erased == 1

    async def test_only_the_newest_takes_are_kept(self, store: BehaviourStore) -> None:
        await record(store, *(event(i, item=f"i{i}", at=i) for i in range(9)))
        await record(store, event(9, item="ancient", at=-5))
        assert await items(store) == ["i4", "i5", "i6", "i7", "i8"]
        assert (await store.counts())["takes"] == 10

    async def test_a_second_event_with_the_same_id_changes_nothing(self, store: BehaviourStore) -> None:
        await record(store, event(0, "a", item="x"), event(1, "b", kind="exposure"))
        again = (event(2, "a", item="x"), event(3, "b", kind="exposure"), event(4, "a", item="y", at=99))
        report = await record(store, *again)
        assert (report.duplicates, report.stored, report.users) == (3, 0, 0)
        assert await items(store) == ["x"]

    async def test_a_take_still_kept_is_never_doubled_however_many_exposures_came_since(
        self, store: BehaviourStore
    ) -> None:
        await record(store, event(0, "a"))
        await record(store, *(event(i, kind="exposure") for i in range(1, 50)))
        assert (await record(store, event(50, "a"))).duplicates == 1
        assert len(await store.history("u1")) == 1

    async def test_a_replay_of_recorded_offsets_changes_nothing(self, store: BehaviourStore) -> None:
        log = random_log(1, 300)
        await feed(store, log, [100, 200])
        before = await contents(store)
        for start, end in [(0, 300), (50, 120), (299, 300)]:
            part = log[start:end]
            assert (await record(store, *part)).replayed == len(part)
        assert await contents(store) == before

    async def test_a_batch_that_overlaps_the_position_records_only_its_new_part(self, store: BehaviourStore) -> None:
        await record(store, *(event(i, at=i) for i in range(3)))
        report = await record(store, *(event(i, at=i) for i in range(1, 5)))
        assert (report.replayed, report.takes) == (2, 2)
        assert (await store.positions(), (await store.counts())["takes"]) == ({0: 5}, 5)

    async def test_the_data_do_not_depend_on_how_the_log_is_cut(self, store: BehaviourStore) -> None:
        log = random_log(2, 400)
        await feed(store, log, [])
        whole = await contents(store)
        await store.clear()
        await store.bind(LOG)
        await feed(store, log, sorted(random.Random(3).sample(range(400), 60)))
        assert await contents(store) == whole

    async def test_a_gap_between_position_and_batch_is_refused_and_says_where_to_read(
        self, store: BehaviourStore
    ) -> None:
        await record(store, event(0))
        report = await store.record(0, [event(7)], first_offset=5, next_offset=8)
        assert report.resume_from == 1
        assert (await store.positions(), (await store.counts())["takes"]) == ({0: 1}, 1)

    async def test_an_empty_range_moves_the_position(self, store: BehaviourStore) -> None:
        await store.record(2, [], first_offset=0, next_offset=40)
        assert await store.positions() == {2: 40}

    async def test_broken_records_are_counted_once(self, store: BehaviourStore) -> None:
        for _ in range(2):
            await record(store, BehaviourRecord(0, None), event(1))
        assert (await store.counts())["broken"] == 1

    async def test_partitions_have_positions_of_their_own(self, store: BehaviourStore) -> None:
        await record(store, event(0, user="u1"))
        await store.record(3, [event(0, user="u2"), event(1, user="u2")], first_offset=0, next_offset=2)
        assert await store.positions() == {0: 1, 3: 2}
        assert (await store.counts())["takes"] == 3

    async def test_a_store_filled_from_another_log_is_refused_with_the_way_out(self, store: BehaviourStore) -> None:
        await store.bind(LOG)
        with pytest.raises(Misconfigured, match=r"another topic.*record --rebuild"):
            await store.bind(TopicIncarnation("cluster-1", "mim.behaviours", "topic-2"))
        with pytest.raises(Misconfigured, match="another cluster"):
            await store.bind(TopicIncarnation("cluster-2", "mim.behaviours", "topic-1"))

    async def test_clear_forgets_everything_and_binds_anew(self, store: BehaviourStore) -> None:
        await feed(store, random_log(4, 100), [50])
        await store.clear()
        assert await store.positions() == {}
        assert (await store.counts())["stored"] == 0
        assert await store.history("u1") == []
        await store.bind(TopicIncarnation("cluster-2", "mim.behaviours", "topic-9"))

    async def test_a_recorder_that_missed_a_clear_is_sent_back_to_the_start(self, store: BehaviourStore) -> None:
        await record(store, event(0))
        await store.clear()
        assert (await record(store, event(1))).resume_from == 0
        assert await store.history("u1") == []

    async def test_ids_in_any_script_survive(self, store: BehaviourStore) -> None:
        await record(store, event(0, "é1", user="用户", item="商品:7"))
        assert await items(store, "用户") == ["商品:7"]
        assert await store.taken_items("用户") == ["商品:7"]
        assert await store.taken_items("nobody") == []


class TestInMemoryBehaviourStore(BehaviourStoreContract):
    @pytest.fixture
    async def store(self) -> BehaviourStore:
        store = InMemoryBehaviourStore(KEEP)
        await store.bind(LOG)
        return store


@asynccontextmanager
async def opened(config: RedisConfig) -> AsyncIterator[RedisBehaviourStore]:
    store = RedisBehaviourStore(make_redis(config), config, KEEP)
    await store.bind(LOG)
    yield store
    await store.close()


class RedisBehaviourStoreContract(BehaviourStoreContract):
    @pytest.fixture
    def config(self) -> RedisConfig:
        raise NotImplementedError

    @pytest.fixture
    async def store(self, config: RedisConfig) -> AsyncIterator[RedisBehaviourStore]:
        async with opened(config) as store:
            yield store

    @pytest.fixture
    async def other(self, config: RedisConfig) -> AsyncIterator[BehaviourStore]:
        """The same store, opened by another process."""
        async with opened(config) as store:
            yield store

    async def test_it_agrees_with_the_store_in_memory(self, store: BehaviourStore) -> None:
        memory = InMemoryBehaviourStore(KEEP)
        await memory.bind(LOG)
        log = random_log(5, 500)
        await feed(memory, log, [])
        await feed(store, log, [7, 90, 91, 333])
        assert await contents(store) == await contents(memory)

    async def test_two_recorders_on_one_partition_record_each_event_once(
        self, store: BehaviourStore, other: BehaviourStore
    ) -> None:
        log = [event(i, user=f"u{i % 3}", at=i) for i in range(400)]

        async def run(which: BehaviourStore) -> None:
            for start in range(0, 400, 10):
                first = start if which is store else 0
                report = await which.record(0, log[start : start + 10], first_offset=first, next_offset=start + 10)
                assert report.resume_from is None

        await asyncio.gather(run(store), run(other))
        assert (await store.counts())["takes"] == 400

    async def test_an_erasure_between_a_recorders_read_and_its_write_wins(
        self, store: RedisBehaviourStore, other: BehaviourStore
    ) -> None:
        read, reads = store._marks.ends, 0

        async def read_before_the_erasure(*given: Any, **named: Any) -> dict[str, dict[int, int]]:
            nonlocal reads
            seen, reads = await read(*given, **named), reads + 1
            if reads == 1:
                await other.forget([forgotten("u1", {0: 1})], source="t:0", next_offset=1)
            return seen

        store._marks.ends = read_before_the_erasure  # type: ignore[method-assign]
        report = await record(store, event(0), event(1, user="u2"))
        assert (reads, report.erased, report.takes) == (2, 1, 1)
        assert await store.history("u1") == [] and len(await store.history("u2")) == 1

    async def test_clear_leaves_no_key_behind(self, store: BehaviourStore, config: RedisConfig) -> None:
        await feed(store, random_log(6, 100), [])
        await store.clear()
        client = make_redis(config)
        assert await client.keys(f"{config.key_prefix}*") == [f"{config.key_prefix}record:view".encode()]
        await client.aclose()

    async def test_a_reader_sees_a_clear_by_another_process(self, store: BehaviourStore, config: RedisConfig) -> None:
        await record(store, event(0))
        reader = RedisBehaviourStore(make_redis(config), config, KEEP)
        assert len(await reader.history("u1")) == 1
        await store.clear()
        assert await reader.history("u1") == []
        await store.bind(LOG)
        await record(store, event(0, item="new"))
        assert await items(reader) == ["new"]
        await reader.close()

    async def test_a_server_that_is_away_is_unavailable_and_the_setting_is_named(self, unused_tcp_port: int) -> None:
        config = RedisConfig(url=f"redis://:secret@127.0.0.1:{unused_tcp_port}/0", timeout_seconds=0.5)
        away = RedisBehaviourStore(make_redis(config), config)
        with pytest.raises(StoreUnavailable, match="MIM_REDIS__URL") as caught:
            await away.history("u1")
        assert "secret" not in str(caught.value)
        await away.close()


class TestRedisBehaviourStoreHere(RedisBehaviourStoreContract):
    async def test_a_users_days_begin_again_with_each_event(self, store: BehaviourStore, config: RedisConfig) -> None:
        await record(store, event(0), event(1, user="u2", kind="exposure"))
        client: Any = make_redis(config)
        keys = sorted(await client.keys("mim:record:0:[te]:*"))
        assert [key.rpartition(b"record:")[2] for key in keys] == [b"0:e:u1", b"0:e:u2", b"0:t:u1"]
        for key in keys:
            assert await client.ttl(key) == KEEP.idle_days * 86_400
            await client.expire(key, 10)
        await record(store, event(2), event(3, user="u2", kind="exposure"))
        assert {await client.ttl(key) for key in keys} == {KEEP.idle_days * 86_400}
        await client.aclose()

    async def test_a_store_that_is_bound_to_no_log_drops_no_mark(self, config: RedisConfig) -> None:
        store = RedisBehaviourStore(make_redis(config), config)
        await store.forget([forgotten("u1", {0: 5}, topic_id="other")], source="t:0", next_offset=1)
        assert await store.drop_spent_marks({}, sources=()) == 0 and await store.bound_log() is None
        await store.bind(LOG)
        assert await store.bound_log() == LOG
        assert await store.drop_spent_marks({}, sources={"t:0"}) == 1
        await store.close()

    @pytest.fixture
    async def config(self) -> AsyncIterator[RedisConfig]:
        async with small_redis() as url:
            yield RedisConfig(url=url)


@pytest.mark.live
class TestRedisBehaviourStore(RedisBehaviourStoreContract):
    @pytest.fixture
    def config(self, valkey: str) -> RedisConfig:
        return RedisConfig(url=valkey, key_prefix=f"t{os.urandom(4).hex()}:")
