"""The Faust agent that encodes what users search for, so that the trainer's rows can see it.

```text
behaviours ──> searches ──> new ones, once each ──> prepare, encode ──> queries ──> acknowledge
                   └──> announced not long ago ─────────────────────────────────────────┘
```

The vector of a query depends on its words and its photo alone: announced twice, by two workers or again after a crash,
it has the same key and the same vector. So no order has to be kept, no lock is taken, and what is remembered can be
lost.
"""

from __future__ import annotations

import asyncio
import base64
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import structlog
from faust.types import EventT, StreamT
from numpy.typing import NDArray

from encoders.base import Prepared
from schemas.errors import BadMessage, EncodingFailed, Reason, Unprocessable
from schemas.field_maps import FieldMap
from schemas.queries import QueryEmbedding, query_id
from streams.broker.records import SourceRecord, read_behaviour_of
from streams.broker.topics import QUERY_REPEAT_HOURS
from streams.indexing.agents import IsCurrent, Report, as_record
from streams.indexing.config import QueryReport
from streams.indexing.context import Guard, IndexContext
from streams.indexing.flow import Flow
from streams.runtime.delivery import deliver, retry_until_available
from streams.stores.vectors.item_index import UNIT_TOLERANCE

log = structlog.get_logger()

_PASS = 16
"""Queries that are prepared and encoded together: items wait for the threads no longer than one such pass takes."""
_REASON_CHARACTERS = 2_000


@dataclass(frozen=True, slots=True)
class Search:
    """A query, as the event at this place has it."""

    query: str
    text: str | None = field(repr=False)
    image: bytes | None = field(repr=False)
    partition: int
    offset: int


def searches_of(records: Sequence[SourceRecord], *, max_bytes: int, field_map: FieldMap) -> list[Search]:
    """What these records of `behaviours` say was searched. Broken ones are passed over: the recorder buries them."""
    found: list[Search] = []
    for record in records:
        try:
            behaviour = read_behaviour_of(record, max_bytes=max_bytes, field_map=field_map)
        except BadMessage:
            continue
        text, image = behaviour.query_text, behaviour.query_image
        if (query := query_id(text, image)) is not None:
            found.append(Search(query, text, image, record.partition, record.offset))
    return found


class AnnouncedQueries:
    """The `most` queries that were searched last, of those that were announced within `QUERY_REPEAT_HOURS`.

    The topic forgets a record with age, so what is searched again and again is announced again and again.
    """

    def __init__(self, most: int, now: Callable[[], datetime]) -> None:
        self._most = most
        self._now = now
        self._announced_at: OrderedDict[str, datetime] = OrderedDict()

    def __len__(self) -> int:
        return len(self._announced_at)

    def knows(self, query: str) -> bool:
        """Whether the query need not be announced; it counts as searched."""
        at = self._announced_at.get(query)
        if at is None or self._now() - at >= timedelta(hours=QUERY_REPEAT_HOURS):
            return False
        self._announced_at.move_to_end(query)
        return True

    def add(self, queries: Iterable[str]) -> None:
        """Remember queries that the broker has now."""
        now = self._now()
        for query in queries:
            self._announced_at[query] = now
            self._announced_at.move_to_end(query)
        while len(self._announced_at) > self._most:
            self._announced_at.popitem(last=False)


