"""Where the parts of a running stack are, for the commands that use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from schemas.errors import Misconfigured
from streams.settings import load_settings
from streams.stack.folder import StackFolder
from streams.stack.run import endpoints_of, stack_folder


def read_endpoints(name: str, config_file: Path | None = None) -> dict[str, Any]:
    """The addresses of the running stack `name` as nested settings values.

    Raises `Misconfigured` if it is not running.
    """
    return endpoints_in(stack_folder(name, load_settings(config_file).stack))


def endpoints_in(folder: StackFolder) -> dict[str, Any]:
    """The addresses of the stack that runs in `folder`. Raises `Misconfigured` if none does."""
    state, ports = folder.read_state(), folder.read_ports()
    if state is None or ports is None or not state.alive() or state.phase != "ready":
        phase = state.phase if state is not None and state.alive() else "not running"
        raise Misconfigured(
            f"the embedded stack {folder.name!r} is {phase}: start it with `mimstream stack up --name {folder.name}`"
        )
    return dict(endpoints_of(ports))
