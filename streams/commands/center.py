"""`mimstream center verify`."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

from streams.center.compare import FAULTS, CenterReport
from streams.runtime.progress import progress_bar
from streams.runtime.terminal import print_table
from streams.settings import Settings
from streams.wiring.center import verify_center


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", choices=["verify"], help="compare the topic items with what the center holds")
    parser.add_argument("--repair", action="store_true", help="mend what differs, through the index path")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Compare, and repair if asked to. Status 1 if a fault is left in the end."""
    with progress_bar("reading") as bar:
        report = asyncio.run(
            verify_center(
                settings,
                repair=options.repair,
                on_progress=lambda what, done, total: bar.set(done, total, what),
            )
        )
    _print(report, as_json=options.json)
    return 1 if (report.left if report.repaired else report.faults) else 0


def as_object(report: CenterReport) -> dict[str, Any]:
    """The report as one object."""
    plain = asdict(replace(report, found=Counter(), examples=[]))
    del plain["found"]
    plain["faults"] = report.faults
    plain |= {fault: report.found[fault] for fault in FAULTS}
    plain["examples"] = [asdict(one) for one in report.examples]
    return plain


def _print(report: CenterReport, *, as_json: bool) -> None:
    whole = as_object(report)
    if as_json:
        print(json.dumps(whole, indent=2))
        return
    rows = [
        (one.fault, one.item_id, "-" if one.offset is None else f"{one.partition}/{one.offset}", one.detail)
        for one in report.examples
    ]
    if rows:
        print_table(("fault", "item", "record", "detail"), rows)
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in whole.items() if name != "examples"))
