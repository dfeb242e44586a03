"""What a recorder's transaction watches, and what is left of a view that was cleared."""

from __future__ import annotations

from streams.stores.histories.client import RedisConfig, make_redis
from streams.stores.histories.redis_store import RedisBehaviourStore, View
from tests.factories.click_log import LOG, event
from tests.factories.resp_server import resp_server
from tests.factories.small_redis import small_redis


def bulk(value: bytes | None) -> bytes:
    return b"$-1\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value)


async def test_a_batch_watches_all_that_it_was_decided_from() -> None:
    commands: list[list[str]] = []

    def answer(words: list[str]) -> bytes:
        commands.append(words)
        view = View(0, LOG).dump()
        queued = commands[::-1].index(["MULTI"]) - 1 if words == ["EXEC"] else 0
        return {
            "GET": bulk(view),
            "HGET": bulk(None),
            "MGET": b"*%d\r\n" % (len(words) - 1) + bulk(view) + bulk(None) * (len(words) - 2),
            "EXISTS": b":0\r\n",
            "EXEC": b"*%d\r\n" % queued + b"+OK\r\n" * queued,
        }.get(words[0], b"")

    async with resp_server(answer) as server:
        config = RedisConfig(url=server.url)
        store = RedisBehaviourStore(make_redis(config), config)
        await store.bind(LOG)
        commands.clear()
        events = [event(0, user="ann"), event(1, user="bob", kind="exposure")]
        report = await store.record(3, events, first_offset=0, next_offset=2)
        await store.close()
    assert (report.takes, report.exposures) == (1, 1)
    (watched,) = (words[1:] for words in commands if words[0] == "WATCH")
    read = {key for words in commands for key in words[1:] if words[0] in ("MGET", "EXISTS")}
    assert {*watched} == read | {"mim:record:forgotten", "mim:record:0:p:3"}
    assert read >= {"mim:record:0:t:ann", "mim:record:0:e:ann", "mim:record:0:e:bob", "mim:record:view"}
    assert [words[0] for words in commands].index("WATCH") < [words[0] for words in commands].index("MGET")


async def test_clearing_removes_what_was_before_and_nothing_that_was_recorded_since() -> None:
    async with small_redis() as url:
        config = RedisConfig(url=url)
        store = RedisBehaviourStore(make_redis(config), config)
        for _ in range(2):
            await store.clear()
            await store.bind(LOG)
            await store.record(3, [event(0, user="ann")], first_offset=0, next_offset=1)
        await store._unlink_before(2)  # as one that another process began before this one recorded
        assert await store.positions() == {3: 1} and len(await store.history("ann")) == 1
        kept = {key async for key in store._client.scan_iter(match="mim:record:*", count=1_000)}
        await store.close()
    generations = {key.split(b":")[2] for key in kept if key.count(b":") > 2}
    assert generations == {b"2"}
