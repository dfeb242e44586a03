"""What kind of server answers at the address of Redis, and whether it keeps what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from schemas.errors import Misconfigured
from streams.stores.histories.client import RedisConfig, redis_errors

OLDEST = (6, 2)
"""The oldest version of Redis that has the commands used here."""


@dataclass(frozen=True)
class RedisServer:
    """What a server says of itself; None where it does not say, as to a login without the right to ask."""

    version: str | None
    is_cluster: bool | None
    policy: str | None
    """`maxmemory-policy`: what it does when memory is short."""
    max_memory: int | None
    """Limit in bytes; 0 is no limit."""

    @property
    def is_too_old(self) -> bool:
        """Whether commands that are used here are missing."""
        return self.version is not None and tuple(int(part) for part in self.version.split(".")[:2]) < OLDEST

    @property
    def evicts(self) -> bool | None:
        """Whether it may drop histories, which carry an expiry, or positions; None if that is not known."""
        return None if self.policy is None else self.policy != "noeviction" and self.max_memory != 0


async def describe_server(client: Any, config: RedisConfig) -> RedisServer:
    """Ask a server what it is. Raises as `redis_errors` does, but not where a question is not allowed."""
    with redis_errors(config):
        await client.ping()
        about = await _asked(client.info, "server") | await _asked(client.info, "cluster")
        about |= await _asked(client.info, "memory") | await _asked(client.config_get, "maxmemory*")
    policy, limit = about.get("maxmemory-policy", about.get("maxmemory_policy")), about.get("maxmemory")
    mode = about.get("redis_mode", about.get("server_mode"))
    is_cluster = bool(about["cluster_enabled"]) if "cluster_enabled" in about else mode == "cluster" if mode else None
    return RedisServer(
        version=str(about["redis_version"]) if "redis_version" in about else None,
        is_cluster=is_cluster,
        policy=None if policy is None else str(policy),
        max_memory=None if limit is None else int(limit),
    )


def refuse_cluster(config: RedisConfig) -> Misconfigured:
    """The refusal of a sharded Redis."""
    return Misconfigured(
        f"Redis at {config.shown_url} is a Redis Cluster, which spreads the keys that are changed together; "
        "set MIM_REDIS__URL to a single server, or a primary with replicas"
    )


async def require_single_server(client: Any, config: RedisConfig) -> None:
    """Raise `Misconfigured` if the server says that it is a Redis Cluster."""
    with redis_errors(config):
        about = await _asked(client.info, "cluster")
    if about.get("cluster_enabled"):
        raise refuse_cluster(config)


async def _asked(ask: Any, about: str) -> dict[str, Any]:
    try:
        return dict(await ask(about))
    except ResponseError:  # managed servers, and logins with few rights
        return {}
