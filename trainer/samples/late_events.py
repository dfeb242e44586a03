"""Events that came too late for their rows: how many, where, and a few of them to look at."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LateEvent:
    """One of them."""

    partition: int
    offset: int
    event_id: str
    occurred_at: float
    """Event time, seconds since 1970."""
    behind_seconds: float
    """How far it lies behind the newest event of its partition."""


class LateEvents:
    """Counts by partition, and the newest `sample` of them."""

    def __init__(self, sample: int = 20) -> None:
        self.by_partition: Counter[int] = Counter()
        self.newest: deque[LateEvent] = deque(maxlen=sample)

    def add(self, event: LateEvent) -> None:
        """Count one."""
        self.by_partition[event.partition] += 1
        self.newest.append(event)
