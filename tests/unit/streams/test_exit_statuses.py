"""What a command's end tells a script: by its status, and in one line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import structlog

from schemas.errors import BrokerUnavailable, Fenced, Misconfigured, PipelineError, Reason, StoreBusy, WriteRejected
from streams import cli
from streams.commands import settings as any_command
from streams.commands import stack as stack_command

pytestmark = pytest.mark.usefixtures("alone")


def ends_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> int:
        raise error

    monkeypatch.setattr(any_command, "run", run)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PipelineError("no such release"), 1),
        (WriteRejected(Reason.BAD_VECTOR, "no such release"), 1),
        (Misconfigured("no such release"), 2),
        (BrokerUnavailable("Kafka", "no such release"), 3),
        (StoreBusy("Redis", "no such release"), 3),
        (Fenced("no such release"), 4),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Exception) else None,
)
def test_each_kind_of_failure_has_its_status_and_is_told_on_the_error_output(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends_with(error, monkeypatch)
    assert cli.main(["settings"]) == status
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("mimstream: ") and "no such release" in told.err


@pytest.mark.parametrize("status", [0, 1, 6])
def test_a_commands_own_status_is_passed_on(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(any_command, "run", lambda *_: status)
    assert cli.main(["settings"]) == status


def test_an_interruption_is_told_as_shells_do_and_a_fault_of_ours_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends_with(KeyboardInterrupt(), monkeypatch)
    assert cli.main(["settings"]) == 130
    for fault in (ZeroDivisionError(), ValueError("x"), OSError(errno.ECONNRESET, "reset")):
        ends_with(fault, monkeypatch)
        with pytest.raises(type(fault)):
            cli.main(["settings"])


def test_a_reader_that_has_had_enough_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    ends_with(BrokenPipeError(), monkeypatch)
    moved: list[Any] = []
    monkeypatch.setattr(cli.os, "dup2", lambda *given: moved.append(given))
    assert cli.main(["settings"]) == 0 and len(moved) == 1
    os.close(moved[0][0])


def test_a_command_gets_the_settings_of_all_common_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mim.toml"
    file.write_text('[topics]\npartitions = 7\nprefix = "file."\n')
    seen: list[Any] = []

    def run(options: Any, settings: Any) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr(any_command, "run", run)
    monkeypatch.setattr(cli, "_stack_values", lambda name, config: {"redis": {"url": f"redis://{name}:1/0"}})
    words = [
        "--config",
        str(file),
        "settings",
        "--set",
        "topics.prefix=x.",
        "--set",
        "topics.behaviours_retention_days=3",
    ]
    assert cli.main([*words, "--stack", "try"]) == 0
    (settings,) = seen
    assert (settings.topics.partitions, settings.topics.prefix, settings.topics.behaviours_retention_days) == (
        7,
        "x.",
        3,
    )
    assert settings.redis.url == "redis://try:1/0" and settings.kafka.client_id == "mimstream-settings"
    assert cli.main(["settings", "--set", "kafka.client_id=mine"]) == 0
    assert seen[-1].kafka.client_id == "mine" and seen[-1].redis.url.startswith("redis://127.0.0.1")


def test_lines_below_the_level_of_the_command_line_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> int:
        structlog.get_logger().info("a line")
        return 0

    monkeypatch.setattr(any_command, "run", run)
    for level, lines in (("debug", 1), ("info", 1), ("warning", 0), ("error", 0)):
        cli.main(["settings", "--log-level", level])
        assert capsys.readouterr().err.count("a line") == lines, level


def test_the_command_that_starts_a_stack_takes_no_settings_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_stack_values", lambda name, config: pytest.fail("it may not be there yet"))
    monkeypatch.setattr(stack_command, "run", lambda options, settings: 5)
    assert cli.main(["stack", "status", "--stack", "try"]) == 5


def test_a_completion_needs_no_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MIM_TOPICS__PARTITIONS", "many")
    monkeypatch.setattr(cli, "_completion", lambda shell: f"for {shell}")
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out == "for zsh\n"


def test_words_behind_two_dashes_belong_to_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    common, own = cli.split_common(["forget", "user", "--set", "a=1", "--", "--set", "b=2", "--config", "x"])
    assert common.set == ["a=1"] and common.config is None
    assert own == ["forget", "user", "--", "--set", "b=2", "--config", "x"]
    assert cli.main(["settings", "--json", "--set", "topics.prefix=y."]) == 0
    rows = {row["variable"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["MIM_TOPICS__PREFIX"]["value"], rows["MIM_TOPICS__PREFIX"]["from"]) == ("y.", "command line")
