"""What the topic `skew` says: whether servers compute the features that the trainer learns from."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from schemas.skew import SkewRecord
from streams.broker.clients import BrokerConfig
from streams.broker.topic_follower import TopicFollower
from streams.broker.topics import TopicsConfig


async def read_skew(broker: BrokerConfig, topics: TopicsConfig, since: datetime) -> list[SkewRecord]:
    """What the topic holds since then. Raises as `TopicFollower.open` does."""
    found: list[SkewRecord] = []

    async def hear(records: Sequence[Any], source: str, after: int) -> None:
        for record in records:
            try:
                found.append(SkewRecord.model_validate_json(record.value or b""))
            except ValueError:
                continue  # the trainer that read it has said so

    follower = TopicFollower(broker, topics, "skew", hear)
    try:
        await follower.open(since=since)
        await follower.catch_up()
    finally:
        await follower.close()
    return found


def summary(records: Sequence[SkewRecord], *, limit: float) -> dict[str, Any]:
    """What the outcomes say together. `passed` is false without a comparison: then nothing is known."""
    outcomes = [record.outcome for record in records if record.outcome is not None]
    largest: dict[str, float] = {}
    for outcome in outcomes:
        for name, apart in outcome.largest.items():
            largest[name] = max(apart, largest.get(name, 0.0))
    rows, differing = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("rows", "differing"))
    return {
        "logged_rows": sum(len(record.served.targets) for record in records if record.served is not None),
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
