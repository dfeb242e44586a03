"""Redis connection: one configuration, one client, one translation of its errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from schemas.errors import Misconfigured, StoreUnavailable
from streams.runtime.endpoints import checked_endpoint, shown_endpoint
from streams.stores.histories.pool import ClusterRefused, Pool

T = TypeVar("T")

MAX_CONFLICTS = 20
"""How often an optimistic change is attempted while other processes keep changing the same keys."""

_HEALED_BY_WAITING = ("LOADING", "BUSY", "MISCONF", "MASTERDOWN", "READONLY", "CLUSTERDOWN", "TRYAGAIN", "OOM")
"""Replies of a server that is up but cannot serve now: loading its file, full, failing over, unable to persist."""


class RedisConfig(BaseModel):
    """How to reach Redis or Valkey: one server, or a primary with replicas (not a sharded cluster)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    url: str = "redis://127.0.0.1:16379/0"
    """`redis://host:port/database`, `rediss://` with TLS, or `unix://path`. The default is the embedded stack's."""
    username: str | None = None
    """User, where the server has access lists."""
    password: SecretStr | None = None
    """Password; never logged. Give it here rather than in the URL."""
    ssl_cafile: str | None = None
    """Certificate authority file for `rediss://`; the system's by default."""
    ssl_certfile: str | None = None
    """Certificate that this client shows, where the server asks for one."""
    ssl_keyfile: str | None = None
    """Key of that certificate."""
    key_prefix: str = Field(default="mim:", pattern=r"^[A-Za-z0-9._:-]{1,64}$")
    """Put before every key, so that several systems can share a server."""
    timeout_seconds: float = Field(default=5.0, gt=0)
    """How long to wait for a connection, and for each reply."""
    max_connections: int = Field(default=64, ge=1)
    """Connections that one process opens at most; a call waits up to `timeout_seconds` for a free one."""

    @field_validator("url")
    @classmethod
    def _url_reads_one_way(cls, url: str) -> str:
        return checked_endpoint(url, schemes=("redis", "rediss", "unix"))

    @property
    def shown_url(self) -> str:
        """The address without its login."""
        return shown_endpoint(self.url)


def make_redis(config: RedisConfig) -> Redis:
    """Make a client with time limits and without hidden retries: waiting is up to the caller. Opens no socket."""
    files = {"ssl_ca_certs": config.ssl_cafile, "ssl_certfile": config.ssl_certfile, "ssl_keyfile": config.ssl_keyfile}
    tls: dict[str, Any] = {name: file for name, file in files.items() if file is not None}
    if tls and not config.url.startswith("rediss://"):
        raise Misconfigured("MIM_REDIS__SSL_CAFILE, _CERTFILE and _KEYFILE need a MIM_REDIS__URL with rediss://")
    try:
        pool = Pool.from_url(
            config.url,
            **tls,
            username=config.username,
            password=config.password.get_secret_value() if config.password else None,
            socket_timeout=config.timeout_seconds,
            socket_connect_timeout=config.timeout_seconds,
            max_connections=config.max_connections,
            timeout=config.timeout_seconds,
            retry=Retry(NoBackoff(), 1),  # once, for a pooled connection that the server has closed meanwhile
        )
    except ValueError as error:  # an option behind '?'; host and port were read before
        raise Misconfigured(f"MIM_REDIS__URL ({config.shown_url}) is not an address of Redis: {error}") from None
    client: Redis = Redis.from_pool(pool)
    return client


def _tls_setting(config: RedisConfig) -> str:
    return ", MIM_REDIS__SSL_CAFILE" if config.url.startswith("rediss://") else ""


_CLUSTER = (ClusterRefused, exceptions.AskError, exceptions.ClusterCrossSlotError)  # a MOVED is an AskError, too


@contextmanager
def redis_errors(config: RedisConfig) -> Iterator[None]:
    """Translate redis-py's errors: what heals by waiting is `StoreUnavailable`, a wrong password `Misconfigured`."""
    try:
        yield
    except _CLUSTER as error:
        raise Misconfigured(
            f"Redis at {config.shown_url} (MIM_REDIS__URL) is a Redis Cluster, which spreads keys over servers; data "
            "and position of a partition are written together, which a cluster refuses: set MIM_REDIS__URL to a Redis "
            "or Valkey with cluster mode off (one server, or a primary with replicas)"
        ) from error
    except exceptions.AuthenticationError as error:
        raise Misconfigured(
            f"Redis at {config.shown_url} refuses the login: {error} (MIM_REDIS__USERNAME, MIM_REDIS__PASSWORD)"
        ) from error
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
        raise StoreUnavailable(
            "Redis", f"no connection to {config.shown_url} (MIM_REDIS__URL{_tls_setting(config)}): {error}"
        ) from error
    except exceptions.WatchError as error:  # a connection lost while watching; `transact` catches the conflicts
        raise StoreUnavailable("Redis", f"{config.shown_url} (MIM_REDIS__URL) went away: {error}") from error
    except exceptions.ResponseError as error:
        text = str(error)
        if text.startswith(_HEALED_BY_WAITING) or isinstance(
            error, exceptions.OutOfMemoryError | exceptions.ReadOnlyError
        ):
            raise StoreUnavailable("Redis", f"{config.shown_url} (MIM_REDIS__URL) answers: {text}") from error
        if text.startswith(("NOAUTH", "NOPERM", "WRONGPASS")):
            raise Misconfigured(
                f"Redis at {config.shown_url} refuses a command: {text} (MIM_REDIS__USERNAME, MIM_REDIS__PASSWORD)"
            ) from error
        raise


async def transact(
    client: Any, config: RedisConfig, *keys: str, change: Callable[[Any], Awaitable[T]], conflict: str
) -> T:
    """Run `change` in a transaction that watches `keys`; again from the start if one of them was changed meanwhile.

    `change` reads from the pipeline that it is given, then calls its `multi()` and queues the writes. Without queued
    writes there is no transaction. Errors are translated as by `redis_errors`; `StoreUnavailable` with the text
    `conflict` after `MAX_CONFLICTS` attempts.
    """
    with redis_errors(config):
        for _ in range(MAX_CONFLICTS):
            async with client.pipeline(transaction=True) as pipe:
                await pipe.watch(*keys)
                result = await change(pipe)
                if len(pipe):
                    try:
                        await pipe.execute()
                    except exceptions.WatchError:
                        continue
                return result
    raise StoreUnavailable("Redis", conflict)
