"""What the trainer says about a click log that it cannot learn from, or learns less from than people think."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import structlog

from schemas.behaviours import BehaviourKind
from streams.runtime.interval import IntervalTimer
from streams.training.reports import TrainReport

log = structlog.get_logger()

_TAKES_WITHOUT_EXPOSURE = 1_000
_EXPOSURES_WITHOUT_TAKE = 1_000
_LATE_EVENTS = 100
_LATE_SHARE = 0.01

NO_EXPOSURES = (
    "training rows are made of exposures: send an event of kind 'exposure' for each item that is shown, with its id as "
    "'exposure_id' of the takes that answer it; or set MIM_TRAINER__DRAW_EXPOSURES=4 to have exposures drawn from what "
    "others take around then"
)
LATE = (
    "an event counts while it lies at most MIM_TRAINER__LATENESS_SECONDS behind the newest of its partition: raise it "
    "if devices send late; history that is loaded behind live events belongs into new topics, oldest first "
    "(deploy/README.md, 'Loading history')"
)


class ClickLogWatch:
    """Looks at what was read since the look before, once an interval."""

    def __init__(self, timer: IntervalTimer) -> None:
        self._timer = timer
        self._read = self._late = 0

    def look(self, report: TrainReport, *, draws: bool) -> None:
        """Say what is wrong, if anything; `draws` says that exposures are drawn where the log has none."""
        if not self._timer.passed:
            return
        self._timer.begin()
        exposures = report.kinds.get(BehaviourKind.EXPOSURE, 0)
        takes = sum(report.kinds.values()) - exposures
        if not draws and not exposures and takes >= _TAKES_WITHOUT_EXPOSURE:
            log.warning("train.no_exposures", takes=takes, rows=report.rows_trained, do=NO_EXPOSURES)
        read, late = report.accounts["received"], report.accounts["late"]
        since_read, since_late = read - self._read, late - self._late
        self._read, self._late = read, late
        if since_late >= _LATE_EVENTS and since_late > _LATE_SHARE * since_read:
            log.warning(
                "train.late_events",
                late=since_late,
                read=since_read,
                by_partition=dict(report.late_by_partition),
                newest=[asdict(event) for event in report.late_events][-3:],
                do=LATE,
            )


def click_log_problem(kinds: Mapping[str, int], *, draws: bool) -> str | None:
    """What keeps a trainer from learning from a sample of the log, given its events by kind; None if nothing does."""
    exposures = kinds.get(BehaviourKind.EXPOSURE, 0)
    takes = sum(kinds.values()) - exposures
    if takes and not exposures and not draws:
        return "takes and no exposure: no training row can be made of that"
    if exposures >= _EXPOSURES_WITHOUT_TAKE and not takes:
        return "exposures and no take: every training row would be one that was not taken"
    return None
