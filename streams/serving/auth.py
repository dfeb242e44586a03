"""Access to the HTTP interface: bearer tokens and a rate limit per client."""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_CLIENTS = 10_000
"""Clients whose rate is remembered; the least recent one is dropped, and starts again with a full allowance."""


class BearerTokens:
    """The accepted tokens. A given one is compared with the digests of all of them, in constant time."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]

    @property
    def required(self) -> bool:
        """Whether requests need a token."""
        return bool(self._digests)

    def recognise(self, authorization: str | None) -> int | None:
        """The number of the token in an `Authorization` header; None without an accepted one."""
        scheme, _, token = (authorization or "").partition(" ")
        given = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for number, digest in enumerate(self._digests):
            if hmac.compare_digest(digest, given):
                found = number
        return found if scheme.lower() == "bearer" else None


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class RateLimiter:
    """A token bucket per client."""

    def __init__(self, per_second: float | None, burst: int, clock: Callable[[], float]) -> None:
        """`per_second` None: no limit."""
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def wait_seconds(self, client: str) -> float:
        """0 if this client may send now, and one request is counted; else how long it has to wait."""
        if self._per_second is None:
            return 0.0
        now = self._clock()
        bucket = self._buckets.setdefault(client, _Bucket(self._burst, now))
        self._buckets.move_to_end(client)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        bucket.left = min(self._burst, bucket.left + (now - bucket.at) * self._per_second)
        bucket.at = now
        if bucket.left < 1:
            return (1 - bucket.left) / self._per_second
        bucket.left -= 1
        return 0.0
