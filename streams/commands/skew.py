"""`mimstream skew`: whether servers compute the features that the trainer learns from."""

from __future__ import annotations

import argparse
import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

from schemas.errors import Misconfigured
from streams.runtime.terminal import print_table
from streams.settings import Settings
from streams.training.skew_report import read_skew, summary

_MOST_HOURS = 366 * 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--hours", type=float, default=24.0, help="how far to look back (default: 24)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Print what trainers found. Status 1 if more rows differ than MIM_TRAIN__SKEW_LIMIT, or none were compared."""
    if not 0 < options.hours <= _MOST_HOURS:
        raise Misconfigured(f"--hours {options.hours}: look back for some time, and at most a year")
    since = datetime.now(UTC) - timedelta(hours=options.hours)
    report = summary(asyncio.run(read_skew(settings.kafka, settings.topics, since)), limit=settings.train.skew_limit)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if report["passed"] else 1


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
