"""A steady stream of score requests, as a page of recommendations would send them."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from schemas.errors import PipelineError
from streams.demo.api import ServeApi


@dataclass
class LoadReport:
    """What was asked and answered."""

    requests: int = 0
    failures: list[str] = field(default_factory=list)
    """What went wrong, one entry per failed request."""
    latency_ms: list[float] = field(default_factory=list)
    weights: dict[str, int] = field(default_factory=dict)
    """`weights_sha256` -> answers made with it."""
    seconds: float = 0.0
    """From the first request to the last."""
    searches: Counter[str] = field(default_factory=Counter)
    """How what was searched entered the answers (`ScoreResponse.query`)."""

    @property
    def per_second(self) -> float:
        """Requests sent per second."""
        return self.requests / self.seconds if self.seconds > 0 else 0.0


class SteadyLoad:
    """Sends requests at a fixed rate whatever the answers take, each for a random user and random published items."""

    def __init__(
        self,
        api: ServeApi,
        *,
        users: Sequence[str],
        published: Sequence[str],
        per_second: float,
        candidates: int,
        seed: int,
        searches: Sequence[str] = (),
        reached: Callable[[], int | None] = lambda: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`published` may grow while the load runs; with `searches` each request says one. `reached` tells the event
        time of the newest record, which is the moment of each request: by the wall clock all of a log of the past is
        long ago.
        """
        self.report = LoadReport()
        self._api = api
        self._users = users
        self._published = published
        self._interval = 1.0 / per_second
        self._candidates = candidates
        self._searches = searches
        self._random = random.Random(seed)
        self._reached = reached
        self._monotonic = monotonic

    async def run(self, stop: asyncio.Event) -> LoadReport:
        """Wait until the server can score, then send until `stop` is set; every request sent is answered or failed."""
        while not await self._api.ready():
            if stop.is_set():
                return self.report
            await asyncio.sleep(0.2)
        started = self._monotonic()
        async with asyncio.TaskGroup() as requests:
            while not stop.is_set():
                due = started + self.report.requests * self._interval
                await asyncio.sleep(max(0.0, due - self._monotonic()))
                self.report.requests += 1
                requests.create_task(self._ask())
                self.report.seconds = self._monotonic() - started
        return self.report

    async def _ask(self) -> None:
        count = min(self._candidates, len(self._published))
        item_ids = list(dict.fromkeys(self._random.choices(self._published, k=count)))
        sent = self._monotonic()
        try:
            user, searched = self._random.choice(self._users), None
            if self._searches:
                searched = self._random.choice(self._searches)
            answer = await self._api.score(user, item_ids, at=self._reached(), query_text=searched)
        except PipelineError as error:
            self.report.failures.append(str(error))
            return
        self.report.latency_ms.append(1000 * (self._monotonic() - sent))
        if [score.item_id for score in answer.scores] != item_ids:
            self.report.failures.append("the answer does not list the candidates in order")
        elif any(score.probability is None for score in answer.scores):
            self.report.failures.append("the answer lacks probabilities")
        if answer.query is not None:
            self.report.searches[answer.query] += 1
        self.report.weights[answer.weights_sha256] = self.report.weights.get(answer.weights_sha256, 0) + 1
