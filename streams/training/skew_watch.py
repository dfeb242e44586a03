"""Compares what servers computed with the trainer's own features, at one version of the state after the other.

Once in a while the state is kept as it is at a write for servers (`FeatureState.hold`), and the write says so. Servers
log some of the rows that they score from exactly that state to the topic `skew`; before the next state is kept, their
features are computed again here. Between a server and a trainer lie the topic of states, the center's rows of items and
two installations of this program: a difference says that a release answers from other numbers than it learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import ValidationError

from schemas.errors import Unavailable
from schemas.item_states import StateHead
from schemas.skew import ServedRows, SkewOutcome, SkewRecord
from streams.broker.topic_follower import HandleRecords, TopicFollower
from streams.runtime.interval import IntervalTimer
from streams.training.reports import SkewReport
from trainer.features.config import FeatureConfig

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.online.trainer import OnlineTrainer

log = structlog.get_logger()

_MOST_REQUESTS = 500
"""Requests whose rows are kept until they are compared."""
_POLL_SECONDS = 1.0


class SkewWatch:
    """Call `poll` now and then; `compare` before a state is kept that `begin` is then told of."""

    def __init__(
        self,
        config: FeatureConfig,
        *,
        every_seconds: float,
        limit: float,
        topic: str,
        clock: Callable[[], float],
        on_report: Callable[[SkewReport], None],
        follow: Callable[[HandleRecords], TopicFollower],
    ) -> None:
        """`limit` is the share of differing rows above which an error is logged; `follow` makes the topic's reader."""
        self._config = config
        self._limit = limit
        self._topic = topic
        self._clock = clock
        self._on_report = on_report
        self._timer = IntervalTimer(every_seconds, clock)
        self._poll = IntervalTimer(_POLL_SECONDS, clock)
        self._head: StateHead | None = None
        self._requests: list[ServedRows] = []
        self._follower = follow(self._handle)

    @property
    def due(self) -> bool:
        """Whether it is time to compare, and to keep another state."""
        return self._timer.passed

    def begin(self, head: StateHead) -> None:
        """The state of this write is kept."""
        self._head, self._requests = head, []
        self._timer.begin()

    def hear(self, value: bytes | None) -> None:
        """Note a record of the topic, if it is of the state that is kept."""
        try:
            record = SkewRecord.model_validate_json(value or b"")
        except ValidationError as error:
            log.warning("train.skew_unreadable", error=str(error)[:500])
            return
        served, head = record.served, self._head
        if served is None or record.features != self._config.version:
            return
        expected = 4 * len(served.targets) * len(self._config.names)
        if len(served.values) != expected:
            log.warning("train.skew_unreadable", error=f"values of {len(served.values)} bytes, not of {expected}")
            return
        if head is None or (served.number, served.before) != (head.number, head.before):
            return
        if len(self._requests) < _MOST_REQUESTS:
            self._requests.append(served)

    def compare(self, trainer: OnlineTrainer) -> tuple[str, bytes, bytes] | None:
        """The outcome for all rows so far, as a record; None without rows. In the trainer's thread."""
        from trainer.features.skew import TOLERANCE, Skew  # numpy

        if self._head is None or not self._requests or trainer.moment.held_before != self._head.before:
            return None
        requests, self._requests = self._requests, []
        skew = Skew()
        for served in requests:
            try:
                skew.add(self._config, served, trainer.held_states)
            except ValueError as error:
                log.warning("train.skew_unreadable", error=str(error)[:500])
        outcome = SkewOutcome(
            number=self._head.number,
            releases=sorted({served.release_id for served in requests}),
            rows=skew.rows,
            differing=skew.differing,
            tolerance=TOLERANCE,
            largest=skew.largest,
            compared_at=datetime.fromtimestamp(self._clock(), UTC),
        )
        self._on_report(SkewReport(skew.rows, skew.differing))
        if skew.differing > self._limit * skew.rows:
            worst = dict(sorted(skew.largest.items(), key=lambda one: -one[1])[:5])
            log.error("train.skew", rows=skew.rows, differing=skew.differing, largest=worst, releases=outcome.releases)
        record = SkewRecord(features=self._config.version, outcome=outcome)
        return self._topic, b"outcome", record.model_dump_json().encode()

    # ---- the topic -----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Read from the end of the topic on. Raises as `TopicFollower.open` does."""
        await self._follower.open(since=datetime.fromtimestamp(self._clock(), UTC))

    async def poll(self) -> None:
        """Read what servers logged meanwhile."""
        if not self._poll.passed:
            return
        self._poll.begin()
        try:
            await self._follower.poll(wait_seconds=0)
        except Unavailable as error:
            log.warning("train.broker_away", error=str(error))

    async def close(self) -> None:
        """Disconnect."""
        await self._follower.close()

    async def _handle(self, records: Sequence[Any], source: str, after: int) -> None:
        for record in records:
            self.hear(record.value)
