"""Connections to Redis: callers wait for a free one, none stays with a demoted server, and none is to a cluster.

After a switchover the address leads to another server, and an open connection still to the former one, which answers
READONLY for ever. So a connection is closed after READONLY, and anyhow after a minute; the next use looks the address
up again.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis import exceptions
from redis.asyncio.connection import BlockingConnectionPool, Connection, SSLConnection, UnixDomainSocketConnection
from typing_extensions import override

from schemas.errors import StoreBusy

MAX_AGE_SECONDS = 60.0
"""How long a connection is used. A replica of the new primary still answers reads, however far behind it is."""


class ClusterRefused(exceptions.RedisError):
    """The server is one of a Redis Cluster."""


class _Noticing:
    """What a connection finds out about its server."""

    is_outdated = False
    """Whether the server refused a write as a replica does."""
    connected_at = 0.0

    async def read_response(self, *given: Any, **named: Any) -> Any:
        """As the client's own; a refused write is remembered until the connection is given back."""
        try:
            return await super().read_response(*given, **named)  # type: ignore[misc]
        except exceptions.ReadOnlyError:
            self.is_outdated = True
            raise


class _Tcp(_Noticing, Connection):
    pass


class _Tls(_Noticing, SSLConnection):
    pass


class _Unix(_Noticing, UnixDomainSocketConnection):
    pass


_KINDS: dict[Any, Any] = {Connection: _Tcp, SSLConnection: _Tls, UnixDomainSocketConnection: _Unix}


async def _greet(connection: Any) -> None:
    """Log in, and ask whether the server belongs to a cluster; one that is none, or hides it, refuses the question."""
    await connection.on_connect()
    connection.is_outdated, connection.connected_at = False, asyncio.get_running_loop().time()
    await connection.send_command("CLUSTER", "INFO")
    try:
        await connection.read_response()
    except exceptions.ResponseError:
        return
    raise ClusterRefused("cluster_enabled:1")


class Pool(BlockingConnectionPool):
    """At most `max_connections`; a caller waits `timeout` seconds for a free one, then gets `StoreBusy`."""

    def __init__(self, *, connection_class: Any = Connection, **options: Any) -> None:
        kind = _KINDS.get(connection_class, connection_class)
        super().__init__(connection_class=kind, redis_connect_func=_greet, **options)

    @override
    async def get_connection(self, *given: Any, **named: Any) -> Any:
        try:
            return await super().get_connection(*given, **named)  # type: ignore[no-untyped-call]
        except exceptions.ConnectionError as error:
            if not isinstance(error.__cause__, TimeoutError):
                raise
            raise StoreBusy(
                "Redis",
                f"all {self.max_connections} connections of this process (MIM_REDIS__MAX_CONNECTIONS) were in use for "
                f"{self.timeout:g} s (MIM_REDIS__TIMEOUT_SECONDS)",
            ) from None

    @override
    async def release(self, connection: Any) -> None:
        age = asyncio.get_running_loop().time() - connection.connected_at
        if connection.is_outdated or age > MAX_AGE_SECONDS:
            await connection.disconnect()
        await super().release(connection)
