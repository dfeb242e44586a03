"""What a fork server imports once, and what each of its children does.

The imports are for their cost alone: on a small machine they are most of a command's start.
"""

# ruff: noqa: F401

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing import resource_tracker
from pathlib import Path

import faust.app
import faust.transport.drivers.aiokafka
import faust.web.drivers.aiohttp
import faust.worker
import grpc.experimental
import pyarrow.parquet
import pymilvus
import safetensors.numpy
import torch

import encoders.loading
import streams.commands.index
import streams.commands.record
import streams.commands.serve
import streams.commands.train
import trainer.networks.scorer
import trainer.online.trainer
from streams.cli import main

_PR_SET_PDEATHSIG = 1
_SERVER = os.getpid()


def run(
    arguments: tuple[str, ...], environment: Mapping[str, str], output: Path, errors: Path | None, bug: str | None
) -> None:
    """Become `mimstream ARGUMENTS`, with the planted bug of this name if there is one."""
    os.setsid()
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0 or os.getppid() != _SERVER:
        sys.exit(120)  # the server is gone, or imported nothing before it forked
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if path else 1, number)
    tracker = resource_tracker.getfd()
    for low, high in ((3, tracker), (tracker + 1, os.sysconf("SC_OPEN_MAX"))):
        os.closerange(low, high)  # the server's: as long as they are open, it would outlive its own parent
    os.environ.clear()
    os.environ.update(environment)
    if bug:
        importlib.import_module("tests.faults.planted").BUGS[bug].plant()
    sys.exit(main(arguments))
