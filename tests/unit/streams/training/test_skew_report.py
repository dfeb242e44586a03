"""What several comparisons say together, and since when the topic is read for it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from schemas.skew import SkewOutcome
from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicsConfig
from streams.training import skew_report
from streams.training.skew_report import SkewFound, read_skew, summary


def outcome(day: int, largest: Mapping[str, float], *, rows: int, differing: int, tolerance: float) -> SkewOutcome:
    return SkewOutcome(
        number=day,
        releases=[f"r{day}", "r0"],
        rows=rows,
        differing=differing,
        tolerance=tolerance,
        largest=dict(largest),
        compared_at=datetime(2026, 1, day, tzinfo=UTC),
    )


OUTCOMES = [
    outcome(2, {"takes": 0.5, "age": 0.25}, rows=150, differing=2, tolerance=0.002),
    outcome(3, {"takes": 0.125, "together": 4.0}, rows=50, differing=1, tolerance=0.001),
    outcome(1, {}, rows=100, differing=0, tolerance=0.001),
]


def test_comparisons_are_added_up_and_the_largest_differences_come_first() -> None:
    found = summary(SkewFound(OUTCOMES, 900), limit=0.01)
    assert list(found["largest_differences"].items()) == [("together", 4.0), ("takes", 0.5), ("age", 0.25)]
    assert (found["rows"], found["differing_rows"], found["differing_share"]) == (300, 3, 0.01)
    assert (found["comparisons"], found["logged_rows"], found["tolerance"]) == (3, 900, 0.002)
    assert found["releases"] == ["r0", "r1", "r2", "r3"]
    assert found["last_compared_at"] == "2026-01-03T00:00:00+00:00"


@pytest.mark.parametrize(("limit", "passed"), [(0.0099, False), (0.01, True), (0.0101, True)])
def test_a_share_at_the_limit_passes(limit: float, passed: bool) -> None:
    assert summary(SkewFound(OUTCOMES), limit=limit)["passed"] is passed


async def test_the_topic_is_read_from_the_moment_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    since, opened = datetime(2026, 1, 2, tzinfo=UTC), []

    class Topic:
        def __init__(self, *given: Any) -> None: ...

        async def open(self, *, since: datetime) -> None:
            opened.append(since)

        async def catch_up(self) -> None: ...

        async def close(self) -> None:
            opened.append("closed")

    monkeypatch.setattr(skew_report, "TopicFollower", Topic)
    assert await read_skew(BrokerConfig(), TopicsConfig(), since) == SkewFound()
    assert opened == [since, "closed"]
