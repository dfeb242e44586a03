"""Connections to Redis: how they are shared, and which servers they stay with."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from schemas.errors import Misconfigured, StoreBusy, StoreUnavailable
from streams.stores.histories import pool
from streams.stores.histories.client import RedisConfig, make_redis, redis_errors, transact
from streams.stores.histories.redis_store import RedisBehaviourStore
from tests.factories.resp_server import RespServer, resp_server

READONLY = b"-READONLY You can't write against a read only replica.\r\n"


def config_of(server: RespServer, **more: Any) -> RedisConfig:
    return RedisConfig.model_validate({"url": server.url, "timeout_seconds": 5.0} | more)


async def test_more_calls_than_connections_wait_for_their_turn() -> None:
    async def slowly(words: list[str]) -> bytes:
        if words[0] == "GET":
            await asyncio.sleep(0.01)
        return b"$-1\r\n" if words[0] == "GET" else b""

    async with resp_server(slowly) as server:
        client: Any
        async with aclosing(make_redis(config_of(server, max_connections=4))) as client:
            assert await asyncio.gather(*(client.get("a") for _ in range(40))) == [None] * 40
        assert server.accepted == 4


async def test_who_waits_too_long_for_a_connection_is_told_so_and_not_that_redis_is_away() -> None:
    async def never(words: list[str]) -> bytes:
        if words[0] == "GET":
            await asyncio.sleep(3)
        return b""

    async with resp_server(never) as server:
        config = config_of(server, max_connections=1, timeout_seconds=0.2)
        client: Any
        async with aclosing(make_redis(config)) as client:
            first = asyncio.create_task(client.get("a"))
            await asyncio.sleep(0.05)
            client.connection_pool.timeout = 0.05
            with pytest.raises(StoreBusy, match="MIM_REDIS__MAX_CONNECTIONS"), redis_errors(config):
                await client.get("b")
            with pytest.raises(StoreUnavailable) as away, redis_errors(config):
                await first
            assert not isinstance(away.value, StoreBusy)


@pytest.mark.parametrize("how", ["command", "script", "transaction"])
async def test_a_refused_write_is_followed_by_a_look_at_where_the_address_leads_now(how: str) -> None:
    is_demoted = True

    def answer(words: list[str]) -> bytes:
        if words[0] == "EXEC":
            return (
                b"-EXECABORT Transaction discarded because of previous errors.\r\n" if is_demoted else b"*1\r\n+OK\r\n"
            )
        if words[0] in ("SET", "EVAL"):
            return READONLY if is_demoted else b"+QUEUED\r\n" if how == "transaction" else b""
        return b""

    async with resp_server(answer) as server:
        config = config_of(server)
        client: Any
        async with aclosing(make_redis(config)) as client:

            async def write() -> None:
                async def change(pipe: Any) -> None:
                    pipe.multi()
                    pipe.set("a", 1)

                if how == "transaction":
                    await transact(client, config, "a", change=change, conflict="")
                    return
                with redis_errors(config):
                    await (client.set("a", 1) if how == "command" else client.eval("return 1", 0))

            with pytest.raises(StoreUnavailable, match=r"READONLY|read only"):
                await write()
            before = server.accepted
            is_demoted = False
            await write()
            assert server.accepted == before + 1, "the connection to the demoted server is not used again"
            await write()
            assert server.accepted == before + 1


async def test_a_connection_is_not_used_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async with resp_server(lambda words: b"") as server:
        client: Any
        async with aclosing(make_redis(config_of(server))) as client:
            await client.ping()
            await client.ping()
            assert server.accepted == 1
            monkeypatch.setattr(pool, "MAX_AGE_SECONDS", -1.0)
            await client.ping()
            await client.ping()
            assert server.accepted == 2


@pytest.mark.parametrize(
    "asked",
    [b"$17\r\ncluster_state:ok\n\r\n", b"-NOPERM this user has no permissions to run the 'cluster|info' command\r\n"],
    ids=["it says so", "it keeps it from this user"],
)
async def test_a_redis_cluster_is_refused_with_the_way_out(asked: bytes) -> None:
    def answer(words: list[str]) -> bytes:
        split = b"-CROSSSLOT Keys in request don't hash to the same slot\r\n"
        return {"CLUSTER": asked, "MGET": split, "GET": b"-MOVED 1 127.0.0.1:1\r\n"}.get(words[0], b"")

    async with resp_server(answer) as server:
        config = config_of(server)
        store = RedisBehaviourStore(make_redis(config), config)
        for ask in (store.bound_log, lambda: store.taken_items("ann")):
            with pytest.raises(Misconfigured, match=r"Redis Cluster.*MIM_REDIS__URL"):
                await ask()
        if asked.startswith(b"$"):
            with pytest.raises(Misconfigured, match="Redis Cluster"):
                await store.ping()
        await store.close()


async def test_a_server_that_is_no_cluster_or_does_not_say_is_used() -> None:
    for reply in (b"-ERR This instance has cluster support disabled\r\n", b"-ERR unknown command 'CLUSTER'\r\n"):
        async with resp_server(lambda words, reply=reply: reply if words[0] == "CLUSTER" else b"") as server:  # type: ignore[misc]
            config = config_of(server)
            store = RedisBehaviourStore(make_redis(config), config)
            await store.ping()
            await store.close()
