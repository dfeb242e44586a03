"""What every request passes: fields that nobody knows, packed bodies, and whose turn it is."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
import zlib
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from structlog.testing import capture_logs

from schemas.errors import StoreBusy
from streams.serving import edge
from streams.stores.histories.store import InMemoryBehaviourStore
from tests.factories.serving import Asked, Open, PlainScorer, open_bench
from trainer.networks.item_rows import ItemRows, RequestMoment

__all__ = ["open_bench"]

TOKEN = "a-token-of-the-shop"
SCORE = {"user_id": "ann", "item_ids": ["shoe"]}


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/score", SCORE | {"query": "boots"}, "query"),
        ("/v1/score", SCORE | {"as_of": "2026-01-01T00:00:00Z"}, "as_of"),
        ("/v1/score", SCORE | {"excludeTaken": True}, "excludeTaken"),
        ("/v1/similar", {"item_id": "boot", "category": "shoes"}, "category"),
        ("/v1/similar", {"item_id": "boot", "filter": {"price": 1}}, "filter"),
        ("/v1/similar", {"text": "boot", "k": 1, "as_of": 1}, "as_of"),
        ("/v1/score?exclude_taken=1", SCORE, "exclude_taken"),
        ("/v1/similar?k=3", {"item_id": "boot"}, "k"),
    ],
)
async def test_what_would_be_ignored_is_refused_by_its_name(
    open_bench: Open, path: str, body: dict[str, Any], named: str
) -> None:
    bench = await open_bench()
    await bench.serve(1, 0.0)
    status, answer = await bench.post(path, body)
    assert (status, answer["error"]["code"]) == (400, "bad_request")
    assert f"{named}: there is no such" in answer["error"]["message"]


@pytest.mark.parametrize("query", ["vectors=1", "vector=yes", "vector=", "vector=1&format=csv"])
async def test_a_parameter_of_an_item_that_would_be_ignored_is_refused(open_bench: Open, query: str) -> None:
    bench = await open_bench()
    status, answer = await bench.get(f"/v1/items/boot?{query}")
    assert (status, answer["error"]["code"]) == (400, "bad_request")


async def test_an_error_never_repeats_megabytes_of_the_request(open_bench: Open) -> None:
    bench = await open_bench()
    _, answer = await bench.post("/v1/similar", {"item_id": "boot", "x" * 100_000: 1})
    assert len(answer["error"]["message"]) < 1_000


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP ", None)])
async def test_a_packed_body_is_read(open_bench: Open, encoding: str, pack: Any) -> None:
    bench = await open_bench()
    data = (pack or gzip.compress)(json.dumps({"item_id": "boot", "k": 1}).encode())
    async with bench.client.post("/v1/similar", data=data, headers={"Content-Encoding": encoding}) as answer:
        assert answer.status == 200


GZIP = gzip.compress(json.dumps({"item_id": "boot", "k": 1}).encode(), mtime=0)


@pytest.mark.parametrize(
    ("encoding", "data", "status"),
    [
        ("gzip", gzip.compress(b" " * 20_000_000, mtime=0), 413),
        ("gzip", b"not packed", 400),
        ("gzip", GZIP[:-9], 400),
        ("gzip", GZIP[:-2], 400),  # all of the text, and not the check of it
        ("gzip", GZIP + b"more", 400),
        ("gzip", b"", 400),
        ("br", b"x", 415),
        ("gzip, gzip", gzip.compress(GZIP, mtime=0), 415),
    ],
)
async def test_a_packed_body_is_unpacked_within_the_limit_and_to_its_end(
    open_bench: Open, encoding: str, data: bytes, status: int
) -> None:
    bench = await open_bench(max_body_bytes=50_000)
    async with bench.client.post("/v1/similar", data=data, headers={"Content-Encoding": encoding}) as answer:
        assert answer.status == status


async def test_a_bomb_costs_no_more_memory_than_a_body_may(open_bench: Open) -> None:
    bench = await open_bench(max_body_bytes=50_000)
    bomb = zlib.compress(bytes(30_000_000))
    tracemalloc.start()
    try:
        async with bench.client.post("/v1/similar", data=bomb, headers={"Content-Encoding": "deflate"}) as answer:
            assert answer.status == 413
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


async def test_without_a_token_nothing_is_unpacked(open_bench: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = await open_bench(tokens=(TOKEN,))
    unpacked: list[object] = []
    monkeypatch.setattr("streams.serving.edge.zlib.decompressobj", lambda *_: unpacked.append(1))
    bomb = gzip.compress(b" " * 1_000_000)
    async with bench.client.post("/v1/similar", data=bomb, headers={"Content-Encoding": "gzip"}) as answer:
        assert answer.status == 401
    assert not unpacked


async def test_more_requests_than_connections_to_a_store_are_said_to_be_too_many(open_bench: Open) -> None:
    class Busy(InMemoryBehaviourStore):
        async def takes(self, user_id: str) -> tuple[list[str], list[int]]:
            raise StoreBusy("Redis", "all 64 connections have been in use for 5 s")

    bench = await open_bench(behaviours=Busy())
    await bench.serve(1, 0.0)
    async with bench.client.post("/v1/score", json=SCORE) as answer:
        assert answer.status == 503 and answer.headers["Retry-After"]
        error = (await answer.json())["error"]
    assert error["code"] == "overloaded" and "does not answer" not in error["message"]


async def test_a_client_that_hangs_up_is_no_failure_of_the_server() -> None:
    handling = edge._handling_errors(1)

    async def hung_up(request: Any) -> web.StreamResponse:
        raise ConnectionResetError("Cannot write to closing transport")

    with capture_logs() as logged:
        for _ in range(2):  # and its place is free for the next
            with pytest.raises(ConnectionResetError):
                await handling(make_mocked_request("POST", "/v1/score"), hung_up)
    assert logged == []


async def test_between_two_passes_the_loop_hears_of_everything_else(open_bench: Open) -> None:
    bench = await open_bench()
    await bench.serve(1, 0.0)
    turns = 0
    passes: list[int] = []

    class Noting(PlainScorer):
        def prepare(self, items: ItemRows, candidates: int, moment: RequestMoment | None = None) -> Asked:
            passes.append(turns)
            return super().prepare(items, candidates, moment)

    bench.service.models.current.scorer.__class__ = Noting

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    answers = await asyncio.gather(*(bench.post("/v1/score", SCORE) for _ in range(20)))
    counting.cancel()
    assert {status for status, _ in answers} == {200}
    assert len(set(passes)) == 20, "two passes in one turn of the loop"
