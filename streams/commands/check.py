"""`mimstream check`."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict

from encoders.base import Encoder
from streams.runtime.terminal import print_table
from streams.settings import Settings
from streams.wiring.preflight import CheckLine, run_checks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Check everything; status 1 if something is wrong."""

    def load() -> Encoder:
        from encoders.loading import load_encoder  # seconds, and only here

        return load_encoder(settings.encoder)

    lines = asyncio.run(run_checks(settings, load))
    if options.json:
        print(json.dumps([asdict(line) for line in lines], indent=2))
    else:
        _show(lines)
    return 0 if all(line.ok for line in lines) else 1


def _show(lines: list[CheckLine]) -> None:
    rows = [(line.name, "ok" if line.ok else "FAILED", line.detail, line.fix) for line in lines]
    print_table(("check", "", "found", "what to do"), rows)
