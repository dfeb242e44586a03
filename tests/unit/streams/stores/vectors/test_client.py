"""The connection to Milvus: what one failed call means for the others."""

from __future__ import annotations

import asyncio

import pytest
from pymilvus.exceptions import MilvusException

from schemas.errors import StoreUnavailable
from streams.stores.vectors import client as module
from streams.stores.vectors.client import MilvusConnection
from streams.stores.vectors.config import MilvusConfig
from streams.stores.vectors.milvus_index import MilvusItemIndex


class FakeClient:
    """Cancels the calls in flight when it is closed, as gRPC does."""

    made: list[FakeClient]

    def __init__(self, *_: object, **__: object) -> None:
        self.calls: set[asyncio.Task[object]] = set()
        self.closed = 0
        FakeClient.made.append(self)

    async def wait(self, gate: asyncio.Event) -> str:
        task = asyncio.ensure_future(gate.wait())
        self.calls.add(task)
        await task
        return "answered"

    async def describe_collection(self, *_: object, **__: object) -> dict[str, list[dict[str, str]]]:
        return {"fields": [{"name": "item_id"}]}

    async def close(self) -> None:
        self.closed += 1
        for call in self.calls:
            call.cancel()


@pytest.fixture(autouse=True)
def clients(monkeypatch: pytest.MonkeyPatch) -> list[FakeClient]:
    FakeClient.made = []
    monkeypatch.setattr(module, "AsyncMilvusClient", FakeClient)
    return FakeClient.made


async def fails(client: object) -> None:
    raise TimeoutError


@pytest.mark.parametrize("error", [TimeoutError(), OSError("gone"), MilvusException(1, "overloaded")], ids=repr)
async def test_a_call_that_fails_leaves_the_others_in_flight_alone(clients: list[FakeClient], error: Exception) -> None:
    connection, gate = MilvusConnection(MilvusConfig()), asyncio.Event()
    others = [asyncio.create_task(connection.call("a read", lambda client: client.wait(gate))) for _ in range(3)]
    await asyncio.sleep(0)

    async def fail(client: object) -> None:
        raise error

    with pytest.raises(StoreUnavailable):
        await connection.call("a search", fail)
    later = asyncio.create_task(connection.call("a read", lambda client: client.wait(gate)))
    await asyncio.sleep(0.01)
    assert len(clients) == 2, "later calls get a connection of their own"
    assert clients[0].closed == 0
    gate.set()
    assert await asyncio.gather(*others, later) == ["answered"] * 4
    assert (clients[0].closed, clients[1].closed) == (1, 0), "the last one in flight closes it"
    await connection.close()
    assert (clients[0].closed, clients[1].closed) == (1, 1)


async def test_a_late_failure_does_not_take_a_new_connection_away(clients: list[FakeClient]) -> None:
    connection, gate = MilvusConnection(MilvusConfig()), asyncio.Event()

    async def fail_later(client: object) -> None:
        await gate.wait()
        raise TimeoutError

    late = asyncio.create_task(connection.call("a read", fail_later))
    await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable):
        await connection.call("a read", fails)
    assert await connection.call("a read", lambda client: asyncio.sleep(0, "answered")) == "answered"
    gate.set()
    with pytest.raises(StoreUnavailable):
        await late
    assert await connection.call("a read", lambda client: asyncio.sleep(0, "answered")) == "answered"
    assert len(clients) == 2
    await connection.close()


async def test_closing_ends_what_is_in_flight_with_an_error_that_says_so(clients: list[FakeClient]) -> None:
    connection = MilvusConnection(MilvusConfig())
    waiting = asyncio.create_task(connection.call("a read", lambda client: client.wait(asyncio.Event())))
    await asyncio.sleep(0.01)
    await connection.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await waiting
    assert clients[0].closed == 1


async def test_a_caller_that_is_cancelled_ends_as_one_and_the_connection_stays(clients: list[FakeClient]) -> None:
    connection = MilvusConnection(MilvusConfig())
    waiting = asyncio.create_task(connection.call("a read", lambda client: client.wait(asyncio.Event())))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await connection.call("a read", lambda client: asyncio.sleep(0, "answered")) == "answered"
    assert len(clients) == 1 and not clients[0].closed
    await connection.close()


@pytest.mark.parametrize(("fresh", "level"), [(True, "Strong"), (False, "Bounded")])
async def test_only_what_needs_it_waits_for_every_acknowledged_write(
    clients: list[FakeClient], monkeypatch: pytest.MonkeyPatch, fresh: bool, level: str
) -> None:
    asked: list[str] = []

    async def query(self: FakeClient, *_: object, consistency_level: str, **__: object) -> list[object]:
        asked.append(consistency_level)
        return []

    monkeypatch.setattr(FakeClient, "query", query, raising=False)
    index = MilvusItemIndex(MilvusConfig(), encoder_version="e", dim=2)
    assert await index.fetch(["a"], fresh=fresh) == {}
    assert asked == [level]
    await index.close()
