"""What kind of server answers at the address of Redis, and whether it keeps what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from streams.stores.histories.client import RedisConfig, redis_errors

OLDEST = (6, 2)
"""The oldest version of Redis that has the commands used here."""


@dataclass(frozen=True)
class RedisServer:
    """What a server says of itself; None where it does not say, as to a login without the right to ask."""

    version: str | None
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
        about = await _asked(client.info, "server") | await _asked(client.info, "memory")
        about |= await _asked(client.config_get, "maxmemory*")
    policy, limit = about.get("maxmemory-policy", about.get("maxmemory_policy")), about.get("maxmemory")
    return RedisServer(
        version=str(about["redis_version"]) if "redis_version" in about else None,
        policy=None if policy is None else str(policy),
        max_memory=None if limit is None else int(limit),
    )


async def _asked(ask: Any, about: str) -> dict[str, Any]:
    try:
        return dict(await ask(about))
    except ResponseError:  # managed servers, and logins with few rights
        return {}
