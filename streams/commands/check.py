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
from streams.wiring.rights import HEADS, REDIS_COMMANDS, ROLES, Role, rights_table

EXIT_UNKNOWN = 6
"""Nothing was found wrong, but not everything could be looked at."""

_SHOWN = {"ok": "ok", "failed": "FAILED", "unknown": "unknown"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--for",
        dest="roles",
        type=_roles,
        default=list(ROLES),
        metavar="ROLES",
        help="check what these need: index, record, train, serve, separated by commas (default: all of them)",
    )
    parser.add_argument(
        "--rights", action="store_true", help="connect to nothing: list the rights that each process and command needs"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Check everything; status 1 if something is wrong, else 6 if something could not be looked at."""
    if options.rights:
        _show_rights(settings, as_json=options.json)
        return 0

    def load() -> Encoder:
        from encoders.loading import load_encoder  # seconds, and only here

        return load_encoder(settings.encoder)

    lines = asyncio.run(run_checks(settings, load, options.roles))
    if options.json:
        print(json.dumps([{"ok": line.ok, **asdict(line)} for line in lines], indent=2))
    else:
        _show(lines)
    return exit_status(lines)


def exit_status(lines: list[CheckLine]) -> int:
    """1: something is wrong. 6: something could not be looked at. 0: all was looked at and is right."""
    states = {line.state for line in lines}
    return 1 if "failed" in states else EXIT_UNKNOWN if "unknown" in states else 0


def _show(lines: list[CheckLine]) -> None:
    rows = [(line.name, _SHOWN[line.state], line.detail, line.fix) for line in lines]
    print_table(("check", "state", "found", "what to do"), rows)


def _show_rights(settings: Settings, *, as_json: bool) -> None:
    rows = rights_table(settings.topics)
    if as_json:
        print(json.dumps([dict(zip(HEADS, row, strict=True)) for row in rows], indent=2))
        return
    print_table(HEADS, rows)
    print(f"Redis, for read and write: {REDIS_COMMANDS}")


def _roles(text: str) -> list[Role]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in ROLES]
    if wrong or not names:
        raise argparse.ArgumentTypeError(f"{text!r}: name some of {', '.join(ROLES)}")
    return [role for role in ROLES if role in names]
