"""Who may ask the HTTP interface, how often and how slowly, and what an answer never tells."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import structlog
from aiohttp import web

from schemas.errors import StoreUnavailable
from streams.serving.auth import MAX_CLIENTS, BearerTokens, RateLimiter
from streams.serving.config import ServeConfig
from streams.stores.vectors.item_index import InMemoryItemIndex
from tests.factories.serving import DIM, VERSION, Open, open_bench
from tests.factories.waiting import Clock

__all__ = ["open_bench"]

TOKEN, OTHER = "a-token-of-the-shop", "another-token-of-it"
BODY = {"item_id": "boot", "k": 1}


def bearing(token: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {token}"}


@pytest.mark.parametrize(
    ("header", "number"),
    [
        (f"Bearer {TOKEN}", 0),
        (f"bearer  {OTHER} ", 1),
        (f"Basic {TOKEN}", None),
        (TOKEN, None),
        ("Bearer", None),
        ("Bearer ", None),
        (f"Bearer {TOKEN[:-1]}", None),
        (f"Bearer {TOKEN}x", None),
        (f"Bearer {TOKEN} {OTHER}", None),
        ("Bearer \udcff", None),
        ("", None),
        (None, None),
    ],
)
def test_only_a_whole_token_is_recognised(header: str | None, number: int | None) -> None:
    assert BearerTokens([TOKEN, OTHER]).recognise(header) == number


def test_a_client_may_ask_in_bursts_and_then_at_its_rate() -> None:
    clock = Clock()
    rate = RateLimiter(2.0, 3, clock)
    assert [rate.wait_seconds("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert rate.wait_seconds("b") == 0
    clock.now = 0.5
    assert [rate.wait_seconds("a") for _ in range(2)] == [0, 0.5]
    clock.now = 1e6
    assert [rate.wait_seconds("a") for _ in range(4)] == [0, 0, 0, 0.5]


def test_clients_that_are_remembered_are_bounded() -> None:
    rate = RateLimiter(1.0, 1, Clock())
    for n in range(MAX_CLIENTS + 50):
        assert rate.wait_seconds(f"c{n}") == 0
    assert rate.wait_seconds(f"c{MAX_CLIENTS + 49}") == rate.wait_seconds("c50") == 1
    assert rate.wait_seconds("c0") == 0, "dropped for a newer client: a full allowance again"


def test_a_client_that_keeps_asking_is_remembered_however_many_others_come() -> None:
    rate = RateLimiter(1.0, 1, Clock())
    assert rate.wait_seconds("often") == 0
    for n in range(2 * MAX_CLIENTS):
        rate.wait_seconds(f"c{n}")
        if n % 5_000 == 0:
            assert rate.wait_seconds("often") == 1


@pytest.mark.parametrize("path", ["/v1/similar", "/v1/score", "/v1/items/boot", "/metrics", "/nowhere"])
async def test_without_a_token_nothing_but_health_is_answered(open_bench: Open, path: str) -> None:
    bench = await open_bench(tokens=(TOKEN,))
    for headers in ({}, bearing(OTHER), bearing(TOKEN, "Basic")):
        async with bench.client.get(path, headers=headers) as answer:
            assert answer.status == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert (await answer.json())["error"]["code"] == "unauthorized"
    assert (await bench.get("/healthz"))[0] == 200
    assert (await bench.get("/readyz"))[0] in (200, 503)


async def test_each_token_that_is_listed_may_ask(open_bench: Open) -> None:
    bench = await open_bench(tokens=(TOKEN, OTHER))
    for token in (TOKEN, OTHER):
        async with bench.client.post("/v1/similar", json=BODY, headers=bearing(token)) as answer:
            assert answer.status == 200


async def test_a_client_that_asks_too_often_is_told_when_to_come_back_and_others_are_not(open_bench: Open) -> None:
    bench = await open_bench(tokens=(TOKEN, OTHER), max_requests_per_second=0.01, burst_requests=3)

    async def ask(token: str) -> web.StreamResponse | Any:
        async with bench.client.post("/v1/similar", json=BODY, headers=bearing(token)) as answer:
            return answer

    assert [(await ask(TOKEN)).status for _ in range(4)] == [200, 200, 200, 429]
    assert 0 < int((await ask(TOKEN)).headers["Retry-After"]) <= 100
    assert (await ask(OTHER)).status == 200
    guesses = [(await ask(f"a guess that is wrong {n}")).status for n in range(5)]
    assert guesses == [401, 401, 401, 429, 429]
    assert (await bench.get("/healthz"))[0] == 200


async def test_a_rate_holds_where_no_token_is_asked_for_and_is_counted_by_address(open_bench: Open) -> None:
    bench = await open_bench(max_requests_per_second=0.01, burst_requests=2)
    assert [(await bench.post("/v1/similar", BODY))[0] for _ in range(3)] == [200, 200, 429]


async def test_a_body_that_drips_in_does_not_keep_its_place(open_bench: Open) -> None:
    bench = await open_bench(body_seconds=0.2, max_concurrent_requests=1)

    async def dripping() -> Any:
        yield b"{"
        await asyncio.sleep(60)

    async with bench.client.post("/v1/similar", data=dripping()) as answer:
        assert answer.status == 408
    assert (await bench.post("/v1/similar", BODY))[0] == 200


async def test_a_body_above_the_limit_is_refused_whether_it_says_so_or_not(open_bench: Open) -> None:
    bench = await open_bench(max_body_bytes=2_000)

    async def endless() -> Any:
        while True:
            yield b"x" * 1_000

    for data in (b"x" * 2_001, endless()):
        async with bench.client.post("/v1/similar", data=data) as answer:
            assert answer.status == 413


async def test_no_answer_and_no_log_line_tells_a_secret_or_a_stack(open_bench: Open) -> None:
    class Broken(InMemoryItemIndex):
        async def fetch(self, *_: Any, **__: Any) -> Any:
            raise self.error

        error: Exception = RuntimeError("at /srv/secret/path with password hunter2")

    broken = Broken(encoder_version=VERSION, dim=DIM)
    bench = await open_bench(index=broken, tokens=(TOKEN,))
    with structlog.testing.capture_logs() as logged:
        for error in (broken.error, StoreUnavailable("Milvus", "http://root:hunter2@10.0.0.1:19530 refused")):
            broken.error = error
            async with bench.client.post("/v1/similar", json=BODY, headers=bearing(TOKEN)) as answer:
                told = await answer.text()
                assert answer.status in (500, 503)
                assert not any(word in told for word in ("hunter2", "Traceback", "/srv", "10.0.0.1", TOKEN))
    assert TOKEN not in json.dumps(logged, default=str)


def test_a_token_that_can_be_guessed_is_refused_and_none_is_shown() -> None:
    with pytest.raises(ValueError, match="at least 16 characters") as caught:
        ServeConfig(tokens=(TOKEN, "fifteen-letters"))  # type: ignore[arg-type]
    ServeConfig(tokens=("sixteen--letters",))  # type: ignore[arg-type]
    assert TOKEN not in repr(ServeConfig(tokens=(TOKEN,)))  # type: ignore[arg-type]
    assert "tokens" in str(caught.value)
