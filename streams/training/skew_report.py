"""What the topic `skew` says: whether servers compute the features that the trainer learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from schemas.skew import SkewOutcome, SkewRecord
from streams.broker.clients import BrokerConfig
from streams.broker.topic_follower import TopicFollower
from streams.broker.topics import TopicsConfig


@dataclass
class SkewFound:
    """The outcomes in the topic, and how many rows servers logged; those may be more than memory holds."""

    outcomes: list[SkewOutcome] = field(default_factory=list)
    logged_rows: int = 0

    def hear(self, value: bytes | None) -> None:
        """Note a record of the topic."""
        try:
            record = SkewRecord.model_validate_json(value or b"")
        except ValueError:
            return  # the trainer that read it has said so
        if record.outcome is not None:
            self.outcomes.append(record.outcome)
        if record.served is not None:
            self.logged_rows += len(record.served.targets)


async def read_skew(broker: BrokerConfig, topics: TopicsConfig, since: datetime) -> SkewFound:
    """What the topic holds since then. Raises as `TopicFollower.open` does."""
    found = SkewFound()

    async def hear(records: Sequence[Any], source: str, after: int) -> None:
        for record in records:
            found.hear(record.value)

    follower = TopicFollower(broker, topics, "skew", hear)
    try:
        await follower.open(since=since)
        await follower.catch_up()
    finally:
        await follower.close()
    return found


def summary(found: SkewFound, *, limit: float) -> dict[str, Any]:
    """What the outcomes say together. `passed` is false without a comparison: then nothing is known."""
    outcomes = found.outcomes
    largest: dict[str, float] = {}
    for outcome in outcomes:
        for name, apart in outcome.largest.items():
            largest[name] = max(apart, largest.get(name, 0.0))
    rows, differing = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("rows", "differing"))
    return {
        "logged_rows": found.logged_rows,
        "comparisons": len(outcomes),
        "rows": rows,
        "differing_rows": differing,
        "differing_share": differing / rows if rows else None,
        "limit": limit,
        "passed": bool(rows) and differing <= limit * rows,
        "tolerance": max((outcome.tolerance for outcome in outcomes), default=None),
        "largest_differences": dict(sorted(largest.items(), key=lambda one: -one[1])),
        "releases": sorted({name for outcome in outcomes for name in outcome.releases}),
        "last_compared_at": max((outcome.compared_at.isoformat() for outcome in outcomes), default=None),
    }
