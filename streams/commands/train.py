"""`mimstream train`."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from schemas.errors import Misconfigured
from streams.commands.arguments import parse_moment
from streams.runtime.terminal import say
from streams.settings import Settings
from streams.wiring.training import TrainOptions, train

EXIT_NOT_SERVING = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--until-end", action="store_true", help="train to the ends of the topics as they are now, report"
    )
    parser.add_argument("--no-release", action="store_true", help="release nothing: runs beside an active trainer")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="release also what goes no further in the log than what was released from it before (other settings)",
    )
    parser.add_argument("--json", action="store_true", help="with --until-end: print the report as JSON")
    parser.add_argument("--variants", help="what to train side by side: ciubm[,din][,ciubm_shuffled]")
    parser.add_argument("--state", type=Path, help="folder for accounts.json and prequential scores")
    parser.add_argument("--scores", type=Path, metavar="DIR", help="keep all prequential scores here, as parquet files")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="with --until-end: list the training rows in order")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--from-snapshot", metavar="ID", help="go on from this snapshot instead of the newest")
    begin.add_argument(
        "--from-offsets", type=Path, metavar="FILE", help="begin anew at the offsets in this JSON file, or manifest"
    )
    begin.add_argument(
        "--from", dest="from_time", metavar="TIME", help="begin anew where the log reaches this event time (ISO 8601)"
    )
    parser.add_argument(
        "--until", metavar="TIME", help="train to where the log reaches this event time, like --until-end"
    )
    parser.add_argument("--fetch-max-records", type=int, help="records to fetch at a time")
    parser.add_argument("--metrics-port", type=int, default=None, help="serve Prometheus metrics on this port")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Train until stopped, or to the end; exit status 5 if what was learned to the end does not serve."""
    until_end = options.until_end or options.until is not None
    if (options.json or options.rows) and not until_end:
        raise Misconfigured("--json and --rows describe a finished run: add --until-end")
    wished = {
        "variants": options.variants,
        "fetch_max_records": options.fetch_max_records,
        "state_folder": options.state,
    }
    given = {name: value for name, value in wished.items() if value is not None}
    settings = settings.model_copy(update={"train": settings.train.model_copy(update=given)})
    run_options = TrainOptions(
        until_end=until_end,
        release=not options.no_release,
        # a run that releases nothing leaves the state of the one that does alone, unless a folder is named
        write_state=options.state is not None or not options.no_release,
        from_snapshot=options.from_snapshot,
        from_offsets=options.from_offsets,
        from_time=options.from_time and parse_moment("--from", options.from_time),
        until=options.until and parse_moment("--until", options.until),
        scores=options.scores,
        rows=options.rows,
        replace=options.replace,
        metrics_port=options.metrics_port,
    )
    report = asyncio.run(train(settings, run_options))
    if report is not None:
        say(json.dumps(report, indent=2) if options.json else _for_people(report))
        return EXIT_NOT_SERVING if report["not_serving"] else 0
    return 0


def _for_people(report: dict[str, Any]) -> str:
    accounts = ", ".join(f"{count} {name}" for name, count in report["accounts"].items())
    lines = [
        f"behaviours: {accounts}",
        f"{report['rows_trained']} rows in {report['steps']} steps, rows sha256 {report['rows_sha256']}",
        f"{report['releases']} releases, {report['refused']} refused, current {report['release_id'] or 'none'}",
    ]
    if report["not_serving"]:
        lines.append(report["not_serving"])
    for variant, buckets in report["prequential"].items():
        for bucket, figures in buckets.items():
            if figures is not None:
                shown = ", ".join(
                    f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in figures.items()
                )
                lines.append(f"{variant} {bucket}: {shown}")
    return "\n".join(lines)
