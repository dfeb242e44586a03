"""A running stack whose parent is this process: starts the parts, restarts what dies, stops all."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console

from schemas.errors import Misconfigured, Unavailable
from streams.runtime.launch import launch
from streams.stack.config import NOWHERE_ELSE, StackConfig, folders_in
from streams.stack.folder import PartState, Phase, Ports, ProcessId, StackFolder, StackState, fixed_ports, tail
from streams.stack.jars import kafka_class_path
from streams.stack.kafka_part import KafkaPart, require_java
from streams.stack.milvus_part import MilvusPart
from streams.stack.parts import HOST, NotReady, Part, PartName
from streams.stack.valkey_part import ValkeyPart

log = structlog.get_logger()

PROBE_TIMEOUT_SECONDS = 5.0
CHECK_EVERY_SECONDS = 0.1
LONGEST_BACK_OFF_SECONDS = 30.0
STEADY_AFTER_SECONDS = 30.0
"""A part that ran this long is restarted at once when it dies; one that dies sooner waits longer each time."""


@dataclass
class _Child:
    """One part and its process. Touched by the keeper thread alone, except for reading `process`."""

    part: Part
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = False
    restarts: int = 0
    quick_deaths: int = 0
    started_at: float = 0.0
    start_at: float = 0.0
    log_from_byte: int = 0


class RunningStack:
    """The parts of one stack as children of this process.

    A thread of its own, the keeper, starts, restarts and stops them: the kernel ties a child's life to the thread that
    started it, and this thread lives until `close` or until the process dies.
    """

    def __init__(
        self,
        folder: StackFolder,
        ports: Ports,
        parts: Sequence[Part],
        *,
        start_timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.ports = ports
        self._start_timeout = start_timeout_seconds
        self._clock = clock
        self._children: dict[PartName, _Child] = {part.name: _Child(part) for part in parts}
        self._calls: queue.Queue[tuple[Callable[[], None], Future[None]]] = queue.Queue()
        self._phase: Phase = "starting"
        self._error: str | None = None
        self._closing = False
        self._keeper = threading.Thread(target=self._keep, name=f"stack-{folder.name}", daemon=True)

    @property
    def opened(self) -> bool:
        """Whether all parts were ready once."""
        return self._phase != "starting"

    @property
    def endpoints(self) -> dict[str, dict[str, Any]]:
        """Nested settings values with which clients find this stack, and nothing else."""
        return endpoints_of(self.ports)

    def open(self) -> None:
        """Start all parts and wait until each is ready.

        Raises `Unavailable` with the end of its log if one does not.
        """
        self._keeper.start()
        self._run_in_keeper(self._start_all)
        for name in self._children:
            self._wait(name, self._start_timeout, give_up_at_death=True)
        self._run_in_keeper(lambda: self._set_phase("ready"))

    def close(self, *, error: str | None = None) -> None:
        """Stop all parts cleanly and end the keeper."""
        if self._keeper.is_alive():
            self._run_in_keeper(lambda: self._stop_all(error))
            self._keeper.join()

    def pid(self, name: PartName) -> int:
        """Process number of a part. Raises `Unavailable` while it is down."""
        process = self._children[name].process
        if process is None or process.poll() is not None:
            raise Unavailable(name, "it is not running now")
        return process.pid

    def restarts(self, name: PartName) -> int:
        """How often the keeper started this part again after it had died."""
        return self._children[name].restarts

    def kill(self, name: PartName) -> None:
        """Kill -9, as an accident would; the keeper starts the part again. Returns when the process is dead."""
        process = self._children[name].process
        os.kill(self.pid(name), signal.SIGKILL)
        assert process is not None
        process.wait(timeout=30)

    def stop(self, name: PartName) -> None:
        """Stop a part cleanly; it stays down until `start`."""
        self._run_in_keeper(lambda: self._stop([self._children[name]]))

    def start(self, name: PartName) -> None:
        """Start a part that was stopped. Does not wait: see `wait_ready`."""
        self._run_in_keeper(lambda: self._start_part(self._children[name]))

    def restart(self, name: PartName) -> None:
        """Stop a part cleanly, start it, wait until it is ready."""
        self.stop(name)
        self.start(name)
        self.wait_ready(name)

    def wait_ready(self, name: PartName, timeout_seconds: float | None = None) -> None:
        """Wait until the part is ready, over restarts if need be. Raises `Unavailable`."""
        self._wait(name, timeout_seconds or self._start_timeout, give_up_at_death=False)

    def _wait(self, name: PartName, timeout_seconds: float, *, give_up_at_death: bool) -> None:
        child = self._children[name]
        deadline = self._clock() + timeout_seconds
        while True:
            died = child.restarts > 0 or child.quick_deaths > 0
            try:
                if child.process is None:
                    raise NotReady("it is not running")
                child.part.probe(PROBE_TIMEOUT_SECONDS)
            except NotReady as error:
                if (give_up_at_death and died) or self._clock() > deadline:
                    raise self._did_not_start(child, "its process ended" if died else str(error)) from error
                time.sleep(0.05)
                continue
            if child.process is not None and child.process.poll() is None:
                return
            # it answered and died, or something else answers on its port: probe again
            if self._clock() > deadline or give_up_at_death:
                raise self._did_not_start(child, "its process ended")
            time.sleep(0.05)

    def _did_not_start(self, child: _Child, what: str) -> Unavailable:
        name = child.part.name
        file = self.folder.log_file(name)
        end = tail(file, since_byte=child.log_from_byte)
        return Unavailable(
            f"{name} of stack {self.folder.name!r}", f"{what}\nThe end of its log, {file}:\n{end or '(nothing)'}"
        )

    # What follows runs in the keeper thread.

    def _run_in_keeper(self, what: Callable[[], None]) -> None:
        """Run `what` in the keeper thread and wait for it."""
        if not self._keeper.is_alive():
            raise Unavailable(f"stack {self.folder.name!r}", "it was stopped")
        done: Future[None] = Future()
        self._calls.put((what, done))
        done.result()

    def _keep(self) -> None:
        while not self._closing:
            try:
                what, done = self._calls.get(timeout=CHECK_EVERY_SECONDS)
            except queue.Empty:
                try:
                    self._check()
                except Exception:  # the end of this thread would be the end of all parts
                    log.exception("stack.keeper_failed", stack=self.folder.name)
                continue
            try:
                what()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _check(self) -> None:
        for child in self._children.values():
            if not child.wanted:
                continue
            if child.process is not None and child.process.poll() is not None:
                self._on_death(child)
            if child.process is None and self._clock() >= child.start_at:
                self._start_again(child)

    def _on_death(self, child: _Child) -> None:
        assert child.process is not None
        ran = self._clock() - child.started_at
        child.quick_deaths = 0 if ran >= STEADY_AFTER_SECONDS else child.quick_deaths + 1
        delay = 0.0 if child.quick_deaths <= 1 else min(LONGEST_BACK_OFF_SECONDS, 0.5 * 2 ** (child.quick_deaths - 2))
        log.warning(
            "stack.part_died",
            stack=self.folder.name,
            part=child.part.name,
            status=child.process.returncode,
            again_in_seconds=delay,
        )
        child.process = None
        child.start_at = self._clock() + delay
        self._write_state()

    def _start_again(self, child: _Child) -> None:
        child.restarts += 1
        try:
            self._start(child)
        except (NotReady, Misconfigured, OSError, subprocess.SubprocessError) as error:
            child.quick_deaths += 1
            child.start_at = self._clock() + LONGEST_BACK_OFF_SECONDS
            log.warning("stack.part_not_started", stack=self.folder.name, part=child.part.name, error=str(error))
        self._write_state()

    def _start_all(self) -> None:
        self._set_phase("starting")
        for child in self._children.values():
            self._start_part(child)

    def _start_part(self, child: _Child) -> None:
        if child.process is not None and child.process.poll() is None:
            return
        child.wanted, child.quick_deaths = True, 0
        file = self.folder.log_file(child.part.name)
        # not moved by restarts: the output before the death is the useful part
        child.log_from_byte = file.stat().st_size if file.exists() else 0
        try:
            self._start(child)
        except NotReady as error:
            raise self._did_not_start(child, str(error)) from error
        self._write_state()

    def _start(self, child: _Child) -> None:
        file = self.folder.log_file(child.part.name)
        child.part.prepare(file)
        with file.open("ab") as output:
            child.process = launch(child.part.command(), log=output, cwd=self.folder.data(child.part.name))
        child.started_at = self._clock()

    def _stop_all(self, error: str | None) -> None:
        self._set_phase("stopping")
        self._error = error
        self._stop(list(self._children.values()))
        self._closing = True
        self._set_phase("failed" if error else "stopped")

    def _stop(self, children: list[_Child]) -> None:
        for child in children:
            child.wanted = False
            if child.process is not None and child.process.poll() is None:
                child.process.send_signal(child.part.stop_signal)
        for child in children:
            if child.process is None:
                continue
            try:
                child.process.wait(timeout=child.part.stop_patience_seconds)
            except subprocess.TimeoutExpired:
                log.warning("stack.part_killed", stack=self.folder.name, part=child.part.name, reason="did not stop")
                child.process.kill()
                child.process.wait()
            child.part.stopped(child.process.returncode)
            child.process = None
        self._write_state()

    def _set_phase(self, phase: Phase) -> None:
        self._phase = phase
        self._write_state()

    def _write_state(self) -> None:
        """Write what runs, for `status`, for clients, and for the cleanup after a kill."""
        owner = ProcessId.of(os.getpid())
        assert owner is not None
        parts = {
            name: PartState(ProcessId.of(child.process.pid) if child.process else None, child.restarts)
            for name, child in self._children.items()
        }
        self.folder.write_state(
            StackState(self._phase, owner, {str(name): state for name, state in parts.items()}, self._error)
        )


def endpoints_of(ports: Ports) -> dict[str, dict[str, Any]]:
    """Nested settings values that lead to a stack's parts, and nowhere else."""
    addresses: dict[str, dict[str, Any]] = {
        "kafka": {"bootstrap_servers": f"{HOST}:{ports.kafka}"},
        "milvus": {"uri": f"http://{HOST}:{ports.milvus}"},
        "redis": {"url": f"redis://{HOST}:{ports.valkey}/0"},
    }
    return {"topics": NOWHERE_ELSE["topics"]} | {part: NOWHERE_ELSE[part] | own for part, own in addresses.items()}


