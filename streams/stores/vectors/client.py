"""Connection to Milvus: one client per event loop, a timeout on every call, one translation of its errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc
from pymilvus import AsyncMilvusClient, MilvusClient
from pymilvus.exceptions import DataNotMatchException, MilvusException, ParamError

from schemas.errors import Misconfigured, Reason, StoreUnavailable, WriteRejected
from streams.stores.vectors.config import MilvusConfig

T = TypeVar("T")

_NOT_LOADED = 101
_COLLECTION_NOT_FOUND = 100
_INPUT_REFUSED = frozenset({6, 1100, 1101, 1804})
"""Status codes that say the request itself is wrong: Milvus Lite's illegal argument, the server's invalid parameter,
missing parameter and data mismatch. Everything else may heal and is retried."""

_OF_LOGINS = ("auth check failure", "unauthenticated", "permission deny", "permission denied", "privilege")
"""How Milvus words that it refuses a login or a right; its codes for these differ between versions."""

_NO_IDLE_PINGS = {"grpc.keepalive_permit_without_calls": 0, "grpc.keepalive_time_ms": 300_000}
"""pymilvus pings an idle connection every 10 s; a plain gRPC server, as the embedded one is, hangs up on such clients
("too_many_pings"), and a call that is under way then fails."""


class _ClosedMeanwhile(Exception):
    """The connection was closed; gRPC cancels the calls in flight."""


@dataclass(eq=False)
class _Client:
    """A client, and the number of calls that use it now."""

    milvus: AsyncMilvusClient
    in_flight: int = 0
    is_closed: bool = False

    async def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            with contextlib.suppress(MilvusException, grpc.RpcError, OSError, TimeoutError):
                await self.milvus.close()


class MilvusConnection:
    """An `AsyncMilvusClient` that is made inside the running loop, and again after the server was away.

    A call that fails takes the client away from later calls, not from those in flight: the last of them closes it.
    """

    def __init__(self, config: MilvusConfig) -> None:
        self._config = config
        self._client: _Client | None = None
        self._connecting = asyncio.Lock()

    async def call(self, what: str, operation: Callable[[AsyncMilvusClient], Awaitable[T]]) -> T:
        """Run one operation within the timeout.

        An embedded server that was restarted has its collections released: they are loaded again and the operation is
        repeated once.

        Raises `StoreUnavailable` for what may heal, `WriteRejected` for what the server refuses as wrong.
        """
        try:
            try:
                return await self._attempt(operation)
            except MilvusException as error:
                if error.code != _NOT_LOADED:
                    raise
            await self._attempt(lambda client: client.load_collection(self._config.alias, timeout=self._timeout))
            return await self._attempt(operation)
        except _ClosedMeanwhile as error:
            raise self._unavailable(what, str(error)) from None
        except MilvusException as error:
            raise self._translated(what, error) from error
        except (grpc.RpcError, OSError, TimeoutError) as error:
            raise self._unavailable(what, repr(error)) from error

    async def call_blocking(self, what: str, operation: Callable[[MilvusClient], T]) -> T:
        """Run an operation of the synchronous client in a thread.

        For setting up collections only: the asynchronous client waits for an index by a call that Milvus Lite lacks.
        """

        def run() -> T:
            client = MilvusClient(
                self._config.uri,
                token=self._token,
                timeout=self._timeout,
                grpc_options=_NO_IDLE_PINGS,
                **self._config.tls_options(),
            )
            try:
                return operation(client)
            finally:
                client.close()

        quiet_client_logs()
        try:
            return await asyncio.to_thread(run)
        except MilvusException as error:
            raise self._translated(what, error) from error
        except (grpc.RpcError, OSError, TimeoutError) as error:
            raise self._unavailable(what, repr(error)) from error

    async def close(self) -> None:
        """Close the client, whatever is in flight; the next call makes a new one."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    @property
    def _timeout(self) -> float:
        return self._config.timeout_seconds

    @property
    def _token(self) -> str:
        return self._config.token.get_secret_value() if self._config.token else ""

    async def _attempt(self, operation: Callable[[AsyncMilvusClient], Awaitable[T]]) -> T:
        client = await self._connected()
        client.in_flight += 1
        try:
            # the client's own timeouts do not cover waiting for the connection
            return await asyncio.wait_for(operation(client.milvus), self._timeout + 1.0)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # this task was not cancelled itself: passed on, the error would end it silently
            raise _ClosedMeanwhile("the connection was closed while the call was under way") from None
        except (MilvusException, grpc.RpcError, OSError, TimeoutError) as error:
            if self._client is client and _may_be_broken(error):
                self._client = None
            raise
        finally:
            client.in_flight -= 1
            if client is not self._client and not client.in_flight:
                await client.close()

    async def _connected(self) -> _Client:
        async with self._connecting:
            if self._client is None:
                quiet_client_logs()
                self._client = _Client(
                    AsyncMilvusClient(
                        self._config.uri,
                        token=self._token,
                        timeout=self._timeout,
                        dedicated=True,
                        grpc_options=_NO_IDLE_PINGS,
                        **self._config.tls_options(),
                    )
                )
            return self._client

    def _translated(self, what: str, error: MilvusException) -> StoreUnavailable | WriteRejected | Misconfigured:
        refused = isinstance(error, (ParamError, DataNotMatchException)) or error.is_input_error
        if refused or error.code in _INPUT_REFUSED:
            return WriteRejected(Reason.WRITE_REJECTED, f"Milvus refuses {what}: {error.message}")
        if any(word in error.message.lower() for word in _OF_LOGINS):
            return Misconfigured(
                f"Milvus at {self._config.shown_uri} refuses {what}: {error.message} (MIM_MILVUS__TOKEN)"
            )
        return self._unavailable(what, f"{error.message} (code {error.code})")

    def _unavailable(self, what: str, detail: str) -> StoreUnavailable:
        # a server that refuses the handshake or the login at the start is silent to this client
        names = ["URI"] + ["SSL_CAFILE"] * self._config.uri.startswith("https://") + ["TOKEN"] * bool(self._token)
        settings = ", ".join(f"MIM_MILVUS__{name}" for name in names)
        return StoreUnavailable("Milvus", f"{what} at {self._config.shown_uri} ({settings}): {detail}")


def _may_be_broken(error: Exception) -> bool:
    """Whether a later call should get a new connection."""
    healthy = {*_INPUT_REFUSED, _COLLECTION_NOT_FOUND, _NOT_LOADED}
    return not (isinstance(error, MilvusException) and error.code in healthy)


def quiet_client_logs() -> None:
    """Keep pymilvus from logging a traceback per failed call; the errors themselves are raised and handled."""
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == "pymilvus":
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
