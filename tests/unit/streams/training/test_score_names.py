"""A name that has to go from the scores goes with the next write that succeeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from schemas.errors import StoreUnavailable
from streams.training.scores import ScoreFiles, read_scores, write_row_lines
from trainer.metrics import ScoredRows


def make_rows(*users: str) -> ScoredRows:
    count = len(users)
    return ScoredRows(
        user=np.array(users), item=np.array(["i"] * count), occurred_at=np.arange(count, dtype=np.float64),
        label=np.zeros(count, np.int64), age_seconds=np.zeros(count), catalogue=np.zeros(count, bool),
        retaken=np.zeros(count, bool), scores={"ciubm": np.zeros(count)},
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    found = read_scores(folder)
    return [] if found is None else found.user.tolist()


def test_a_disk_that_is_full_keeps_a_name_no_longer_than_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ScoreFiles(tmp_path, rows_per_file=2)
    files.open()
    files.add([make_rows("u1", "u2"), make_rows("u1")])
    files.flush()
    files.forget(["u1"])
    with monkeypatch.context() as patched:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr("streams.training.scores.os.replace", full)
        with pytest.raises(StoreUnavailable, match="No space left"):
            files.flush()
    assert names(tmp_path) == ["u1", "u2", "u1"]
    files.flush()
    assert names(tmp_path) == ["", "u2", ""]
    files.add([make_rows("u1")])  # they came back: a new user's rows
    files.flush()
    assert names(tmp_path) == ["", "u2", "", "u1"]


def test_a_file_is_full_at_its_number_of_rows_and_what_was_written_is_not_written_again(tmp_path: Path) -> None:
    files = ScoreFiles(tmp_path, rows_per_file=2)
    files.open()
    files.add([make_rows("a", "b")])
    assert [path.name for path in tmp_path.iterdir()] == ["scores-000000000000.parquet"], "without a flush"
    files.add([make_rows("c")])
    files.flush()
    newest = tmp_path / "scores-000000000002.parquet"
    newest.unlink()
    files.flush()
    assert not newest.exists()
    files.forget(["nobody"])
    files.flush()
    assert pq.read_table(newest)["user"].to_pylist() == ["c"]


def test_row_lines_that_cannot_be_written_name_the_option(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="--rows"):
        write_row_lines(tmp_path / "nowhere" / "rows", [make_rows("a")])
