"""Everything that uses Redis, against a real primary with its replica, and against a real Redis Cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from pathlib import Path

import pytest

from schemas.errors import Misconfigured, StoreUnavailable
from streams.indexing.slots import LeaseConfig, Slot
from streams.stores.histories.client import RedisConfig, make_redis
from streams.stores.histories.deleted_items import RedisDeletedItems
from streams.stores.histories.item_order import ItemState
from streams.stores.histories.redis_store import RedisBehaviourStore
from tests.factories.click_log import LOG, event
from tests.factories.redis_pair import RedisPair, redis_cluster, redis_pair
from tests.factories.waiting import until

pytestmark = pytest.mark.live
LEASE = LeaseConfig(ttl_seconds=1.2, renewals_per_ttl=8)


@pytest.fixture
def pair(tmp_path: Path, unused_tcp_port_factory: Callable[[], int]) -> Iterator[RedisPair]:
    with redis_pair(tmp_path, unused_tcp_port_factory) as pair:
        yield pair


def replicated(pair: RedisPair, key: str) -> bool:
    return bool(pair.ask(pair.replica, "EXISTS", key))


async def test_a_recorders_store_and_a_servers_reads_go_on_after_a_switchover(pair: RedisPair) -> None:
    config = RedisConfig(url=pair.url, timeout_seconds=1)
    writer, reader = (RedisBehaviourStore(make_redis(config), config) for _ in range(2))
    deleted = RedisDeletedItems(make_redis(config), config)
    await writer.bind(LOG)
    await writer.record(0, [event(0, item="a")], first_offset=0, next_offset=1)
    await deleted.lead("me", seconds=60)
    assert await reader.taken_items("u1") == ["a"]
    await until(lambda: replicated(pair, "mim:record:0:t:u1"))
    pair.switch()

    assert await reader.taken_items("u1") == ["a"]  # over the connection to the replica
    for again in (
        lambda: writer.record(0, [event(1, item="b")], first_offset=1, next_offset=2),
        lambda: deleted.mark({"a": ItemState(1, is_deleted=True)}, source="t:0", next_offset=1),
        lambda: deleted.lead("me", seconds=60),
    ):
        refused = 0
        while True:
            try:
                await again()
                break
            except StoreUnavailable:
                refused += 1
        assert refused <= 1, "the next use looks the address up again"
    await until(lambda: reader.taken_items("u1"), lambda found: found == ["a", "b"])

    pair.replica.kill()
    assert await reader.taken_items("u1") == ["a", "b"]
    assert await deleted.sweep(0) == (0, 1) and await reader.taken_items("u1") == ["b"]
    for store in (writer, reader):
        await store.close()
    await deleted._client.aclose()


async def test_a_workers_lease_is_kept_over_a_switchover(pair: RedisPair) -> None:
    config = RedisConfig(url=pair.url, timeout_seconds=1)
    async with aclosing(make_redis(config)) as ours, aclosing(make_redis(config)) as theirs:  # type: ignore[type-var]
        slot = Slot(ours, config, LEASE, role="index", name="0", token="ours")
        await slot.claim()
        keeping = asyncio.create_task(slot.keep())
        await until(lambda: replicated(pair, "mim:slot:index:0"))
        pair.switch()
        await asyncio.sleep(1.5 * LEASE.ttl_seconds)  # the lease that was replicated has run out
        assert pair.ask(pair.primary, "GET", "mim:slot:index:0") == b"ours"
        await slot.assert_held()
        with pytest.raises(Misconfigured, match="held by a living worker"):
            await Slot(theirs, config, LEASE, role="index", name="0", token="theirs").claim()
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping
        await slot.release()
        assert pair.ask(pair.primary, "GET", "mim:slot:index:0") is None


async def test_a_redis_cluster_is_refused_by_whatever_asks_first(
    tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    with redis_cluster(tmp_path, unused_tcp_port_factory) as url:
        config = RedisConfig(url=url)
        store = RedisBehaviourStore(make_redis(config), config)
        slot = Slot(make_redis(config), config, LEASE, role="index", name="0", token="ours")
        for ask in (store.ping, lambda: store.bind(LOG), lambda: store.taken_items("u1"), slot.claim):
            with pytest.raises(Misconfigured, match=r"Redis Cluster.*MIM_REDIS__URL.*cluster mode off"):
                await ask()
        await store.close()
        await slot._redis.aclose()
