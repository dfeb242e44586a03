"""What cannot be written is told in one line with its path, its reason and its setting."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from streams import cli
from streams.commands import settings as any_command
from streams.runtime.files import OF_FILES, file_refusal
from streams.settings import Settings
from streams.stack.config import StackConfig

AT = Path("/somewhere")


def in_force() -> Settings:
    return Settings(stack=StackConfig(data_folder=AT / "stacks", cache_folder=AT / "cache"))


@pytest.mark.parametrize("number", sorted(OF_FILES))
def test_a_command_that_cannot_write_says_where_why_and_which_setting(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> int:
        raise OSError(number, os.strerror(number), str(AT / "stacks" / "default"))

    monkeypatch.setattr(any_command, "run", run)
    assert cli.main(["settings", "--set", f"stack.data_folder={AT / 'stacks'}"]) == cli.EXIT_MISCONFIGURED
    (line,) = capsys.readouterr().err.splitlines()
    for word in (str(AT / "stacks" / "default"), os.strerror(number), "MIM_STACK__DATA_FOLDER"):
        assert word in line


def test_with_debug_logs_and_for_other_errors_the_traceback_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, level in ((errno.ENOSPC, "debug"), (errno.ECONNRESET, "info"), (errno.ENOENT, "info")):

        def run(*_: object, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(any_command, "run", run)
        with pytest.raises(OSError):
            cli.main(["settings", "--log-level", level])


def test_a_full_disk_that_gives_no_path_is_found_among_the_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    told = str(file_refusal(OSError(errno.ENOSPC, "No space left on device"), in_force()))
    assert "/somewhere/stacks" in told and "MIM_STACK__DATA_FOLDER" in told and "make room" in told
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    assert "MIM_" not in str(file_refusal(OSError(errno.ENOSPC, "No space left on device"), in_force()))
    assert "MIM_" not in str(file_refusal(OSError(errno.EROFS, "Read-only file system", "/elsewhere/x"), None))
