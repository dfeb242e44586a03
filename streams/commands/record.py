"""`mimstream record`."""

from __future__ import annotations

import argparse
import asyncio

from streams.settings import Settings
from streams.wiring.recording import record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--rebuild", action="store_true", help="forget what is recorded and read the whole log again, then go on"
    )
    parser.add_argument("--metrics-port", type=int, default=None, help="serve Prometheus metrics on this port")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Record until stopped."""
    asyncio.run(record(settings, rebuild=options.rebuild, metrics_port=options.metrics_port))
    return 0
