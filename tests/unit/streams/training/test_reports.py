"""The trainer's accounts and scores can be read at any moment."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from schemas.errors import StoreUnavailable
from streams.runtime.interval import IntervalTimer
from streams.training.reports import NO_COUNTS, TrainReport, TrainReports, write_report
from streams.training.scores import ScoreFiles, read_scores, write_row_lines
from trainer.metrics import ScoredRows


def make_rows(first: int, count: int) -> ScoredRows:
    numbers = np.arange(first, first + count)
    return ScoredRows(
        user=np.array([f"u{number % 7}" for number in numbers]),
        item=np.array([f"item-{number}" for number in numbers]),
        occurred_at=numbers.astype(np.float64),
        label=(numbers % 2).astype(np.int64),
        age_seconds=np.where(numbers % 3 == 0, np.nan, numbers * 1.5),
        catalogue=numbers % 5 == 0,
        retaken=numbers % 11 == 0,
        scores={"ciubm": numbers / 1e6, "din": numbers / 2e6},
    )


def assert_equal(read: ScoredRows | None, expected: ScoredRows) -> None:
    assert read is not None
    for name in ("user", "item", "occurred_at", "label", "age_seconds", "catalogue", "retaken"):
        np.testing.assert_array_equal(getattr(read, name), getattr(expected, name))
    assert list(read.scores) == list(expected.scores)
    for name in expected.scores:
        np.testing.assert_array_equal(read.scores[name], expected.scores[name])


def test_scores_come_back_as_they_were_added_after_each_flush(tmp_path: Path) -> None:
    files = ScoreFiles(tmp_path / "scores", rows_per_file=250)
    files.open()
    assert read_scores(tmp_path / "scores") is None
    for step in range(10):
        files.add([make_rows(step * 100, 60), make_rows(step * 100 + 60, 40)])
        files.flush()
        assert_equal(read_scores(tmp_path / "scores"), make_rows(0, (step + 1) * 100))
    assert len(list((tmp_path / "scores").glob("scores-*.parquet"))) == 4  # 260, 260, 260, 220
    assert not list((tmp_path / "scores").glob(".*"))


def test_scores_of_an_earlier_run_are_not_mixed_with_this_one(tmp_path: Path) -> None:
    for first in (0, 500):
        files = ScoreFiles(tmp_path)
        files.open()
        files.add([make_rows(first, 10)])
        files.flush()
    assert_equal(read_scores(tmp_path), make_rows(500, 10))


def test_only_the_newest_score_files_are_kept(tmp_path: Path) -> None:
    files = ScoreFiles(tmp_path, rows_per_file=10, keep_files=3)
    files.open()
    for step in range(8):
        files.add([make_rows(step * 10, 10)])
    assert_equal(read_scores(tmp_path), make_rows(50, 30))
    assert sum(pq.read_metadata(path).num_rows for path in tmp_path.glob("*.parquet")) == 30


def test_accounts_are_one_json_object_with_all_that_is_known(tmp_path: Path) -> None:
    report = TrainReport(accounts={**NO_COUNTS, "received": 3}, offsets={"behaviours": {0: 3}}, steps=2)
    write_report(tmp_path / "state", report)
    read = json.loads((tmp_path / "state" / "accounts.json").read_text())
    assert read["accounts"]["received"] == 3 and read["offsets"] == {"behaviours": {"0": 3}} and read["steps"] == 2
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["accounts.json"]


def test_a_state_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="MIM_TRAIN__STATE_FOLDER"):
        write_report(tmp_path / "file", TrainReport(accounts=NO_COUNTS))
    with pytest.raises(StoreUnavailable):
        ScoreFiles(tmp_path / "file").open()


def test_row_lines_stand_in_training_order(tmp_path: Path) -> None:
    write_row_lines(tmp_path / "rows", [make_rows(0, 2), make_rows(5, 1)])
    assert (tmp_path / "rows").read_text() == "u0\titem-0\t0\t0\nu1\titem-1\t1\t1\nu5\titem-5\t5\t1\n"


def test_a_forgotten_user_is_in_no_file_full_or_not_and_rows_keep_their_places(tmp_path: Path) -> None:
    files = ScoreFiles(tmp_path, rows_per_file=10)
    files.open()
    for start in range(0, 25, 5):
        rows = make_rows(start, 5)
        files.add([replace(rows, user=np.array([f"somebody-{name}" for name in rows.user]))])
    files.flush()
    names = read_scores(tmp_path)
    assert names is not None
    user = str(names.user[3])
    files.forget([user])
    scored = files.scored
    files.flush()
    after = read_scores(tmp_path)
    assert after is not None and files.scored == scored == 25
    assert after.user.tolist() == ["" if name == user else name for name in names.user.tolist()]
    assert after.scores["ciubm"].tolist() == names.scores["ciubm"].tolist()
    assert not [path for path in tmp_path.iterdir() if user.encode() in path.read_bytes()]


async def test_a_clock_that_is_set_back_puts_no_report_off() -> None:
    now = [1e9]
    written: list[TrainReport] = []
    reports = TrainReports(interval=IntervalTimer(5, lambda: now[0]), on_report=written.append)
    for move, due in ((0, True), (4, False), (-3_600, True)):
        now[0] += move
        assert reports.due is due
        if due:
            await reports.write(TrainReport(accounts=NO_COUNTS))
            assert not reports.due
    assert len(written) == 2


def test_a_report_replaces_the_one_before_in_a_folder_that_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    for steps in (1, 2):
        write_report(folder, TrainReport(accounts=NO_COUNTS, steps=steps))
        assert json.loads((folder / "accounts.json").read_text())["steps"] == steps
    assert [path.name for path in folder.iterdir()] == ["accounts.json"]


@pytest.mark.parametrize("kept", [0, 60, 100, 130, 150])
def test_scores_go_on_at_the_row_of_a_snapshot_and_what_lay_beyond_it_is_made_again(tmp_path: Path, kept: int) -> None:
    files = ScoreFiles(tmp_path, rows_per_file=100)
    files.open()
    files.add([make_rows(0, 100), make_rows(100, 50)])
    files.flush()
    again = ScoreFiles(tmp_path, rows_per_file=100)
    again.open(kept)
    assert files.scored == 150 and again.scored == kept
    again.flush()
    read = read_scores(tmp_path)
    if kept:
        assert_equal(read, make_rows(0, kept))
    else:
        assert read is None
    again.add([make_rows(kept, 20)])
    again.flush()
    assert_equal(read_scores(tmp_path), make_rows(0, kept + 20))
    assert max(pq.read_metadata(path).num_rows for path in tmp_path.iterdir()) <= 100, "a full file is not added to"


def test_one_that_took_over_elsewhere_and_restarts_from_its_predecessors_snapshot_lists_no_row_twice(
    tmp_path: Path,
) -> None:
    for _ in range(2):  # killed before its own first snapshot, and again
        files = ScoreFiles(tmp_path, rows_per_file=100)
        files.open(350)
        files.add([make_rows(350, 130)])
        files.flush()
    assert_equal(read_scores(tmp_path), make_rows(350, 130))


def test_a_folder_keeps_its_older_rows_when_another_trainer_made_those_between(tmp_path: Path) -> None:
    for first in (0, 500):
        files = ScoreFiles(tmp_path)
        files.open(first)
        files.add([make_rows(first, 40)])
        files.flush()
    files = ScoreFiles(tmp_path)
    files.open(520)
    files.flush()
    kept = read_scores(tmp_path)
    assert kept is not None and kept.occurred_at.tolist() == [*range(40), *range(500, 520)]


def test_files_of_an_earlier_build_stay_and_come_first(tmp_path: Path) -> None:
    files = ScoreFiles(tmp_path)
    files.open()
    files.add([make_rows(0, 40)])
    files.flush()
    next(tmp_path.iterdir()).rename(tmp_path / "scores-000001.parquet")
    files.open(40)
    files.add([make_rows(40, 5)])
    files.flush()
    assert_equal(read_scores(tmp_path), make_rows(0, 45))
