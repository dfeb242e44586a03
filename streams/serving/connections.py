"""The connections of the HTTP server: bounded in number, and in the time in which the head of a request arrives.

aiohttp limits neither. Thousands of half-sent requests would use up the open files of the process.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import cast

import structlog
from aiohttp import web
from typing_extensions import override

from streams.serving.reports import DroppedConnection

log = structlog.get_logger()


def _last_words(status: str, code: str, message: str) -> bytes:
    body = f'{{"error":{{"code":"{code}","message":"{message}"}}}}'
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nRetry-After: 1\r\n"
    return f"{head}Connection: close\r\n\r\n{body}".encode()


_FULL = _last_words("503 Service Unavailable", "overloaded", "every connection is in use; try again")
_TOO_SLOW = _last_words("408 Request Timeout", "too_slow", "the head of the request did not arrive in time")


class _Guard(asyncio.Protocol):
    """Stands before the protocol of one connection, and passes everything on."""

    def __init__(self, inner: asyncio.Protocol, all_of_them: Connections) -> None:
        self._inner = inner
        self._all = all_of_them
        self.transport: asyncio.Transport | None = None
        self.deadline: asyncio.TimerHandle | None = None
        """Ends the wait for the rest of a head; None while none has begun."""

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._inner.connection_made(transport)
        self._all.opened(self)

    @override
    def data_received(self, data: bytes) -> None:
        self._all.heard(self)
        self._inner.data_received(data)

    @override
    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    @override
    def pause_writing(self) -> None:
        self._inner.pause_writing()

    @override
    def resume_writing(self) -> None:
        self._inner.resume_writing()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._all.closed(self)
        self._inner.connection_lost(exc)


class Connections:
    """All open connections. Call it for the protocol of a new one, as `loop.create_server` does.

    When `limit` are open, the one that has waited longest without a request in hand makes room for the next; if all
    have one, the next is refused.
    """

    def __init__(self, limit: int, head_seconds: float, on_report: Callable[[object], None]) -> None:
        self._limit = limit
        self._head_seconds = head_seconds
        self._on_report = on_report
        self._open: dict[asyncio.BaseTransport, _Guard] = {}
        self._waiting: dict[_Guard, None] = {}
        """Connections without a request in hand, the longest waiting first."""
        self.serve: Callable[[], asyncio.Protocol] | None = None
        """Makes the protocol behind each connection: the server of a runner."""

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def __call__(self) -> asyncio.Protocol:
        """The protocol of one more connection."""
        assert self.serve is not None
        return _Guard(self.serve(), self)

    @contextmanager
    def in_hand(self, transport: asyncio.BaseTransport | None) -> Iterator[None]:
        """A request of this connection is complete but for its body, and is answered inside."""
        guard = self._open.get(transport) if transport is not None else None
        if guard is None:  # lost meanwhile, or served by another factory
            yield
            return
        self._end_wait(guard)
        self._waiting.pop(guard, None)
        try:
            yield
        finally:
            if transport in self._open:
                self._waiting[guard] = None

    def opened(self, guard: _Guard) -> None:
        """Add a connection, and make room for it if there is none."""
        assert guard.transport is not None
        self._open[guard.transport] = guard
        self._waiting[guard] = None
        if len(self._open) <= self._limit:
            return
        oldest = next(iter(self._waiting))
        self._drop(oldest, "full", _FULL if oldest is guard else b"")

    def heard(self, guard: _Guard) -> None:
        """Bytes came: the first ones of a head start its time."""
        if guard.deadline is None and guard in self._waiting:
            loop = asyncio.get_running_loop()
            guard.deadline = loop.call_later(self._head_seconds, self._drop, guard, "slow_head", _TOO_SLOW)

    def closed(self, guard: _Guard) -> None:
        """Forget a connection."""
        self._end_wait(guard)
        self._waiting.pop(guard, None)
        if guard.transport is not None:
            self._open.pop(guard.transport, None)

    def _end_wait(self, guard: _Guard) -> None:
        if guard.deadline is not None:
            guard.deadline.cancel()
            guard.deadline = None

    def _drop(self, guard: _Guard, reason: str, last_words: bytes) -> None:
        self.closed(guard)  # at once, since the loss is noticed later
        if guard.transport is not None:
            guard.transport.write(last_words)
            guard.transport.close()
        self._on_report(DroppedConnection(reason))


@asynccontextmanager
async def listening(
    app: web.Application, connections: Connections, *, host: str, port: int, drain_seconds: float
) -> AsyncIterator[tuple[str, int]]:
    """Serve `app` inside; gives the address. At the end requests in hand have `drain_seconds` left.

    Bodies reach the handlers as they were sent: aiohttp would unpack them before a handler decides anything.

    Raises `OSError` if the address cannot be used.
    """
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=drain_seconds, auto_decompress=False)
    await runner.setup()
    try:
        connections.serve = runner.server
        server = await asyncio.get_running_loop().create_server(
            connections, host, port, reuse_address=True, backlog=128
        )
        try:
            yield server.sockets[0].getsockname()[:2]
        finally:
            server.close()
    finally:
        await runner.cleanup()


def affordable_connections(wanted: int, others: int) -> int:
    """Raise this process's limit of open files to `wanted` connections and `others`; how many connections it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + others
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    fits = max(1, soft - others)
    if fits < wanted:
        log.warning(
            "serve.fewer_connections",
            wanted=wanted,
            connections=fits,
            advice=f"raise the limit of open files (ulimit -n) to {needed}, or lower MIM_SERVE__MAX_CONNECTIONS",
        )
    return min(wanted, fits)