def folders_of(path: Path) -> dict[str, dict[str, Any]]:
    """Nested settings values that keep models, snapshots and state below `path`, and nowhere else."""
    return {part: NOWHERE_ELSE[part] | values for part, values in folders_in(path).items()}


def stack_folder(where: str | Path, config: StackConfig) -> StackFolder:
    """The folder of a stack by its name, or at a path of its own."""
    if isinstance(where, Path):
        return StackFolder(where)
    if not where or where.startswith(".") or "/" in where:
        raise Misconfigured(f"{where!r} is no name for a stack: it becomes a folder's name")
    return StackFolder(config.data_folder.expanduser() / where)


@contextmanager
def running_stack(where: str | Path, config: StackConfig, *, console: Console | None = None) -> Iterator[RunningStack]:
    """A stack whose parent is this process, ready inside the block and stopped after it; its data stays.

    `where` is a name (a folder below `config.data_folder`) or a folder. `console` shows the progress of the jars. A
    part that dies inside the block is started again. The parts die with this process, however it ends.

    Raises `Misconfigured` if another process owns the folder, a port is taken or Kafka's jars cannot be had, and
    `Unavailable` with the end of its log if a part does not start.
    """
    folder = stack_folder(where, config)
    require_java()
    class_path = kafka_class_path(config, console)
    folder.claim()
    try:
        folder.end_strays()
        ports = folder.ports(fixed=fixed_ports(where) if isinstance(where, str) else None)
        stack = RunningStack(
            folder,
            ports,
            make_parts(folder, ports, class_path, config),
            start_timeout_seconds=config.start_timeout_seconds,
        )
        failure: str | None = None
        try:
            stack.open()
            yield stack
        except BaseException as error:
            failure = None if stack.opened else str(error) or type(error).__name__
            raise
        finally:
            stack.close(error=failure)
    finally:
        folder.release()


