from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from streams.runtime.interval import IntervalTimer
from streams.training.click_log_watch import ClickLogWatch, click_log_problem
from streams.training.reports import NO_COUNTS, TrainReport
from tests.factories.feeding import observe_all, through_bytes
from tests.factories.samples import behaviour, make_trainer, small_config
from tests.factories.training import ALL, ListedInput, make_loop, trained, vectors
from trainer.samples.late_events import LateEvent


class Watched:
    def __init__(self) -> None:
        self.now = 0.0
        self.watch = ClickLogWatch(IntervalTimer(60, lambda: self.now))

    def look(self, *, draws: bool = False, received: int = 0, late: int = 0, **more: Any) -> list[Any]:
        report = TrainReport(accounts={**NO_COUNTS, "received": received, "late": late}, **more)
        with capture_logs() as said:
            self.watch.look(report, draws=draws)
        self.now += 60
        return said


def test_takes_without_any_exposure_are_warned_of_with_what_to_do() -> None:
    watched = Watched()
    assert watched.look(kinds={"click": 999}) == []
    (said,) = watched.look(kinds={"click": 900, "purchase": 100})
    assert said["event"] == "train.no_exposures" and said["takes"] == 1000
    assert "MIM_TRAINER__DRAW_EXPOSURES" in said["do"] and "exposure_id" in said["do"]
    assert watched.look(kinds={"click": 5000}, draws=True) == []
    assert watched.look(kinds={"click": 5000, "exposure": 1}) == []


def test_a_high_share_of_late_events_is_warned_of_with_partitions_and_a_sample() -> None:
    watched = Watched()
    assert watched.look(received=100_000, late=900) == []
    (said,) = watched.look(received=101_000, late=1_100, late_by_partition={3: 1_100})
    assert (said["event"], said["late"], said["read"]) == ("train.late_events", 200, 1_000)
    assert said["by_partition"] == {3: 1_100} and "MIM_TRAINER__LATENESS_SECONDS" in said["do"]
    assert watched.look(received=102_000, late=1_100) == []


def test_the_same_is_not_said_again_within_the_interval() -> None:
    watched = Watched()
    assert watched.look(kinds={"click": 5000})
    watched.now -= 30
    assert watched.look(kinds={"click": 5000}) == []


async def test_a_run_over_takes_alone_says_in_its_report_what_came(tmp_path: Any) -> None:
    log = [behaviour(f"t{n}", "click", user=f"u{n % 3}", item=f"i{n % 5}", second=n) for n in range(20)]
    log.append(behaviour("old", "click", item="i1", second=-500))
    with capture_logs() as said:
        report = await trained(make_loop(ListedInput(vectors(*ALL), list(log)), clock=lambda: 1e9))
    assert report.kinds == {"click": 20} and report.rows_trained == 0
    assert report.late_by_partition == {0: 1}
    (late,) = report.late_events
    assert (late.event_id, late.offset, late.behind_seconds) == ("old", 20, 519)
    assert not [line for line in said if line["event"] == "train.no_exposures"]  # too few to say so


def test_late_events_are_counted_over_a_restart_and_the_sample_is_bounded() -> None:
    trainer = make_trainer(small_config(lateness_seconds=5))
    log = [behaviour("t", "click", second=100), *(behaviour(f"old{n}", second=n) for n in range(50))]
    observe_all(trainer, log)
    again = make_trainer(small_config(lateness_seconds=5))
    again.restore(through_bytes(trainer.snapshot()))
    assert again.intake.late.by_partition == {0: 50} and again.intake.kinds == {"click": 1}
    assert [event.event_id for event in trainer.intake.late.newest] == [f"old{n}" for n in range(30, 50)]


@pytest.mark.parametrize(
    ("received", "late", "told"),
    [(100, 99, False), (100, 100, True), (10_000, 100, False), (9_999, 100, True), (50_000, 501, True)],
)
def test_late_events_are_told_from_a_hundred_on_where_they_are_above_a_hundredth(
    received: int, late: int, told: bool
) -> None:
    watched = Watched()
    newest = [LateEvent(0, n, f"e{n}", 1.0, 9.0) for n in range(5)]
    said = watched.look(received=received, late=late, late_events=newest)
    assert [line["event"] for line in said] == ["train.late_events"] * told
    assert not told or [one["event_id"] for one in said[0]["newest"]] == ["e2", "e3", "e4"]


@pytest.mark.parametrize(
    ("kinds", "draws", "told"),
    [
        ({}, False, None),
        ({"click": 1}, False, "no exposure"),
        ({"click": 1}, True, None),
        ({"exposure": 999}, False, None),
        ({"exposure": 1_000}, True, "no take"),
        ({"exposure": 1_000, "purchase": 1}, False, None),
    ],
)
def test_a_sample_is_judged_by_its_kinds(kinds: dict[str, int], draws: bool, told: str | None) -> None:
    problem = click_log_problem(kinds, draws=draws)
    assert (problem is None) if told is None else told in (problem or "")
