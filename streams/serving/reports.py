"""What serving reports of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestReport:
    """One HTTP request."""

    route: str
    """The route's pattern, never the path itself."""
    status: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DroppedConnection:
    """One connection that the server closed by itself."""

    reason: str
    """`slow_head` (a request's head took too long) or `full` (it waited longest when there were too many)."""


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One attempt to load a release."""

    outcome: str
    """`loaded`, `damaged`, `wrong_encoder` or `wrong_features`."""
    number: int
    """Running number of the release."""
    rows_trained: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StatesReport:
    """The states of items that one score rested on."""

    number: int
    """Running number of the trainer's write; 0 before the first."""
    items: int
    """Items with a state."""
    behind_seconds: float
    """Time since the topic was last known to hold nothing newer."""


@dataclass(frozen=True, slots=True)
class CacheReport:
    """One look-up of many vectors."""

    hits: int
    misses: int
    """Read from Milvus."""
    absent: int
    """Among hits and misses: items that the center does not hold."""
    cached: int
    """Vectors in the cache now."""
    behind_seconds: float
    """Time since the cache was last confirmed to be current."""


@dataclass(frozen=True, slots=True)
class SearchReport:
    """What became of one search, or of one encoding of a search."""

    outcome: str
    """`hit` (its vector was cached), `shared` (another request had asked for it), `encoded`, `not_in_time` (a score
    went without it), `refused` (what was sent cannot be encoded) or `failed` (a fault of the encoder)."""
    cached: int
    """Searches in the cache now."""
    seconds: float | None = None
    """How long the encoder took, for `encoded`."""