@dataclass(eq=False)
class QueryAnnouncer:
    """Handles `behaviours`, one batch after another: one pass of queries is encoded at a time, beside the items'."""

    context: IndexContext
    flow: Flow
    is_current: IsCurrent
    on_report: Report
    stream: StreamT[bytes]

    def __post_init__(self) -> None:
        self._announced = AnnouncedQueries(self.context.config.remembered_queries, self.context.now)

    async def run(self) -> None:
        """Read until cancelled."""
        config = self.context.config
        async for events in self.stream.noack_take(config.batch_max_items, within=config.batch_within_seconds):
            epoch = self.flow.epoch
            async with self.flow.hand(epoch):
                await self._handle(events, self.flow.guard(epoch))

    async def _handle(self, events: Sequence[EventT[Any]], guard: Guard) -> None:
        """Announce what is new, then acknowledge what of the batch is current; the rest is read again."""
        records = [as_record(event, "behaviours") for event in events]
        searches = await asyncio.to_thread(
            searches_of, records, max_bytes=self.context.max_record_bytes, field_map=self.context.behaviours_map
        )
        new: dict[str, Search] = {}
        for one in searches:
            if not self._announced.knows(one.query):
                new.setdefault(one.query, one)
        report = QueryReport(known=len(searches) - len(new))
        if new:
            embeddings = await encode_searches(self.context, list(new.values()))
            await self._announce(embeddings, guard)
            self._announced.add(one.query for one in embeddings)
            refused = sum(one.vector is None for one in embeddings)
            report = QueryReport(known=report.known, refused=refused, encoded=len(embeddings) - refused)
            log.info("queries.announced", events=len(events), encoded=report.encoded, refused=refused)
        self.on_report(report)
        for event in events:
            if self.is_current(event):
                await self.stream.ack(event)

    async def _announce(self, embeddings: Sequence[QueryEmbedding], guard: Guard) -> None:
        async def once() -> None:
            await guard()
            await self.context.outbox.announce_queries(embeddings)

        await retry_until_available(once, what="queries.announce", patience=self.context.patience)


async def encode_searches(context: IndexContext, searches: Sequence[Search]) -> list[QueryEmbedding]:
    """A record for each; without a vector for one that cannot be encoded. Waits while the encoder is unavailable."""
    vectors: dict[str, NDArray[np.float32]] = {}
    refusals: dict[str, Unprocessable] = {}

    async def write(part: Sequence[tuple[Search, Prepared]]) -> None:
        encoded = await context.encoding.encode_queries([prepared for _, prepared in part])
        vectors.update({search.query: vector for (search, _), vector in zip(part, encoded, strict=True)})

    async def refuse(one: tuple[Search, Prepared], error: Unprocessable) -> None:
        refusals[one[0].query] = error

    for start in range(0, len(searches), _PASS):
        some = searches[start : start + _PASS]
        prepared = await asyncio.gather(*(context.encoding.prepare_query(one.text, one.image) for one in some))
        ready: list[tuple[Search, Prepared]] = []
        for search, content in zip(some, prepared, strict=True):
            if isinstance(content, EncodingFailed):
                refusals[search.query] = content
            else:
                ready.append((search, content))
        await deliver(ready, write=write, quarantine=refuse, what="queries.encode", patience=context.patience)
    return [_embedding(context, one, vectors, refusals) for one in searches]


def _embedding(
    context: IndexContext,
    search: Search,
    vectors: Mapping[str, NDArray[np.float32]],
    refusals: Mapping[str, Unprocessable],
) -> QueryEmbedding:
    vector, error = vectors.get(search.query), refusals.get(search.query)
    if vector is not None and not abs(np.linalg.norm(vector.astype(np.float64)) - 1.0) <= UNIT_TOLERANCE:  # or NaN
        error = EncodingFailed(Reason.BAD_VECTOR, "its vector is not of length 1")
    if error is not None:
        log.warning(
            "query.refused",
            query=search.query,
            partition=search.partition,
            offset=search.offset,
            error=str(error),
            effect="rows of this search are trained as if nothing had been searched",
        )
    vector_bytes = None if vector is None else np.ascontiguousarray(vector, dtype="<f4").tobytes()
    return QueryEmbedding(
        query=search.query,
        encoder_version=context.encoding.version,
        vector=None if vector_bytes is None or error is not None else base64.b64encode(vector_bytes),
        dim=context.encoding.dim,
        reason=None if error is None else str(error)[:_REASON_CHARACTERS],
    )
