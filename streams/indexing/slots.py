"""Worker slots: which process is `index-0`.

Kafka lets a member that comes back under its old name go on at once, without a rebalance; but two live workers of one
name push each other out for ever and neither commits anything. So a name is claimed by a lease before it is used.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog
from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis

from schemas.errors import Fenced, Misconfigured, StoreUnavailable
from streams.stores.histories.client import RedisConfig, redis_errors

log = structlog.get_logger()

# Set again if it is absent: the server may have lost it, and then no other worker holds it either.
_RENEW = """
local held = redis.call('GET', KEYS[1])
if held == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) return 1 end
if not held then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) return 1 end
return 0
"""

_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class LeaseConfig(BaseModel):
    """The lease of a slot."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    ttl_seconds: float = Field(default=6.0, gt=0.1)
    """How long a slot stays taken after its worker was killed."""
    renewals_per_ttl: int = Field(default=4, ge=2, le=20)
    """How often the lease is renewed within that time."""

    @property
    def ttl_ms(self) -> int:
        """The time to live in milliseconds."""
        return int(self.ttl_seconds * 1000)


class Slot:
    """One slot of a role, held by a lease in Redis."""

    def __init__(
        self,
        redis: Redis,
        redis_config: RedisConfig,
        config: LeaseConfig,
        *,
        role: str,
        name: str,
        token: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._redis = redis
        self._redis_config = redis_config
        self._config = config
        self._key = f"{redis_config.key_prefix}slot:{role}:{name}"
        self._token = token
        self._clock = clock
        self._sleep = sleep
        self._confirmed_at: float | None = None
        self._lost = False
        self.instance_id = f"{role}-{name}"

    async def claim(self) -> None:
        """Claim the slot, waiting for the lease of a dead worker to run out.

        Raises `Misconfigured` if another worker is alive in it, `StoreUnavailable` if Redis is down.
        """
        deadline = self._clock() + self._config.ttl_seconds * 1.25 + 0.2
        first: str | None = None
        last_remaining_ms = 0
        while True:
            asked_at = self._clock()
            with redis_errors(self._redis_config):
                if await self._redis.set(self._key, self._token, nx=True, px=self._config.ttl_ms):
                    self._confirmed_at = asked_at
                    return
                held = await self._redis.get(self._key)
                remaining_ms = int(await self._redis.pttl(self._key))
            if held is None:
                continue  # it ran out between the two
            holder = held.decode() if isinstance(held, bytes) else str(held)
            if first is None:
                first = holder
                log.info("slot.waiting", slot=self.instance_id, holder=holder, remaining_ms=remaining_ms)
            elif holder != first or remaining_ms > last_remaining_ms or self._clock() > deadline:
                raise Misconfigured(
                    f"slot {self.instance_id!r} is held by a living worker ({holder}): give each worker a slot of its "
                    "own with --slot"
                )
            last_remaining_ms = remaining_ms
            await self._sleep(min(0.2, self._config.ttl_seconds / 10))

    async def keep(self) -> None:
        """Renew the lease until cancelled. Goes on while Redis is away: no other worker can claim the slot then.

        Raises `Fenced` when another worker holds the slot.
        """
        while True:
            await self._sleep(self._config.ttl_seconds / self._config.renewals_per_ttl)
            await self._renew_if_available()

    async def assert_held(self) -> None:
        """Check the lease before a write. Free while it is fresh; else it is renewed, and passes if Redis is away.

        Raises `Fenced` if another worker holds the slot: this process was stopped for too long.
        """
        if self._lost:
            raise self._fenced()
        if self._confirmed_at is not None and self._clock() - self._confirmed_at < self._config.ttl_seconds:
            return
        await self._renew_if_available()

    async def release(self) -> None:
        """Delete the lease if it is still this worker's, so that the next one need not wait."""
        with redis_errors(self._redis_config):
            await self._redis.eval(_RELEASE, 1, self._key, self._token)
        self._confirmed_at = None

    async def _renew_if_available(self) -> None:
        try:
            await self._renew()
        except StoreUnavailable as error:
            log.warning("slot.not_renewed", slot=self.instance_id, error=str(error))

    async def _renew(self) -> None:
        asked_at = self._clock()
        with redis_errors(self._redis_config):
            ours = await self._redis.eval(_RENEW, 1, self._key, self._token, str(self._config.ttl_ms))
        if not ours:
            self._lost = True
            raise self._fenced()
        self._confirmed_at = asked_at

    def _fenced(self) -> Fenced:
        return Fenced(f"slot {self.instance_id!r} belongs to another worker now; this one writes nothing more")
