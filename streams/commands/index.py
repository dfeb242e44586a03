"""`mimstream index`."""

from __future__ import annotations

import argparse
import asyncio

from schemas.errors import Misconfigured
from streams.settings import Settings
from streams.wiring.indexing import remove_slot, run_index_worker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--slot", default="0", help="this worker's slot; each worker of a cluster has its own, and keeps it"
    )
    parser.add_argument(
        "--leave",
        action="store_true",
        help="at the end leave the group at once: for a slot that does not come back, as on a scale-in",
    )
    parser.add_argument(
        "--remove",
        action="store_true",
        help="index nothing: take this slot, whose worker has ended and does not come back, out of the group",
    )
    parser.add_argument("--metrics-port", type=int, default=None, help="serve Prometheus metrics on this port")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Index until stopped."""
    if not options.slot.replace("-", "").replace("_", "").isalnum():
        raise Misconfigured(f"--slot {options.slot!r}: use letters, digits, - and _")
    if options.remove:
        asyncio.run(remove_slot(settings, options.slot))
    else:
        asyncio.run(run_index_worker(settings, options.slot, leave=options.leave, metrics_port=options.metrics_port))
    return 0
