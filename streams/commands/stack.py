"""`mimstream stack up|down|status`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from rich.console import Console

from schemas.errors import Misconfigured
from streams.runtime.terminal import print_table, say
from streams.settings import Settings, environment_of
from streams.stack.config import DEFAULT_STACK
from streams.stack.folder import StackFolder
from streams.stack.run import endpoints_in, stack_folder
from streams.stack.supervisor import down, status, supervise, up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", choices=["up", "down", "status"])
    parser.add_argument(
        "--name", default=DEFAULT_STACK, help=f"which stack; several can run (default: {DEFAULT_STACK})"
    )
    parser.add_argument("--foreground", action="store_true", help="up: stay here until Ctrl-C, leave nothing behind")
    parser.add_argument("--purge", action="store_true", help="down: delete the stack's data too")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Start, stop or probe an embedded stack."""
    config = settings.stack
    folder = stack_folder(options.name, config)
    if options.purge and options.action != "down":
        raise Misconfigured("--purge belongs to `mimstream stack down`")
    if options.action == "up":
        console = Console(stderr=True)  # standard output is for what was asked
        if options.foreground:
            supervise(options.name, config, console=console)
        else:
            up(options.name, config, console=console)
            _print_up(folder, as_json=options.json)
        return 0
    if options.action == "down":
        return _down(folder, purge=options.purge, as_json=options.json)
    reports = status(folder, config)
    ready = bool(reports) and all(report.answers for report in reports)
    if options.json:
        print(
            json.dumps({"name": folder.name, "ready": ready, "parts": [asdict(report) for report in reports]}, indent=2)
        )
        return 0 if ready else 1
    if not reports:
        print(f"stack {folder.name!r} was never started: mimstream stack up --name {folder.name}")
        return 1
    heads = ("part", "answers", "address", "probe ms", "process", "restarts")
    cells = [
        (
            report.part,
            "yes" if report.answers else "no",
            report.address,
            str(report.milliseconds or "-"),
            str(report.pid or "-"),
            str(report.restarts),
        )
        for report in reports
    ]
    print_table(heads, cells, title=f"stack {folder.name}")
    for report in reports:
        if not report.answers:
            say(f"{report.part}: {report.detail}; log: {report.log}")
    return 0 if ready else 1


def _down(folder: StackFolder, *, purge: bool, as_json: bool) -> int:
    was_running = down(folder, purge=purge)
    if as_json:
        print(json.dumps({"name": folder.name, "was_running": was_running, "purged": purge}))
    else:
        said = f"stack {folder.name!r} " + ("stopped" if was_running else "was not running")
        print(f"{said}; its data is deleted" if purge else f"{said}; its data stays in {folder.path}")
    return 0


def _print_up(folder: StackFolder, *, as_json: bool) -> None:
    endpoints = endpoints_in(folder)
    environment = environment_of(endpoints)
    if as_json:
        values: dict[str, Any] = {
            "name": folder.name,
            "folder": str(folder.path),
            "endpoints": endpoints,
            "environment": environment,
        }
        print(json.dumps(values, indent=2))
        return
    print(f"stack {folder.name!r} is ready; data and logs in {folder.path}")
    print(f"use it with  mimstream --stack {folder.name} COMMAND  or")
    print("\n".join(f"  export {name}={value}" for name, value in environment.items()))
    print(f"stop it with  mimstream stack down --name {folder.name}")
