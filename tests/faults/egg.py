"""An interpreter that has imported everything once and forks `mimstream` processes from that, a few milliseconds each.

Run as `python -m tests.faults.egg SOCKET`. On a small machine most of a worker's start is importing torch; forking from
here lets a round of faults restart several workers. A child runs `streams.cli.main` with its own environment, log,
session and memory: to its broker, its stores and the kernel it is a process like any other, and is killed like one.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any

PR_SET_PDEATHSIG = 1
PRELOADED = (
    "torch",
    "transformers.models.distilbert.modeling_distilbert",
    "transformers.models.vit.modeling_vit",
    "faust",
    "pymilvus",
    "streams.cli",
    "streams.commands.index",
    "streams.commands.record",
    "streams.commands.serve",
    "streams.commands.train",
    "encoders.loading",
    "trainer.online.trainer",
    "trainer.networks.scorer",
    "pyarrow.parquet",
)


def run_child(order: dict[str, Any], parent: int) -> int:
    """Become a `mimstream` process. Returns its exit status."""
    os.setsid()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0 or os.getppid() != parent:
        return 120
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(order["environment"])
    try:
        if order["bug"]:
            importlib.import_module("tests.faults.planted").plant(order["bug"])
        from streams.cli import main

        return int(main(order["arguments"]))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> int:
    """Take orders from the socket, fork, tell who ended; until the socket closes."""
    for name in PRELOADED:
        importlib.import_module(name)
    me, children = os.getpid(), set[int]()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(sys.argv[1])
        rest = b""
        line.sendall(b'{"ready": true}\n')
        while True:
            readable, _, _ = select.select([line], [], [], 0.02)
            if readable:
                received = line.recv(1 << 16)
                if not received:
                    break
                rest += received
            while b"\n" in rest:
                order, _, rest = rest.partition(b"\n")
                pid = os.fork()
                if pid == 0:
                    line.close()
                    os._exit(run_child(json.loads(order), me))
                children.add(pid)
                line.sendall(json.dumps({"number": json.loads(order)["number"], "pid": pid}).encode() + b"\n")
            for pid in list(children):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    children.discard(pid)
                    answer = {"pid": pid, "status": os.waitstatus_to_exitcode(status)}
                    line.sendall(json.dumps(answer).encode() + b"\n")
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
