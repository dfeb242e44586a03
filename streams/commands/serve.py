"""`mimstream serve`."""

from __future__ import annotations

import argparse
import asyncio

from streams.runtime.process import keep_freed_memory
from streams.settings import Settings
from streams.wiring.serving import serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--host", help="address to listen on (else MIM_SERVE__HOST)")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for a free one (else MIM_SERVE__PORT)")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Serve until stopped."""
    given = {name: value for name in ("host", "port") if (value := getattr(options, name)) is not None}
    keep_freed_memory()
    asyncio.run(serve(settings, settings.serve.model_copy(update=given)))
    return 0
