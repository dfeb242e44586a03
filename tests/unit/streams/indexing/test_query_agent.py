"""What users search for, encoded once each: the agent on its local channel, with everything around it in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from structlog.testing import capture_logs

from encoders.base import Prepared, query_content
from schemas.errors import BrokerUnavailable, Fenced
from schemas.queries import QueryEmbedding, query_id
from streams.broker.records import SourceRecord
from streams.broker.topics import QUERY_REPEAT_HOURS
from streams.indexing import query_agent
from streams.indexing.config import IndexConfig, QueryReport
from streams.indexing.query_agent import AnnouncedQueries, Search, encode_searches, searches_of
from tests.factories.item_path import NOW, VERSION, CountingEncoder, ItemPath, b64, picture
from tests.factories.running_agent import Running, running

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class QueryEncoder(CountingEncoder):
    """Its queries are not its items. Fails for `poison`, and for everything as long as `dead` is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[int] = []
        self.poison: set[bytes] = set()
        self.dead = 0

    def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        if self.dead > 0:
            self.dead -= 1
            raise RuntimeError("the device is gone")
        return super().encode(batch)

    def encode_queries(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        self.passes.append(len(batch))
        if self.dead > 0:
            raise RuntimeError("the device is gone")
        if self.poison & {one.address for one in batch}:
            raise RuntimeError("out of memory")
        return -super().encode(batch)

    @property
    def asked(self) -> int:
        """Queries that were to be encoded."""
        return sum(self.passes)


@pytest.fixture
def encoder() -> QueryEncoder:
    return QueryEncoder()


@pytest.fixture
def path(encoder: QueryEncoder) -> ItemPath:
    return ItemPath(config=IndexConfig(batch_within_seconds=0.05), encoder=encoder)


def behaviour(number: int, text: str | None = None, image: bytes | None = None) -> dict[str, Any]:
    fields = {"event_id": f"e{number}", "kind": "exposure", "user_id": "u", "item_id": "i"}
    if text is not None:
        fields["query_text"] = text
    if image is not None:
        fields["query_image"] = b64(image)
    return {**fields, "occurred_at": (NOW - timedelta(hours=1)).isoformat()}


@asynccontextmanager
async def reading(path: ItemPath, folder: Path, **more: Any) -> AsyncIterator[Running]:
    async with running("behaviours", path, folder, **more) as run:
        yield run


async def search(run: Running, *texts: str | None) -> None:
    """Behaviours with these searches, read to the end."""
    done = len(run.acked) + len(texts)
    for number, text in enumerate(texts):
        await run.put("u", behaviour(number, text), wait=False)
    await run.until(lambda: len(run.acked) >= done)


def counted(run: Running) -> tuple[int, int, int]:
    reports = [one for one in run.reports if isinstance(one, QueryReport)]
    return sum(r.known for r in reports), sum(r.encoded for r in reports), sum(r.refused for r in reports)


def vector(announced: QueryEmbedding) -> NDArray[np.float32]:
    assert announced.vector is not None
    return np.frombuffer(announced.vector, "<f4")


# ---- once each -------------------------------------------------------------------------------------------------------


async def test_each_distinct_query_is_encoded_once_and_announced_as_a_query(
    path: ItemPath, encoder: QueryEncoder, tmp_path: Path
) -> None:
    async with reading(path, tmp_path) as run:
        await search(run, "red lamp", None, "blue lamp", "red  lamp ", "red lamp")
        await search(run, "red lamp", "green lamp")
    texts = ["red lamp", "blue lamp", "green lamp"]
    assert [one.query for one in path.outbox.queries] == [query_id(text, None) for text in texts]
    for text, announced in zip(texts, path.outbox.queries, strict=True):
        (as_item,) = CountingEncoder().encode([encoder.prepare(query_content(text, None))])
        assert np.array_equal(vector(announced), -as_item) and announced.encoder_version == VERSION
        assert announced.dim == len(as_item) and announced.reason is None
    assert encoder.asked == 3 and counted(run) == (3, 3, 0)
    assert run.acked == [(0, n) for n in range(7)]


async def test_a_query_of_words_and_a_photo_is_another_one(path: ItemPath, tmp_path: Path) -> None:
    photo = picture("blue")
    async with reading(path, tmp_path) as run:
        for number, (text, image) in enumerate([("lamp", None), (None, photo), ("lamp", photo), (None, photo)]):
            await run.put("u", behaviour(number, text, image), wait=False)
        await run.until(lambda: len(run.acked) == 4)
    pairs = [("lamp", None), (None, photo), ("lamp", photo)]
    assert [one.query for one in path.outbox.queries] == [query_id(*pair) for pair in pairs]
    assert len({one.vector for one in path.outbox.queries}) == 3


async def test_a_batch_in_which_nothing_is_new_costs_nothing(
    path: ItemPath, encoder: QueryEncoder, tmp_path: Path
) -> None:
    held: list[bool] = []

    async def check() -> None:
        held.append(True)

    async with reading(path, tmp_path, check_role=check) as run:
        await search(run, "lamp")
        asked, held[:] = (encoder.asked, len(encoder.prices)), []
        path.outbox.__dict__["announce_queries"] = None  # a call would be an error
        await search(run, "lamp", None, "lamp")
        assert not run.flow.failed.done()
    assert (encoder.asked, len(encoder.prices)) == asked and held == [] and len(run.acked) == 4


async def test_records_that_cannot_be_read_are_acknowledged_and_buried_by_another(
    path: ItemPath, tmp_path: Path
) -> None:
    async with reading(path, tmp_path) as run:
        for key, value in (("u", b"{"), (None, behaviour(1, "a")), ("other", behaviour(2, "b")), ("u", None)):
            await run.put(key, value, wait=False)
        await search(run, "lamp")
        await run.until(lambda: len(run.acked) == 5)
    assert [one.query for one in path.outbox.queries] == [query_id("lamp", None)]
    assert path.dead_letters.letters == []


def test_a_platforms_own_names_are_read_by_its_map() -> None:
    theirs = {"id": "e", "what": "click", "who": "u", "sku": "i", "at": NOW.isoformat(), "search": {"q": "lamp"}}
    names = {"event_id": "id", "kind": "what", "user_id": "who", "item_id": "sku", "occurred_at": "at"}
    record = SourceRecord("behaviours", 3, 8, int(NOW.timestamp() * 1000), b"u", json.dumps(theirs).encode())
    (found,) = searches_of([record], max_bytes=10_000, field_map={**names, "query_text": "search.q"})
    assert (found.query, found.partition, found.offset) == (query_id("lamp", None), 3, 8)
    assert "lamp" not in repr(found)
    assert searches_of([record], max_bytes=10_000, field_map={}) == []


# ---- acknowledge after the write -------------------------------------------------------------------------------------


async def test_nothing_is_acknowledged_before_it_is_announced(path: ItemPath, tmp_path: Path) -> None:
    may, begun = asyncio.Event(), asyncio.Event()
    announce = path.outbox.announce_queries

    async def slow(queries: Sequence[QueryEmbedding]) -> None:
        begun.set()
        await may.wait()
        await announce(queries)

    path.outbox.announce_queries = slow  # type: ignore[method-assign]
    async with reading(path, tmp_path) as run:
        await run.put("u", behaviour(0, "lamp"), wait=False)
        await run.put("u", behaviour(1), wait=False)
        await asyncio.wait_for(begun.wait(), 10)
        await asyncio.sleep(0.2)
        assert run.acked == []
        may.set()
        await run.until(lambda: len(run.acked) == 2)
    assert len(path.outbox.queries) == 1


async def test_a_broker_that_is_away_is_asked_again_and_meanwhile_nothing_is_acknowledged_or_known(
    path: ItemPath, encoder: QueryEncoder, tmp_path: Path
) -> None:
    announce, failures = path.outbox.announce_queries, 3
    acked: list[int] = []

    async def away(queries: Sequence[QueryEmbedding]) -> None:
        nonlocal failures
        acked.append(len(run.acked))
        if failures:
            failures -= 1
            raise BrokerUnavailable("Kafka", "away")
        await announce(queries)

    path.outbox.announce_queries = away  # type: ignore[method-assign]
    async with reading(path, tmp_path) as run:
        await search(run, "lamp")
        await search(run, "lamp")
    assert acked == [0] * 4 and len(path.outbox.queries) == 1 and encoder.asked == 1


async def test_partitions_that_move_meanwhile_leave_the_batch_to_be_read_again(path: ItemPath, tmp_path: Path) -> None:
    announce, moved = path.outbox.announce_queries, asyncio.Event()

    async def moving(queries: Sequence[QueryEmbedding]) -> None:
        if not moved.is_set():
            moved.set()
            run.flow.partitions_moved()
            raise BrokerUnavailable("Kafka", "a moment")
        await announce(queries)

    path.outbox.announce_queries = moving  # type: ignore[method-assign]
    async with reading(path, tmp_path) as run:
        await run.put("u", behaviour(0, "lamp"), wait=False)
        await asyncio.wait_for(moved.wait(), 10)
        await run.put("u", behaviour(1, "lamp"), wait=False)
        await run.until(lambda: bool(run.acked))
        assert not run.flow.failed.done()
    assert run.acked == [(0, 1)] and len(path.outbox.queries) == 1


async def test_events_of_an_earlier_assignment_are_not_acknowledged(path: ItemPath, tmp_path: Path) -> None:
    async with reading(path, tmp_path, is_current=lambda event: event.message.offset != 0) as run:
        for number in range(2):
            await run.put("u", behaviour(number, "lamp"), wait=False)
        await run.until(lambda: bool(run.acked))
    assert run.acked == [(0, 1)]


async def test_a_worker_that_lost_its_slot_announces_nothing_and_ends(path: ItemPath, tmp_path: Path) -> None:
    async def lost() -> None:
        raise Fenced("slot taken")

    async with reading(path, tmp_path, check_role=lost) as run:
        await run.put("u", behaviour(0, "lamp"), wait=False)
        await run.fails_with(Fenced)
    assert run.acked == [] and path.outbox.queries == []


async def test_an_unforeseen_error_stops_the_worker_and_acknowledges_nothing(
    path: ItemPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(query_agent, "searches_of", broken)
    async with reading(path, tmp_path) as run:
        await run.put("u", behaviour(0, "lamp"), wait=False)
        await run.fails_with(ZeroDivisionError)
    assert run.acked == []


async def test_a_clean_stop_waits_for_what_is_in_hand(path: ItemPath, tmp_path: Path) -> None:
    announce, begun = path.outbox.announce_queries, asyncio.Event()

    async def slow(queries: Sequence[QueryEmbedding]) -> None:
        begun.set()
        await asyncio.sleep(0.2)
        await announce(queries)

    path.outbox.announce_queries = slow  # type: ignore[method-assign]
    async with reading(path, tmp_path) as run:
        await run.put("u", behaviour(0, "lamp"), wait=False)
        await asyncio.wait_for(begun.wait(), 10)
        assert await run.flow.drain(10)
        assert run.acked == [(0, 0)]
        await run.put("u", behaviour(1, "table"), wait=False)
        await asyncio.sleep(0.3)
    assert run.acked == [(0, 0)] and len(path.outbox.queries) == 1


# ---- what cannot be encoded ------------------------------------------------------------------------------------------


async def test_a_query_that_cannot_be_encoded_is_announced_without_a_vector_and_told_once(
    path: ItemPath, encoder: QueryEncoder, tmp_path: Path
) -> None:
    encoder.poison.add(encoder.prepare(query_content("poison", None)).address)
    with capture_logs() as logs:
        async with reading(path, tmp_path) as run:
            await run.put("u", behaviour(0, "lamp"), wait=False)
            await run.put("u", behaviour(1, None, b"no picture"), wait=False)
            await run.put("u", behaviour(2, "poison"), wait=False)
            await run.put("u", behaviour(3, "table"), wait=False)
            await run.until(lambda: len(run.acked) == 4)
            await run.put("u", behaviour(4, None, b"no picture"), wait=False)
            await run.until(lambda: len(run.acked) == 5)
    reasons = {one.query: one.reason for one in path.outbox.queries if one.vector is None}
    assert reasons.keys() == {query_id(None, b"no picture"), query_id("poison", None)}
    assert "bad_image" in str(reasons[str(query_id(None, b"no picture"))])
    assert "encoder_failed" in str(reasons[str(query_id("poison", None))])
    assert {one.query for one in path.outbox.queries if one.vector is not None} == {
        query_id("lamp", None), query_id("table", None),
    }  # fmt: skip
    told = [line for line in logs if line["event"] == "query.refused"]
    assert {(line["partition"], line["offset"], line["log_level"]) for line in told} == {
        (0, 1, "warning"), (0, 2, "warning"),
    }  # fmt: skip
    assert len(told) == 2 and counted(run) == (1, 2, 2)


async def test_a_vector_that_is_none_is_announced_as_such(path: ItemPath, encoder: QueryEncoder) -> None:
    encoder.encode_queries = lambda batch: np.full((len(batch), encoder.dim), np.nan, np.float32)  # type: ignore[method-assign]
    (record,) = await encode_searches(path.context, [Search("0" * 32, "lamp", None, 0, 0)])
    assert record.vector is None and "bad_vector" in str(record.reason)


async def test_an_encoder_that_is_away_holds_the_batch(path: ItemPath, encoder: QueryEncoder, tmp_path: Path) -> None:
    encoder.dead = 3
    async with reading(path, tmp_path) as run:
        await search(run, "lamp")
    assert encoder.passes == [1] * 4 and counted(run) == (0, 1, 0)


async def test_many_queries_are_encoded_in_passes_that_items_can_come_between(
    path: ItemPath, encoder: QueryEncoder
) -> None:
    searches = [Search(f"{n:032x}", f"lamp {n}", None, 0, n) for n in range(40)]
    records = await encode_searches(path.context, searches)
    assert [one.query for one in records] == [one.query for one in searches]
    assert encoder.passes == [16, 16, 8]


# ---- what is remembered ----------------------------------------------------------------------------------------------


def test_as_many_queries_are_remembered_as_are_set_and_the_least_searched_goes_first() -> None:
    known = AnnouncedQueries(3, lambda: NOW)
    known.add("abc")
    assert known.knows("a")
    known.add("d")
    assert [one for one in "abcd" if known.knows(one)] == ["a", "c", "d"] and len(known) == 3
    known.add(str(n) for n in range(1_000))
    assert len(known) == 3


async def test_a_forgotten_query_is_encoded_once_more(path: ItemPath, encoder: QueryEncoder, tmp_path: Path) -> None:
    path.context = replace(path.context, config=IndexConfig(batch_within_seconds=0.05, remembered_queries=2))
    async with reading(path, tmp_path) as run:
        for text in ("a", "b", "c", "c", "b", "a"):
            await search(run, text)
    assert encoder.asked == 4 and len(path.outbox.queries) == 4


async def test_what_is_searched_again_and_again_is_announced_again_before_the_topic_forgets_it(
    path: ItemPath, encoder: QueryEncoder, tmp_path: Path
) -> None:
    async with reading(path, tmp_path) as run:
        await search(run, "lamp")
        path.now += timedelta(hours=QUERY_REPEAT_HOURS, seconds=-1)
        await search(run, "lamp")
        assert encoder.asked == 1
        path.now += timedelta(seconds=1)
        await search(run, "lamp")
        assert encoder.asked == 2
        path.now += timedelta(hours=QUERY_REPEAT_HOURS, seconds=-1)
        await search(run, "lamp")
    assert encoder.asked == 2 and len(path.outbox.queries) == 2
    assert path.now > datetime(2026, 5, 2, tzinfo=UTC)


async def test_a_worker_that_is_told_so_reads_no_behaviours(tmp_path: Path) -> None:
    path = ItemPath(config=IndexConfig(queries=False))
    with pytest.raises(KeyError):
        async with reading(path, tmp_path):
            pass