def make_parts(folder: StackFolder, ports: Ports, class_path: str, config: StackConfig) -> list[Part]:
    """The three parts; Kafka last, because its first preparation takes longest and the others start meanwhile."""
    return [
        ValkeyPart(folder.data("valkey"), ports.valkey),
        MilvusPart(folder.data("milvus"), ports.milvus),
        KafkaPart(folder.data("kafka"), ports.kafka, ports.kafka_controller, class_path, config.kafka_heap_mb),
    ]


def all_stacks(config: StackConfig) -> list[StackFolder]:
    """Every stack that was started by name, in the order of the names."""
    root = config.data_folder.expanduser()
    return [StackFolder(path) for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []


def phase_of(folder: StackFolder) -> str:
    """What the stack in `folder` does now."""
    state = folder.read_state()
    return state.phase if state is not None and state.alive() else "not running"


def values_in(folder: StackFolder) -> dict[str, Any]:
    """Nested settings values of the stack that runs in `folder`: its addresses, and where its models and state lie.

    Raises `Misconfigured` if none runs.
    """
    ports, phase = folder.read_ports(), phase_of(folder)
    if ports is None or phase != "ready":
        raise Misconfigured(
            f"the embedded stack {folder.name!r} is {phase}: start it with `mimstream stack up --name {folder.name}`"
        )
    return endpoints_of(ports) | folders_of(folder.path)
