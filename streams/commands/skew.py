"""`mimstream skew`: whether servers compute the features that the trainer learns from."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from schemas.errors import Misconfigured
from schemas.skew import SkewRecord
from streams.broker.topic_follower import TopicFollower
from streams.runtime.terminal import print_table
from streams.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--hours", type=float, default=24.0, help="how far to look back (default: 24)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Print what trainers found. Status 1 if more rows differ than MIM_TRAIN__SKEW_LIMIT, or none were compared."""
    if not options.hours > 0:
        raise Misconfigured(f"--hours {options.hours}: look back for some time")
    since = datetime.now(UTC) - timedelta(hours=options.hours)
    report = summary(asyncio.run(_read(settings, since)), limit=settings.train.skew_limit)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if report["passed"] else 1


async def _read(settings: Settings, since: datetime) -> list[SkewRecord]:
    found: list[SkewRecord] = []

    async def hear(records: Sequence[Any], source: str, after: int) -> None:
        for record in records:
            try:
                found.append(SkewRecord.model_validate_json(record.value or b""))
            except ValueError:
                continue  # the trainer that read it has said so

    follower = TopicFollower(settings.kafka, settings.topics, "skew", hear)
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


def _print(report: dict[str, Any]) -> None:
    for name in ("logged_rows", "comparisons", "rows", "differing_rows", "limit", "last_compared_at"):
        print(f"{name.replace('_', ' '):<18} {report[name]}")
    if report["largest_differences"]:
        print_table(
            ("feature", "largest difference"),
            [(name, f"{apart:.6g}") for name, apart in report["largest_differences"].items()],
        )
    if not report["rows"]:
        print("no row was compared: is a trainer running that releases, do servers answer, is MIM_SERVE__SKEW_SHARE 0?")
