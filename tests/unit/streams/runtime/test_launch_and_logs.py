"""Children of this process, what is written of libraries' logs, and settings as text."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from streams.runtime.launch import launch
from streams.runtime.logs import configure_logging
from streams.runtime.setting_names import as_text

ABOUT = "import os, sys; print(os.getsid(0) == os.getpid(), sys.stdin.read() == '', os.getcwd(), os.environ.get('A'))"


@pytest.fixture
def _words_on_standard_input() -> Iterator[None]:
    kept, (read, write) = os.dup(0), os.pipe()
    os.write(write, b"words")
    os.dup2(read, 0)
    for one in (read, write):
        os.close(one)
    yield
    os.dup2(kept, 0)
    os.close(kept)


@pytest.mark.usefixtures("_words_on_standard_input")
@pytest.mark.parametrize("given", [None, {"A": "1"}])
def test_a_child_has_a_session_of_its_own_and_nothing_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str] | None
) -> None:
    monkeypatch.setenv("A", "inherited")
    with (tmp_path / "log").open("wb") as log:
        child = launch([sys.executable, "-c", ABOUT], log=log, cwd=tmp_path, environment=given)
    assert child.wait(timeout=20) == 0
    assert (tmp_path / "log").read_text().split() == ["True", "True", str(tmp_path), "1" if given else "inherited"]


@pytest.fixture
def _logging_as_it_was() -> Iterator[None]:
    root, config = logging.getLogger(), structlog.get_config()
    names = ("kafka", "aiokafka", "pymilvus")
    level, handlers, levels = root.level, [*root.handlers], [logging.getLogger(name).level for name in names]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    for name, one in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(one)
    structlog.configure(**config)


@pytest.mark.usefixtures("_logging_as_it_was")
@pytest.mark.parametrize(
    ("level", "libraries", "clients"),
    [
        ("info", logging.WARNING, logging.CRITICAL),
        ("error", logging.ERROR, logging.CRITICAL),
        ("debug", logging.WARNING, logging.NOTSET),
    ],
)
def test_of_libraries_warnings_are_written_and_of_clients_only_where_everything_is(
    level: str, libraries: int, clients: int
) -> None:
    for name in ("kafka", "aiokafka", "pymilvus"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    configure_logging(level)
    assert logging.getLogger().level == libraries
    assert {logging.getLogger(name).level for name in ("kafka", "aiokafka", "pymilvus")} == {clients}
    assert structlog.get_logger().is_enabled_for(logging.INFO) == (level != "error")


def test_a_setting_is_shown_as_it_can_be_set() -> None:
    shown = [as_text(value) for value in (True, ("a",), {"a": Path("b")}, None, 1.5, Path("/x"), "text", "")]
    assert shown == ["true", '["a"]', '{"a": "b"}', "", "1.5", "/x", "text", ""]
