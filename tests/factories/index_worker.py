"""Starting `mimstream index` as a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SOON = {"MIM_KAFKA__CONNECT_TIMEOUT_MS": "1000"}
"""For tests in which no broker answers."""

Start = Callable[..., Any]


def start_index(process: Start, *arguments: str, **env: str) -> Any:
    worker = process("index", *arguments, env=ONE_THREAD | env)
    worker.wait_for("index.ready", 120)
    return worker
