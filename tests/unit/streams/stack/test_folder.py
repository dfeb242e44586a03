"""One stack's folder: one owner, ports that stay, processes told apart."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from schemas.errors import Misconfigured
from streams.runtime.launch import launch
from streams.settings import load_settings
from streams.stack.config import StackConfig
from streams.stack.folder import PartState, ProcessId, StackFolder, StackState, fixed_ports, tail
from streams.stack.run import stack_folder, values_in
from streams.stack.supervisor import down, status
from tests.factories.waiting import wait_until


def process(pid: int) -> ProcessId:
    found = ProcessId.of(pid)
    assert found is not None
    return found


def launch_until_up(log: Path) -> subprocess.Popen[bytes]:
    """A child that sleeps, once it has said that it is up."""
    with log.open("wb") as output:
        child = launch([sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)"], log=output)
    wait_until(lambda: "up" in log.read_text())
    return child


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    first, second = StackFolder(tmp_path / "s"), StackFolder(tmp_path / "s")
    assert not first.owned()
    first.claim()
    assert second.owned()
    with pytest.raises(Misconfigured, match="mimstream stack down --name s"):
        second.claim()
    first.release()
    second.claim()
    second.release()
    assert not first.owned()


def test_ports_stay_while_they_are_free(tmp_path: Path) -> None:
    folder = StackFolder(tmp_path)
    ports = folder.ports(fixed=None)
    assert len({ports.kafka, ports.kafka_controller, ports.valkey, ports.milvus}) == 4
    assert folder.ports(fixed=None) == folder.read_ports() == ports
    with socket.create_server(("127.0.0.1", ports.valkey)):
        assert folder.ports(fixed=None) != ports


def test_a_fixed_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = StackFolder(tmp_path).ports(fixed=None)
        with pytest.raises(Misconfigured, match=rf"port {port} \(valkey of stack"):
            StackFolder(tmp_path).ports(fixed=replace(free, valkey=port))


def test_only_the_default_stack_has_fixed_ports() -> None:
    ports = fixed_ports("default")
    assert ports is not None
    defaults = load_settings()
    assert defaults.kafka.bootstrap_servers == f"127.0.0.1:{ports.kafka}"
    assert f":{ports.valkey}/" in defaults.redis.url
    assert fixed_ports("other") is None


def test_the_state_of_a_killed_owner_is_told_from_a_live_one(tmp_path: Path) -> None:
    folder = StackFolder(tmp_path)
    folder.ports(fixed=None)
    own = process(os.getpid())
    live = StackState("ready", own, {"kafka": PartState(own, restarts=2)})
    folder.write_state(live)
    assert folder.read_state() == live
    assert live.alive()
    assert values_in(folder)["kafka"]["bootstrap_servers"].startswith("127.0.0.1:")
    # the same number given to a later process
    reused = ProcessId(os.getpid(), own.started_ticks - 1)
    folder.write_state(StackState("ready", reused))
    with pytest.raises(Misconfigured, match=r"not running: start it with `mimstream stack up"):
        values_in(folder)


def test_down_ends_what_a_killed_owner_left(tmp_path: Path) -> None:
    folder = StackFolder(tmp_path / "s")
    folder.path.mkdir()
    folder.ports(fixed=None)
    stray = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        left = {"kafka": PartState(process(stray.pid)), "milvus": PartState(None)}
        folder.write_state(StackState("ready", ProcessId(os.getpid(), 1), left))  # a dead owner
        assert not any(report.answers for report in status(folder, StackConfig()))
        assert not down(folder, purge=False)
        assert stray.wait(timeout=5) == -signal.SIGKILL
    finally:
        stray.kill()
        stray.wait()
    state = folder.read_state()
    assert state is not None and state.phase == "stopped"
    assert not down(folder, purge=True)
    assert not folder.path.exists()


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b"])
def test_a_name_that_leaves_the_data_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="no name for a stack"):
        stack_folder(name, StackConfig(data_folder=tmp_path))


def test_the_folders_follow_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = load_settings().stack
    assert stack_folder("x", config).path == tmp_path / "data" / "mimstream" / "stacks" / "x"
    assert config.cache_folder == tmp_path / "cache" / "mimstream"
    monkeypatch.setenv("MIM_STACK__CACHE_FOLDER", "/elsewhere")
    assert load_settings().stack.cache_folder == Path("/elsewhere")


def test_the_tail_is_of_this_start_only(tmp_path: Path) -> None:
    file = tmp_path / "part.log"
    file.write_text("old\n")
    since = file.stat().st_size
    with file.open("a") as log:
        log.write("".join(f"line {number}\n" for number in range(30)))
    assert tail(file, since_byte=since, lines=2) == "line 28\nline 29"
    assert "old" not in tail(file, since_byte=since, lines=100)
    assert tail(tmp_path / "none.log") == ""


def test_a_child_dies_when_its_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time, subprocess\n"
        "from streams.runtime.launch import launch\n"
        "child = launch([sys.executable, '-c', 'import time; time.sleep(60)'], log=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.3)  # past the shim
        assert ProcessId.of(child) is not None
        parent.kill()
    wait_until(lambda: ProcessId.of(child) is None)


def test_a_child_is_tied_to_the_thread_that_started_it(tmp_path: Path) -> None:
    """Why the stack has a keeper thread: pins the kernel's behaviour that its design rests on."""
    started: list[subprocess.Popen[bytes]] = []
    leave = threading.Event()

    def start() -> None:
        started.append(launch_until_up(tmp_path / "log"))
        leave.wait(timeout=10)

    thread = threading.Thread(target=start)
    thread.start()
    wait_until(lambda: started)
    assert started[0].poll() is None
    leave.set()
    thread.join()
    assert started[0].wait(timeout=5) == -signal.SIGKILL


def test_a_child_obeys_interrupts_although_its_parent_ignores_them(tmp_path: Path) -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = launch_until_up(tmp_path / "log")
    finally:
        signal.signal(signal.SIGINT, previous)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=5) not in (None, 0)
    assert "KeyboardInterrupt" in (tmp_path / "log").read_text()
