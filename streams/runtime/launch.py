"""Start child processes that cannot outlive this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_SHIM = Path(__file__).with_name("die_with_parent.py")


def launch(
    command: Sequence[str],
    *,
    log: int | IO[bytes],
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command` (its first word an absolute path); standard output and error go to `log`.

    The child is killed by the kernel when the *thread* that calls this ends: call it from the main thread or from one
    that lives as long as the child should. The child has a session of its own, so that Ctrl-C reaches the parent alone,
    which then stops its children in order. `environment` replaces the inherited one.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_SHIM), str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=dict(environment) if environment is not None else None,
        start_new_session=True,
    )
