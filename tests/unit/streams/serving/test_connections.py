"""Connections of the HTTP server: bounded in number and in the time that a head takes."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import structlog
from aiohttp import web

from streams.serving import connections as module
from streams.serving.connections import Connections, affordable_connections, listening
from streams.serving.reports import DroppedConnection
from tests.factories.waiting import until

ASK = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
HALF = b"GET /slow HTTP/1.1\r\nHost:"


@dataclass
class Site:
    address: tuple[str, int]
    connections: Connections
    gate: asyncio.Event
    asked: int = 0
    dropped: list[str] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connect(self, text: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*self.address)
        self.writers.append(writer)
        writer.write(text)
        return reader, writer


@asynccontextmanager
async def site(*, limit: int = 10, head_seconds: float = 30.0) -> AsyncIterator[Site]:
    dropped: list[str] = []

    def note(report: object) -> None:
        assert isinstance(report, DroppedConnection)
        dropped.append(report.reason)

    connections = Connections(limit, head_seconds, note)
    gate = asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        opened.asked += 1
        with connections.in_hand(request.transport):
            await gate.wait()
            return web.Response(text="done")

    app = web.Application()
    app.router.add_get("/slow", slow)
    async with listening(app, connections, host="127.0.0.1", port=0, drain_seconds=0.1) as address:
        opened = Site(address, connections, gate, dropped=dropped)
        try:
            async with asyncio.timeout(20):
                yield opened
        finally:
            for writer in opened.writers:
                writer.close()
            await asyncio.gather(*(writer.wait_closed() for writer in opened.writers), return_exceptions=True)


async def test_a_head_that_drips_in_is_cut_off_and_a_whole_one_is_answered_however_long_it_takes() -> None:
    async with site(head_seconds=0.2) as here:
        slow, writer = await here.connect(HALF)
        whole, _ = await here.connect(ASK)

        async def drip() -> None:
            while not writer.is_closing():
                writer.write(b"x")
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        assert (await slow.read()).startswith(b"HTTP/1.1 408")
        dripping.cancel()
        assert here.dropped == ["slow_head"] and len(here.connections) == 1
        await asyncio.sleep(0.3)
        here.gate.set()
        assert (await whole.readuntil(b"done")).startswith(b"HTTP/1.1 200")


async def test_the_time_of_a_head_begins_anew_with_each_request_of_a_connection() -> None:
    async with site(head_seconds=0.3) as here:
        here.gate.set()
        reader, writer = await here.connect()
        for _ in range(4):
            await asyncio.sleep(0.15)
            writer.write(ASK)
            assert b"200" in await reader.readuntil(b"done")
        writer.write(HALF)
        assert (await reader.read()).startswith(b"HTTP/1.1 408")


async def test_when_all_places_are_taken_the_longest_waiting_connection_makes_room() -> None:
    async with site(limit=3) as here:
        half = [await here.connect(HALF) for _ in range(3)]
        await until(lambda: len(here.connections) == 3, every=0.01)
        here.gate.set()
        reader, _ = await here.connect(ASK)
        assert b"200" in await reader.readuntil(b"done")
        assert await half[0][0].read() == b"" and here.dropped == ["full"]
        assert len(here.connections) == 3


async def test_requests_in_hand_keep_their_connections_and_one_too_many_is_told_so() -> None:
    async with site(limit=2) as here:
        held = [await here.connect(ASK) for _ in range(2)]
        await until(lambda: here.asked == 2, every=0.01)
        refused, _ = await here.connect(ASK)
        assert (await refused.read()).startswith(b"HTTP/1.1 503")
        here.gate.set()
        for reader, _ in held:
            assert b"200" in await reader.readuntil(b"done")
        again, _ = await here.connect(ASK)
        assert b"200" in await again.readuntil(b"done")


async def test_thousands_of_half_sent_requests_leave_room_for_a_whole_one() -> None:
    async with site(limit=20) as here:
        for _ in range(300):
            await here.connect(HALF)
        assert len(here.connections) <= 20
        here.gate.set()
        reader, _ = await here.connect(ASK)
        assert b"200" in await reader.readuntil(b"done")


async def test_what_an_application_holds_is_given_back_when_it_ends() -> None:
    app, given_back = web.Application(), []

    async def give_back(ended: web.Application) -> None:
        given_back.append(ended)

    app.on_cleanup.append(give_back)
    async with listening(app, Connections(1, 1.0, print), host="127.0.0.1", port=0, drain_seconds=0.1) as address:
        with pytest.raises(OSError, match="in use"):
            async with listening(web.Application(), Connections(1, 1.0, print), host=address[0], port=address[1],
                                 drain_seconds=0.1):  # fmt: skip
                pass
        assert not given_back
    assert given_back == [app]


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "allowed", "set_to"),
    [
        (1_024, 4_096, 500, 500, None),
        (1_024, 4_096, 1_000, 1_000, 1_320),
        (1_024, resource.RLIM_INFINITY, 1_000, 1_000, 1_320),
        (1_024, 1_024, 1_000, 704, 1_024),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1_000, 1_000, None),
    ],
)
def test_the_limit_of_open_files_is_raised_or_fewer_connections_are_taken(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int, allowed: int, set_to: int | None
) -> None:
    given: list[int] = []
    monkeypatch.setattr(module.resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(module.resource, "setrlimit", lambda _, limits: given.append(limits[0]))
    with structlog.testing.capture_logs() as logged:
        assert affordable_connections(wanted, 320) == allowed
    assert given == ([] if set_to is None else [set_to])
    assert [line["event"] for line in logged] == (["serve.fewer_connections"] if allowed < wanted else [])
