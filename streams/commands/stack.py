"""`mimstream stack up|down|status|list`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console

from schemas.errors import Misconfigured
from streams.runtime.terminal import print_table, say
from streams.settings import Settings, environment_of
from streams.stack.config import DEFAULT_STACK, StackConfig
from streams.stack.folder import StackFolder
from streams.stack.parts import HOST
from streams.stack.run import all_stacks, phase_of, stack_folder, values_in
from streams.stack.supervisor import down, status, supervise, up
from streams.stores.artifacts.config import ModelStoreConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", choices=["up", "down", "status", "list"])
    parser.add_argument(
        "--name", help=f"which stack; several can run (default: the one that --stack names, else {DEFAULT_STACK})"
    )
    parser.add_argument("--foreground", action="store_true", help="up: stay here until Ctrl-C, leave nothing behind")
    parser.add_argument("--purge", action="store_true", help="down: delete the stack's data too")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Start, stop or probe an embedded stack."""
    config = settings.stack
    if options.action == "list":
        return _list(config, as_json=options.json)
    name = options.name or options.stack_name or DEFAULT_STACK
    folder = stack_folder(name, config)
    if options.purge and options.action != "down":
        raise Misconfigured("--purge belongs to `mimstream stack down`")
    if options.action == "up":
        console = Console(stderr=True)  # standard output is for what was asked
        if options.foreground:
            supervise(name, config, console=console)
        else:
            up(name, config, console=console)
            _print_up(folder, as_json=options.json)
            former = ModelStoreConfig().folder
            if name == DEFAULT_STACK and former.is_dir() and not (folder.path / "models").exists():
                say(
                    f"note: models of earlier versions: {former}, to be kept by moving it to {folder.path / 'models'}",
                    error=True,
                )
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


def _list(config: StackConfig, *, as_json: bool) -> int:
    rows = [
        {"name": folder.name, "state": phase_of(folder), "address": address, "folder": str(folder.path)}
        for folder in all_stacks(config)
        if (ports := folder.read_ports()) is not None and (address := f"{HOST}:{ports.kafka}")
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        heads = ("name", "state", "address", "folder")
        print_table(heads, [[row[head] for head in heads] for row in rows])
    else:
        say(f"no stack was started below {config.data_folder}: mimstream stack up")
    return 0


def _down(folder: StackFolder, *, purge: bool, as_json: bool) -> int:
    was_running = down(folder, purge=purge)
    if as_json:
        print(json.dumps({"name": folder.name, "was_running": was_running, "purged": purge}))
    else:
        said = f"stack {folder.name!r} " + ("stopped" if was_running else "was not running")
        print(f"{said}; its data is deleted" if purge else f"{said}; its data stays in {folder.path}")
    return 0


def _print_up(folder: StackFolder, *, as_json: bool) -> None:
    values = values_in(folder)
    if as_json:
        shown: dict[str, Any] = {
            "name": folder.name,
            "folder": str(folder.path),
            "endpoints": values,
            "environment": environment_of(values),
        }
        print(json.dumps(shown, indent=2, default=str))
        return
    say(f"stack {folder.name!r} is ready; data, models and logs in {folder.path}")
    say(f"use it with  mimstream --stack {folder.name} COMMAND  or")
    say(exports(values))
    say(f"stop it with  mimstream stack down --name {folder.name}")


def exports(values: Mapping[str, Any]) -> str:
    """Shell lines that lead clients of this shell to a stack. What must not be set is unset."""
    return "\n".join(
        f"  unset {name}" if text == "null" else f"  export {name}={shlex.quote(text)}"
        for name, text in environment_of(values).items()
    )
