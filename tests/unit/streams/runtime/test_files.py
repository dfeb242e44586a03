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
from streams.runtime.files import file_refusal
from streams.settings import Settings
from streams.stack.config import StackConfig

AT = Path("/somewhere")


def in_force() -> Settings:
    return Settings(stack=StackConfig(data_folder=AT / "stacks", cache_folder=AT / "cache"))


@pytest.mark.parametrize(
    "number",
    [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
     errno.ENAMETOOLONG],
)  # fmt: skip
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


@pytest.mark.parametrize(("free", "full"), [((1 << 20) - 1, True), (1 << 20, False)])
def test_a_folder_counts_as_full_below_a_megabyte_whether_it_is_there_or_not(
    free: int, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    settings = Settings(stack=StackConfig(data_folder=tmp_path / "not" / "yet", cache_folder=tmp_path))
    told = str(file_refusal(OSError(errno.EDQUOT, "Quota exceeded"), settings))
    assert ("MIM_STACK__DATA_FOLDER" in told) is full and tmp_path in asked and "make room there" in told


def test_the_folder_that_a_path_lies_in_is_named_and_no_other() -> None:
    error = OSError(errno.EACCES, "Permission denied", str(AT / "cache" / "x"))
    told = str(file_refusal(error, in_force()))
    assert "make it writable, or set MIM_STACK__CACHE_FOLDER to another folder" in told
    assert "DATA_FOLDER" not in told
    elsewhere = str(file_refusal(OSError(errno.EACCES, "Permission denied", "/somewhere/cached"), in_force()))
    assert "MIM_" not in elsewhere and elsewhere.startswith("/somewhere/cached: Permission denied; make it writable")


def test_a_folder_that_is_given_from_home_or_from_here_is_found_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    settings = Settings(stack=StackConfig(data_folder=Path("~/stacks"), cache_folder=Path("cache")))
    for path, variable in (("home/stacks/x", "MIM_STACK__DATA_FOLDER"), ("cache/x", "MIM_STACK__CACHE_FOLDER")):
        error = OSError(errno.EACCES, "Permission denied", str(tmp_path / path))
        assert f"or set {variable} to another folder" in str(file_refusal(error, settings))
