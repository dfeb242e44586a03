"""The process that `mimstream stack up` leaves running: parent of the parts of one stack, until `down`.

Run as `python -m streams.stack.supervisor NAME CONFIG_JSON`: the configuration is handed over whole, so that this
process reads no settings and imports nothing but the stack.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import FrameType

import structlog
from rich.console import Console

from schemas.errors import Misconfigured, PipelineError, Unavailable
from streams.runtime.files import OF_FILES, file_refusal
from streams.runtime.logs import configure_logging
from streams.stack.config import StackConfig
from streams.stack.folder import ProcessId, StackFolder, StackState, tail
from streams.stack.jars import kafka_class_path
from streams.stack.kafka_part import require_java
from streams.stack.parts import HOST, NotReady
from streams.stack.run import make_parts, running_stack, stack_folder

log = structlog.get_logger()

ERROR_MARK = "mimstream: "
EXIT_MISCONFIGURED = 2
EXIT_UNAVAILABLE = 3
PARTS = ("Kafka", "Valkey", "Milvus Lite")
STOP_PATIENCE_SECONDS = 60.0
PROBE_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class PartReport:
    """What `status` found about one part."""

    part: str
    answers: bool
    address: str
    pid: int | None
    restarts: int
    milliseconds: float | None
    """How long the probe took."""
    detail: str
    log: str


def supervise(name: str, config: StackConfig, *, console: Console | None = None) -> None:
    """Run a stack in this process until SIGTERM or SIGINT. Raises what `running_stack` raises."""

    def stop(number: int, frame: FrameType | None) -> None:
        for ignored in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ignored, signal.SIG_IGN)  # a second one must not interrupt the clean stop
        raise KeyboardInterrupt

    for wanted in (signal.SIGTERM, signal.SIGINT):
        signal.signal(wanted, stop)
    try:
        with running_stack(name, config, console=console) as stack:
            log.info(
                "stack.ready", stack=name, kafka=stack.ports.kafka, valkey=stack.ports.valkey, milvus=stack.ports.milvus
            )
            while True:
                signal.pause()
    except KeyboardInterrupt:
        log.info("stack.stopped", stack=name)


def up(
    name: str, config: StackConfig, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
) -> StackFolder:
    """Leave a supervisor behind whose parts are all ready. A stack that runs already is left as it is.

    Raises `Misconfigured` or `Unavailable` with what the supervisor said.
    """
    config = _absolute(config)
    folder = stack_folder(name, config)
    require_java()
    kafka_class_path(config, console)  # here, where its progress is visible
    state = folder.read_state()
    if folder.owned() and state is not None and state.alive() and state.phase == "ready":
        return folder
    file = folder.log_file("supervisor")
    from_byte = file.stat().st_size if file.exists() else 0
    with file.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "streams.stack.supervisor", name, config.model_dump_json()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder.path,
            start_new_session=True,  # neither Ctrl-C nor the end of this terminal reaches it
        )
    deadline = clock() + 4 * config.start_timeout_seconds
    try:
        with console.status(f"Starting {', '.join(PARTS)} of stack {name!r}") if console else nullcontext():
            while not _is_ready(folder.read_state(), process.pid):
                if process.poll() is not None:
                    raise _why(process.returncode, folder, from_byte)
                if clock() > deadline:
                    raise Unavailable(f"stack {name!r}", f"not ready in time; see {file}")
                time.sleep(0.05)
    except BaseException:
        if process.poll() is None:
            process.terminate()
            process.wait()
        raise
    # it outlives us on purpose: no ResourceWarning when this object is collected
    process.returncode = 0
    return folder


def down(folder: StackFolder, *, purge: bool, clock: Callable[[], float] = time.monotonic) -> bool:
    """Stop the stack's owner, or what a killed owner left; `purge` deletes the data. Returns whether it was running."""
    state = folder.read_state()
    was_running = state is not None and state.alive() and folder.owned()
    if state is not None and was_running:
        os.kill(state.owner.pid, signal.SIGTERM)
        deadline = clock() + STOP_PATIENCE_SECONDS
        while folder.owned() and state.alive():
            if clock() > deadline:
                os.kill(state.owner.pid, signal.SIGKILL)  # its parts die with it
            time.sleep(0.05)
    if folder.path.is_dir():
        folder.claim()
        try:
            folder.end_strays()
            if purge:
                shutil.rmtree(folder.path)
            elif state is not None and not was_running:
                owner = ProcessId.of(os.getpid())
                assert owner is not None
                folder.write_state(StackState("stopped", owner))
        finally:
            folder.release()
    return was_running


def status(
    folder: StackFolder, config: StackConfig, *, clock: Callable[[], float] = time.monotonic
) -> list[PartReport]:
    """Probe each part of the stack as its clients would."""
    ports, state = folder.read_ports(), folder.read_state()
    if ports is None:
        return []
    alive = state is not None and state.alive() and folder.owned()
    reports = []
    for part in make_parts(folder, ports, class_path="", config=config):
        known = state.parts.get(part.name) if state is not None else None
        process = known.process if known is not None and known.process is not None and known.process.alive() else None
        began, detail = clock(), ""
        if alive and process is not None:
            try:
                part.probe(PROBE_TIMEOUT_SECONDS)
            except NotReady as error:
                detail = str(error)
        else:
            detail = "its process does not run" if alive else "the stack does not run"
        reports.append(
            PartReport(
                part=part.name,
                answers=not detail,
                address=f"{HOST}:{part.port}",
                pid=process.pid if process else None,
                restarts=known.restarts if known else 0,
                milliseconds=None if detail else round((clock() - began) * 1000, 1),
                detail=detail,
                log=str(folder.log_file(part.name)),
            )
        )
    return reports


def _is_ready(state: StackState | None, pid: int) -> bool:
    return state is not None and state.owner.pid == pid and state.alive() and state.phase == "ready"


def _why(status_code: int, folder: StackFolder, from_byte: int) -> PipelineError:
    file = folder.log_file("supervisor")
    said = tail(file, since_byte=from_byte, lines=40)
    message = said.rpartition(ERROR_MARK)[2] if ERROR_MARK in said else f"{said}\n(all of it: {file})"
    if status_code == EXIT_MISCONFIGURED:
        return Misconfigured(message)
    return Unavailable(f"stack {folder.name!r}", message)


def _absolute(config: StackConfig) -> StackConfig:
    """The same configuration, whatever the working folder."""
    paths = {
        name: value.expanduser().absolute()
        for name in ("data_folder", "cache_folder", "kafka_jars")
        if (value := getattr(config, name)) is not None
    }
    return config.model_copy(update=paths)


def main() -> int:
    """Entry point of the supervisor process."""
    configure_logging()
    name, config = sys.argv[1], StackConfig.model_validate_json(sys.argv[2])
    try:
        supervise(name, config)
    except PipelineError as error:
        print(f"{ERROR_MARK}{error}", file=sys.stderr)
        return EXIT_MISCONFIGURED if isinstance(error, Misconfigured) else EXIT_UNAVAILABLE
    except OSError as error:
        if error.errno not in OF_FILES:
            raise
        print(f"{ERROR_MARK}{file_refusal(error, config)}", file=sys.stderr)
        return EXIT_MISCONFIGURED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
