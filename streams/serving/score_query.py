"""The search of a scored request: had beside the other look-ups, within its time, and put behind the items."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import structlog

from schemas.errors import Misconfigured, Reason, Unprocessable
from schemas.queries import query_id
from schemas.scoring import QueryUse, ScoreRequest
from streams.serving.query_vectors import QueryVectors, Vector, is_refused
from trainer.networks.item_rows import ItemRows
from trainer.samples.item_facts import FactRows
from trainer.samples.searches import query_item

log = structlog.get_logger()


@dataclass(frozen=True, eq=False)
class ScoreQuery:
    """A search, and how it enters the scores."""

    use: QueryUse | None = None
    """None where nothing was searched."""
    query: str = ""
    """Its `QueryId`."""
    text: str | None = None
    vector: Vector | None = None
    """Where it is used."""

    @property
    def used(self) -> str | None:
        """The `QueryId` of a search that is used; None for others."""
        return None if self.vector is None else self.query

    def behind(self, items: ItemRows, facts: FactRows) -> tuple[ItemRows, FactRows]:
        """The rows of a request, with the search as the last where it is used."""
        if self.vector is None:
            return items, facts
        return items.with_row(query_item(self.query), self.vector), facts.with_unknown()


NO_QUERY = ScoreQuery()


class ScoreQueries:
    """Searches of scores. A score waits for the vector of its search up to a deadline, and no longer."""

    def __init__(self, vectors: QueryVectors, deadline_seconds: float) -> None:
        self.vectors = vectors
        self._deadline_seconds = deadline_seconds
        self._missed_encoder = False

    def begin(self, asked: ScoreRequest, *, reads_queries: bool) -> PendingQuery:
        """Have the vector made while the request goes on."""
        query = query_id(asked.query_text, asked.query_image)
        if query is None:
            return PendingQuery(self, NO_QUERY)
        if not reads_queries:
            return PendingQuery(self, ScoreQuery("not_read"))
        wanted = ScoreQuery("not_in_time", query, asked.query_text)
        found = self.vectors.begin(asked.query_text, asked.query_image)
        if found is None:
            self.vectors.report("not_in_time")
            return PendingQuery(self, wanted)
        if not isinstance(found, asyncio.Task):
            return PendingQuery(self, replace(wanted, use="used", vector=found))
        return PendingQuery(self, wanted, found, asyncio.get_running_loop().time() + self._deadline_seconds)

    def no_encoder(self, error: Misconfigured) -> ScoreQuery:
        """Note, and log once, that this server cannot encode what was searched."""
        if not self._missed_encoder:
            self._missed_encoder = True
            log.error("serve.no_query_encoder", error=str(error))
        return ScoreQuery("no_encoder")


class PendingQuery:
    """The search of one request, perhaps still being encoded."""

    def __init__(
        self, queries: ScoreQueries, wanted: ScoreQuery, task: asyncio.Task[Vector] | None = None, until: float = 0.0
    ) -> None:
        """`until` is the deadline, in seconds of the loop's clock."""
        self._queries = queries
        self._wanted = wanted
        self._task = task
        self._until = until

    async def had(self) -> ScoreQuery:
        """The search as it enters the scores, at the deadline at the latest.

        Raises `Unprocessable` for what cannot be encoded, as a picture that is broken or too large.
        """
        task = self._task
        if task is None:
            return self._wanted
        if not task.done():
            left = self._until - asyncio.get_running_loop().time()
            if left > 0:
                await asyncio.wait((task,), timeout=left)
            if not task.done():
                self._queries.vectors.report("not_in_time")
                return self._wanted
        try:
            return replace(self._wanted, use="used", vector=task.result())
        except Misconfigured as error:
            return self._queries.no_encoder(error)
        except Unprocessable as error:
            if not is_refused(error):
                return ScoreQuery("no_encoder")
            if error.reason is Reason.NO_CONTENT:
                return NO_QUERY  # not a word in it
            raise
        except Exception:  # logged where it happened: a score is possible without
            return ScoreQuery("no_encoder")
