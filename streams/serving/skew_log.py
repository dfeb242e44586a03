"""Logs some of the rows that are scored, for a trainer that compares their features with its own.

Rows are logged where the trainer keeps the state that they were computed from; a record names no user.
"""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random

import numpy as np
import structlog
from numpy.typing import NDArray

from schemas.errors import Misconfigured, Unavailable
from schemas.item_states import StateHead
from schemas.skew import ServedRows, SkewRecord
from streams.broker.clients import BrokerConfig, broker_errors, make_producer
from streams.broker.cluster import describe_topics
from streams.broker.topics import TopicsConfig
from streams.runtime.interval import IntervalTimer

log = structlog.get_logger()

_ROWS = 4
"""Rows of a request that are logged at most."""
_SHORTEST_SECONDS = 0.1
"""Between two requests that are logged."""
_WAITING = 100
_RETRY_SECONDS, _REFUSED_SECONDS = 5.0, 60.0


class SkewLog:
    """Sampled rows on their way to the topic `skew`; while the broker is away the oldest are dropped."""

    def __init__(
        self,
        features: str,
        *,
        share: float,
        broker: BrokerConfig,
        topics: TopicsConfig,
        seed: int,
        clock: Callable[[], float],
    ) -> None:
        """`features` is the version of the feature set, `share` that of requests that are logged."""
        self._features = features
        self._share = share
        self._broker = broker
        self._topics = topics
        self._rng = Random(seed)
        self._pause = IntervalTimer(_SHORTEST_SECONDS, clock)
        self._came = asyncio.Event()
        self.waiting: deque[bytes] = deque(maxlen=_WAITING)
        """Records that are not sent yet."""

    def chooses(self, head: StateHead | None) -> bool:
        """Whether rows of a request that was scored at this state are to be logged."""
        return head is not None and self._rng.random() < self._share and self._pause.passed

    def put(
        self,
        release_id: str,
        head: StateHead,
        now: int,
        targets: Sequence[str],
        history: Sequence[str],
        history_seconds: Sequence[int],
        values_BF: NDArray[np.float32],
        probabilities_B: NDArray[np.float64],
        *,
        held_B: NDArray[np.bool_],
        query: str | None = None,
    ) -> None:
        """Log some of the rows of a request; `values_BF` are the features alone, oldest history first.

        Only rows of items that are `held`: of others the trainer may know more by the time that it compares.
        """
        held = np.flatnonzero(held_B).tolist()
        if not held:
            return
        self._pause.begin()
        places = sorted(self._rng.sample(held, min(_ROWS, len(held))))
        served = ServedRows(
            release_id=release_id,
            number=head.number,
            before=head.before,
            now=now,
            targets=[targets[place] for place in places],
            history=list(history),
            history_seconds=list(history_seconds),
            query=query,
            values=base64.b64encode(np.ascontiguousarray(values_BF[places], "<f4").tobytes()),
            probabilities=probabilities_B[places].tolist(),
        )
        self.waiting.append(SkewRecord(features=self._features, served=served).model_dump_json().encode())
        self._came.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Send until `stop` is set. A topic that does not exist, or is refused, is told and costs no score."""
        if not self._share:
            await stop.wait()  # nothing comes, and a login may lack the right
        while not stop.is_set():
            try:
                await asyncio.to_thread(describe_topics, self._broker, self._topics, ["skew"])
                await self._send(stop)
            except (Unavailable, Misconfigured) as error:
                refused = isinstance(error, Misconfigured)
                (log.error if refused else log.warning)("serve.skew_not_logged", error=str(error))
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), _REFUSED_SECONDS if refused else _RETRY_SECONDS)

    async def _send(self, stop: asyncio.Event) -> None:
        producer = make_producer(self._broker)
        with broker_errors(self._broker):
            await producer.start()
        try:
            while not stop.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._came.wait(), 1.0)
                self._came.clear()
                while self.waiting:
                    with broker_errors(self._broker):
                        await producer.send_and_wait(self._topics.full_name("skew"), self.waiting[0], key=b"rows")
                    self.waiting.popleft()
        finally:
            with suppress(Unavailable, Misconfigured), broker_errors(self._broker):
                await producer.stop()
