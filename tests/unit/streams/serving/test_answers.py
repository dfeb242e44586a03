"""What single answers of the HTTP interface hold and hide."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from structlog.testing import capture_logs

from schemas.errors import Misconfigured, Reason, StoreUnavailable, Unprocessable
from schemas.items import embedding_key
from streams.serving import api
from streams.serving.edge import MAX_MESSAGE_CHARACTERS, _handling_errors, error_response
from streams.stores.vectors.item_index import InMemoryItemIndex
from tests.factories import vector_cache
from tests.factories.serving import DIM, VERSION, Open, WordEncoder, open_bench, release

__all__ = ["open_bench"]

SCORE = {"user_id": "ann", "item_ids": ["shoe"]}


async def test_no_more_neighbours_are_given_than_asked_for_though_an_item_is_crowded_out_by_its_twins(
    open_bench: Open,
) -> None:
    class Crowded(InMemoryItemIndex):
        async def search(self, vectors: Any, k: int) -> Any:
            asked.append(k)
            return [[(f"twin{n}", 1.0000001 if n == 0 else -1.0000001) for n in range(k)] for _ in vectors]

    asked: list[int] = []
    bench = await open_bench(index=Crowded(encoder_version=VERSION, dim=DIM))
    for include_self, k in ((False, 3), (True, 2)):
        body = {"item_id": "boot", "k": 2, "include_self": include_self}
        _, answer = await bench.post("/v1/similar", body)
        near = answer["results"][0]["neighbours"]
        assert [one["item_id"] for one in near] == ["twin0", "twin1"] and asked[-1] == k
        assert [one["similarity"] for one in near] == [1.0, -1.0], "rounding leaves the range of a cosine"


async def test_an_item_of_another_encoder_has_no_neighbours_here(open_bench: Open) -> None:
    bench = await open_bench()
    held = bench.index.rows["lamp"]
    bench.index.rows["lamp"] = vector_cache.row("lamp", 9, version="other-1", vector=held.vector)
    _, answer = await bench.post("/v1/similar", {"item_ids": ["lamp", "boot"], "k": 1})
    assert [one["found"] for one in answer["results"]] == [False, True]
    assert answer["results"][1]["neighbours"][0]["item_id"] == "shoe"


async def test_a_server_without_its_query_encoder_says_what_it_can_do_and_no_more(open_bench: Open) -> None:
    class Missing:
        async def get(self) -> Any:
            raise Misconfigured("MIM_ENCODER__BUNDLE=/srv/secret is not there")

    bench = await open_bench(encoder=Missing())
    with capture_logs() as said:
        status, answer = await bench.post("/v1/similar", {"text": "boot"})
    assert (status, answer["error"]["code"]) == (503, "no_query_encoder") and "/srv" not in str(answer)
    assert [line["event"] for line in said] == ["serve.no_query_encoder"] and "/srv/secret" in said[0]["error"]
    assert (await bench.post("/v1/similar", {"item_id": "boot"}))[0] == 200


async def test_a_search_is_encoded_as_a_search_and_not_as_an_item(open_bench: Open) -> None:
    class Turned(WordEncoder):
        def encode_queries(self, batch: Any) -> Any:
            return -self.encode(batch)

    class Given:
        async def get(self) -> Any:
            return Turned()

    bench = await open_bench(encoder=Given())
    _, answer = await bench.post("/v1/similar", {"text": "desk lamp", "k": 3})
    assert answer["results"][0]["neighbours"][-1]["item_id"] == "lamp"


async def test_a_newest_release_that_cannot_be_used_is_told_by_readiness_without_its_reason(open_bench: Open) -> None:
    bench = await open_bench()
    release(bench.models, 1, 1.0, version="other-1")
    await bench.service.models.refresh()
    status, answer = await bench.get("/readyz")
    assert status == 503 and answer["checks"]["model"] == "the newest release cannot be used"
    await bench.serve(2, 0.0)
    assert (await bench.get("/readyz"))[0] == 200


async def test_a_store_that_hangs_is_not_waited_for_by_readiness(open_bench: Open) -> None:
    class Hanging(InMemoryItemIndex):
        async def fetch(self, *_: Any, **__: Any) -> Any:
            await asyncio.sleep(60)

    bench = await open_bench(index=Hanging(encoder_version=VERSION, dim=DIM), ready_timeout_seconds=0.05)
    async with asyncio.timeout(10):
        status, answer = await bench.get("/readyz")
    assert (status, answer["checks"]["behaviours"]) == (503, "ok")
    assert answer["checks"]["center"] == "the representation center does not answer"


async def test_while_requests_are_too_many_the_operators_pages_answer(open_bench: Open) -> None:
    bench = await open_bench(max_concurrent_requests=1)
    gate = asyncio.Event()
    fetch = bench.index.fetch

    async def slow(item_ids: Any, **more: Any) -> Any:
        if item_ids == ["boot"]:
            await gate.wait()
        return await fetch(item_ids, **more)

    bench.index.fetch = slow
    waiting = asyncio.create_task(bench.get("/v1/items/boot"))
    try:
        async with asyncio.timeout(10):
            while (await bench.get("/v1/items/lamp"))[0] != 503:
                await asyncio.sleep(0)
            for path in ("/healthz", "/readyz", "/metrics"):
                async with bench.client.get(path) as answer:
                    assert "overloaded" not in await answer.text()
    finally:
        gate.set()
    assert (await waiting)[0] == 200
    assert (await bench.get("/v1/items/lamp"))[0] == 200


@pytest.mark.parametrize("path", ["/readyz", "/healthz"])
async def test_health_is_not_counted_and_metrics_are(open_bench: Open, path: str) -> None:
    bench = await open_bench(max_requests_per_second=0.001, burst_requests=1)
    assert 429 not in [(await bench.get(path))[0] for _ in range(3)]
    statuses = []
    for _ in range(2):
        async with bench.client.get("/metrics") as answer:
            statuses.append(answer.status)
    assert statuses == [200, 429] and answer.headers["Retry-After"] == "1000"


async def test_a_wrong_method_is_told_which_are_right(open_bench: Open) -> None:
    bench = await open_bench()
    async with bench.client.get("/v1/score") as answer:
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")


async def test_metrics_come_in_the_format_of_prometheus(open_bench: Open) -> None:
    bench = await open_bench()
    async with bench.client.get("/metrics") as answer:
        assert answer.headers["Content-Type"] == api.CONTENT_TYPE_LATEST


async def test_an_item_that_cannot_be_encoded_is_told_with_its_reason(open_bench: Open) -> None:
    bench = await open_bench()

    async def refuse(*_: Any, **__: Any) -> Any:
        raise Unprocessable(Reason.BAD_IMAGE, "why not")

    bench.index.fetch = refuse
    status, answer = await bench.get("/v1/items/boot")
    assert (status, answer["error"]) == (422, {"code": Reason.BAD_IMAGE.value, "message": "why not"})


@pytest.mark.parametrize(("extra", "status"), [(0, 200), (1, 413)])
async def test_a_packed_body_may_be_as_large_as_the_limit_and_not_larger(
    open_bench: Open, extra: int, status: int
) -> None:
    bench = await open_bench(max_body_bytes=2_000)
    plain = json.dumps({"item_id": "boot", "k": 1}).encode()
    plain += b" " * (2_000 + extra - len(plain))
    for encoding in ("gzip", "x-gzip"):
        headers = {"Content-Encoding": encoding}
        async with bench.client.post("/v1/similar", data=gzip.compress(plain), headers=headers) as answer:
            assert answer.status == status
    async with bench.client.post("/v1/similar", data=plain, headers={"Content-Encoding": "identity"}) as answer:
        assert answer.status == status


@pytest.mark.parametrize(("length", "cut"), [(MAX_MESSAGE_CHARACTERS, False), (MAX_MESSAGE_CHARACTERS + 1, True)])
def test_a_message_is_cut_where_it_is_too_long(length: int, cut: bool) -> None:
    answer: Any = error_response(400, "bad_request", "x" * length)
    message = json.loads(answer.body)["error"]["message"]
    assert message == "x" * MAX_MESSAGE_CHARACTERS + " ..." * cut and "Retry-After" not in answer.headers
    assert error_response(503, "unavailable", "why").headers["Retry-After"] == "1"


async def test_the_first_wrong_fields_are_each_named(open_bench: Open) -> None:
    bench = await open_bench()
    _, answer = await bench.post("/v1/similar", {f"unknown{n}": n for n in range(9)} | {"item_id": "boot"})
    told = answer["error"]["message"].split("; ")
    assert [one.split(":")[0] for one in told] == [f"unknown{n}" for n in range(5)]


async def test_only_the_candidate_that_was_deleted_has_no_probability(open_bench: Open) -> None:
    bench = await open_bench()
    await bench.serve(1, 0.0)
    await bench.index.delete(["shoe"])
    bench.service.vector_cache.apply(embedding_key(VERSION, "shoe"), None)
    _, answer = await bench.post("/v1/score", SCORE | {"item_ids": ["lamp", "shoe", "nobody"]})
    assert [one["probability"] is None for one in answer["scores"]] == [False, True, False]


@pytest.mark.parametrize("value", ["1", "true", "0", "false"])
async def test_a_vector_is_shown_on_request(open_bench: Open, value: str) -> None:
    bench = await open_bench()
    _, answer = await bench.get(f"/v1/items/boot?vector={value}")
    assert (answer["vector"] is not None) == (value in ("1", "true"))
    held = bench.index.rows["boot"]
    assert (answer["encoder_version"], answer["content_hash"], answer["category"]) == (
        VERSION,
        held.content_hash,
        "shoes",
    )
    assert (answer["has_title"], answer["has_image"]) == (held.has_title, held.has_image)
    assert np.datetime64(answer["published_at"][:10]) == np.datetime64(held.published_at.date())


async def test_a_score_says_which_weights_it_rests_on(open_bench: Open) -> None:
    bench = await open_bench()
    released = await bench.serve(1, 0.0)
    _, answer = await bench.post("/v1/score", SCORE)
    assert answer["weights_sha256"] == bench.models.manifest(released).weights_sha256


async def test_a_store_that_is_away_is_told_by_name_alone(open_bench: Open) -> None:
    bench = await open_bench()

    async def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("Milvus", "http://root:secret@10.0.0.1 refused")

    bench.index.fetch = away
    status, answer = await bench.get("/v1/items/boot")
    assert (status, answer["error"]) == (
        503,
        {"code": "unavailable", "message": "Milvus does not answer now; try again"},
    )


async def test_a_redirect_of_a_handler_is_no_error(open_bench: Open) -> None:
    async def handler(request: Any) -> Any:
        raise web.HTTPFound("/elsewhere")

    with pytest.raises(web.HTTPFound):
        await _handling_errors(9)(make_mocked_request("GET", "/"), handler)
