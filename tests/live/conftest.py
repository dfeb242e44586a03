"""Live tests run against real parts, started through the code that users start them with."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streams.broker.topics import create_topics
from streams.runtime.launch import launch
from streams.settings import Settings, environment_of
from streams.stack.run import RunningStack
from tests.factories.fork_server import Forked, ForkServer
from tests.factories.picture_site import PictureSite, picture_site


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("live")


@pytest.fixture
def settings_values(stack: RunningStack, tmp_path: Path) -> dict[str, Any]:
    """Nested settings of this test alone: its own topics, collection, keys and model folder on the shared stack."""
    own = uuid.uuid4().hex[:10]
    values: dict[str, dict[str, Any]] = {
        "kafka": dict(stack.endpoints["kafka"]),
        "topics": {"prefix": f"t{own}."},
        "milvus": {**stack.endpoints["milvus"], "alias": f"items_{own}"},
        "redis": {**stack.endpoints["redis"], "key_prefix": f"t{own}:"},
        "models": {"folder": str(tmp_path / "models")},
    }
    return {name: value for name, value in values.items() if name in Settings.model_fields}


@pytest.fixture
def settings(settings_values: dict[str, Any]) -> Settings:
    """Settings of this test alone; its topics exist."""
    made = Settings(**settings_values)
    create_topics(made.kafka, made.topics)
    return made


class MimstreamProcess:
    """A `mimstream` command as a child process; its output goes to `log`."""

    def __init__(self, process: subprocess.Popen[bytes] | Forked, arguments: tuple[str, ...], log: Path) -> None:
        self._process = process
        self.arguments = arguments
        self.log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, timeout_seconds: float = 60.0) -> None:
        """Wait until the output holds `text`, for instance `index.ready`."""
        deadline = time.monotonic() + timeout_seconds
        while text not in self.output():
            status = self.returncode
            if status is not None and text not in self.output():
                raise AssertionError(f"{self.arguments} ended with {status} before {text!r}:\n{self.output()[-4000:]}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.arguments} did not say {text!r}:\n{self.output()[-4000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill -9."""
        self._process.kill()
        self._process.wait(timeout=30)

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop(self, timeout_seconds: float = 30.0) -> int:
        """SIGTERM; returns the exit status. Fails if the process does not end in time."""
        if self._process.poll() is None:
            self._process.terminate()
        return self.wait(timeout_seconds)

    def wait(self, timeout_seconds: float = 60.0) -> int:
        """Wait until it ends by itself; returns the exit status."""
        try:
            return self._process.wait(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.arguments} did not end:\n{self.output()[-4000:]}") from None


@pytest.fixture
def run_command(
    fork_server: ForkServer, settings_values: dict[str, Any]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `mimstream ...` with this test's settings to its end, as `run_command("models", "list", env={...})`."""

    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return fork_server.run(arguments, {**os.environ, **environment_of(settings_values), **(env or {})})

    return run


@pytest.fixture
def process(
    fork_server: ForkServer, settings_values: dict[str, Any], tmp_path: Path
) -> Iterator[Callable[..., MimstreamProcess]]:
    """Start `mimstream ...` with this test's settings, as `process("index", "--slot", "0", env={...})`.

    `cold` starts it as a user does, with an interpreter of its own. The demo starts `index`, `record`, `train` and
    `serve` so; of the other commands one test each.
    """
    started: list[MimstreamProcess] = []

    def start(*arguments: str, env: dict[str, str] | None = None, cold: bool = False) -> MimstreamProcess:
        log = tmp_path / f"{len(started)}-{arguments[0]}.log"
        environment = {**os.environ, **environment_of(settings_values), **(env or {})}
        log.touch()
        child: subprocess.Popen[bytes] | Forked
        if cold:
            with log.open("ab") as output:
                child = launch([sys.executable, "-m", "streams", *arguments], log=output, environment=environment)
        else:
            child = fork_server.start(arguments, environment, log)
        started.append(MimstreamProcess(child, arguments, log))
        return started[-1]

    yield start
    for child in started:
        if child.returncode is None:
            child.kill()


@pytest.fixture
async def pictures() -> AsyncIterator[PictureSite]:
    async with picture_site() as site:
        yield site
