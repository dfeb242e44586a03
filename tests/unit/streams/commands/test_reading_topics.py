"""`mimstream skew` and `mimstream topics`: what they ask of the broker, print and end with."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from schemas.errors import Misconfigured
from schemas.skew import SkewOutcome
from streams.broker.cluster import ClusterTopics
from streams.broker.topics import TOPICS
from streams.commands import skew, topics
from streams.training.skew_report import SkewFound
from tests.factories.commands import SETTINGS, call

# ---- skew ------------------------------------------------------------------------------------------------------------


def comparing(monkeypatch: pytest.MonkeyPatch, *, rows: int, differing: int) -> list[datetime]:
    """A topic with one comparison; the moments since which it is read."""
    since: list[datetime] = []

    async def read(broker: Any, prefix: Any, moment: datetime) -> SkewFound:
        assert (broker, prefix) == (SETTINGS.kafka, SETTINGS.topics)
        since.append(moment)
        outcome = SkewOutcome(
            number=1, releases=["r1"], rows=rows, differing=differing, tolerance=0.001,
            largest={"takes": 0.5} if differing else {}, compared_at=datetime(2026, 1, 1, tzinfo=UTC),
        )  # fmt: skip
        return SkewFound([outcome] if rows else [], 900)

    monkeypatch.setattr(skew, "read_skew", read)
    return since


@pytest.mark.parametrize(("hours", "back"), [((), 24.0), (("--hours", "1.5"), 1.5)])
def test_skew_looks_back_as_many_hours_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch, hours: tuple[str, ...], back: float
) -> None:
    since = comparing(monkeypatch, rows=100, differing=0)
    before = datetime.now(UTC)
    assert call(skew, *hours) == 0
    assert before <= since[0] + timedelta(hours=back) <= datetime.now(UTC)


@pytest.mark.parametrize("hours", ["0", "-1", "8785", "nan", "inf"])
def test_skew_looks_back_for_some_time_and_at_most_a_year(hours: str) -> None:
    with pytest.raises(Misconfigured, match="--hours"):
        call(skew, "--hours", hours)


def test_skew_ends_with_1_where_more_rows_differ_than_the_limit_or_none_was_compared(
    monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    limit = SETTINGS.train.skew_limit
    assert 0 < limit < 0.5
    allowed = int(limit * 1_000_000)
    for rows, differing, status in ((1_000_000, allowed, 0), (1_000_000, allowed + 1, 1), (0, 0, 1)):
        comparing(monkeypatch, rows=rows, differing=differing)
        assert call(skew, "--json") == status
        found = said(as_json=True)
        assert (found["passed"], found["limit"], found["rows"]) == (not status, limit, rows)
        assert call(skew) == status
        lines = said().splitlines()
        assert lines[2].split() == ["rows", str(rows)] and ("no row was compared" in lines[-1]) == (not rows)
        assert any("takes" in line and "0.5" in line for line in lines) == bool(differing)


# ---- topics ----------------------------------------------------------------------------------------------------------


def test_topics_that_are_missing_or_hidden_are_listed_with_what_they_are_to_be(
    monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    found = ClusterTopics("c", {}, {"items": [0, 1]}, hidden=frozenset({"models"}))
    found.replicas["items"] = 3

    def describe(kafka: Any, prefix: Any, names: Any, *, missing_ok: bool) -> ClusterTopics:
        assert missing_ok and list(names) == list(TOPICS)
        return found

    monkeypatch.setattr(topics, "describe_topics", describe)
    assert call(topics, "list", "--json") == 0
    rows = {row["topic"].removeprefix("mim."): row for row in said(as_json=True)}
    assert [rows[name]["exists"] for name in ("items", "models", "skew")] == [True, None, False]
    assert [(rows[name]["partitions"], rows[name]["replicas"]) for name in ("items", "skew")] == [(2, 3), (None, None)]
    assert call(topics, "list") == 0
    cells = {line.split()[0].removeprefix("mim."): line.split() for line in said().splitlines() if "mim." in line}
    assert cells["items"][1:4] == ["yes", "2", "3"] and cells["skew"][1:4] == ["no", "-", "-"]
    assert cells["models"][1:3] == ["unknown:", "not"]


@pytest.mark.parametrize("created", [["mim.items", "mim.skew"], []])
def test_topics_that_were_created_are_named(monkeypatch: pytest.MonkeyPatch, said: Any, created: list[str]) -> None:
    monkeypatch.setattr(topics, "create_topics", lambda *_: created)
    assert call(topics, "create") == 0
    assert said() == ("mim.items\nmim.skew\n" if created else "nothing to create\n")
    assert call(topics, "create", "--json") == 0
    assert said(as_json=True) == {"created": created}
