"""The demo's own clients: load, freshness probe, children."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from schemas.errors import StoreUnavailable, Unavailable
from streams.demo.api import ServeApi
from streams.demo.audit import searchable
from streams.demo.freshness import FreshnessProbe, probe_at_rate
from streams.demo.load import SteadyLoad
from streams.runtime.child import Child, ChildDied, watch


class FakeServer:
    """Answers like `mimstream serve`, for as long as it is told to."""

    def __init__(self) -> None:
        self.ready = True
        self.weights = "first"
        self.fail_every: int | None = None
        self.held: set[str] = set()
        self.twins: set[str] = set()
        self.scores = 0
        self.asked_k: list[int] = []
        self.moments: list[int | None] = []

    async def readyz(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.ready else 503)

    async def score(self, request: web.Request) -> web.Response:
        self.scores += 1
        if self.fail_every and self.scores % self.fail_every == 0:
            return web.Response(status=500, text="broken")
        asked = await request.json()
        self.moments.append(asked.get("at"))
        scores = [{"item_id": one, "probability": 0.5, "has_vector": True} for one in asked["item_ids"]]
        release = {"release_id": "r000001-000000000000", "weights_sha256": self.weights}
        return web.json_response({"scores": scores, "encoder_version": "v1", "history_length": 0} | release)

    async def similar(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.asked_k.append(asked["k"])
        results: list[dict[str, Any]] = []
        for item_id in asked["item_ids"]:
            crowd = [{"item_id": f"twin{n}", "similarity": 1.0} for n in range(20)] if item_id in self.twins else []
            near = [*crowd, {"item_id": item_id, "similarity": 1.0}][: asked["k"]] if item_id in self.held else []
            results.append({"query": item_id, "found": item_id in self.held, "neighbours": near})
        return web.json_response({"results": results, "encoder_version": "v1"})

    async def item(self, request: web.Request) -> web.Response:
        item_id = request.match_info["item_id"]
        if item_id not in self.held:
            return web.Response(status=404)
        view: dict[str, Any] = {"item_id": item_id, "encoder_version": "v1", "content_hash": "0", "source_partition": 0}
        view |= {"published_at": "2026-01-01T00:00:00Z", "category": None, "price": None, "source_offset": 0}
        view |= {"has_title": True, "has_image": False, "vector": [1.0, 0.0] if "vector" in request.query else None}
        return web.json_response(view)


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[FakeServer, ServeApi]]:
    server = FakeServer()
    app = web.Application()
    app.router.add_get("/readyz", server.readyz)
    app.router.add_post("/v1/score", server.score)
    app.router.add_post("/v1/similar", server.similar)
    app.router.add_get("/v1/items/{item_id}", server.item)
    async with TestServer(app) as listening, ServeApi(f"http://127.0.0.1:{listening.port}") as api:
        yield server, api


Report = TypeVar("Report")


@asynccontextmanager
async def running(run: Callable[[asyncio.Event], Coroutine[Any, Any, Report]]) -> AsyncIterator[asyncio.Task[Report]]:
    """At the end of the block it is asked to stop, and awaited."""
    stop = asyncio.Event()
    task = asyncio.create_task(run(stop))
    yield task
    stop.set()
    await task


def load_on(api: ServeApi, per_second: float = 100.0) -> SteadyLoad:
    return SteadyLoad(api, users=["u1", "u2"], published=["a", "b", "c"], per_second=per_second, candidates=2, seed=0)


async def test_load_keeps_its_rate_and_sees_every_release() -> None:
    async with serving() as (server, api):
        async with running(load_on(api).run) as loading:
            await asyncio.sleep(0.5)
            server.weights = "second"
            await asyncio.sleep(0.5)
        report = loading.result()
        assert set(report.weights) == {"first", "second"}
        assert sum(report.weights.values()) == report.requests == len(report.latency_ms)
        assert not report.failures
        assert 0 < report.per_second < 110


async def test_requests_of_the_load_are_of_the_event_time_that_the_replay_has_reached() -> None:
    reached: list[int | None] = [None]
    async with serving() as (server, api):
        load = SteadyLoad(
            api, users=["u"], published=["a"], per_second=100.0, candidates=1, seed=0, reached=lambda: reached[0]
        )
        async with running(load.run):
            await asyncio.sleep(0.2)
            reached[0] = 1_700_000_000
            await asyncio.sleep(0.2)
    assert server.moments[0] is None and server.moments[-1] == 1_700_000_000


async def test_load_waits_until_the_server_can_score() -> None:
    async with serving() as (server, api):
        server.ready = False
        async with running(load_on(api).run) as loading:
            await asyncio.sleep(0.3)
            assert server.scores == 0
        assert loading.result().requests == 0


async def test_every_failed_request_is_counted_once() -> None:
    async with serving() as (server, api):
        server.fail_every = 10
        async with running(load_on(api).run) as loading:
            await asyncio.sleep(0.5)
        report = loading.result()
        assert len(report.failures) == report.requests // 10 > 0
        assert "500" in report.failures[0]
        assert report.requests == sum(report.weights.values()) + len(report.failures)


async def test_freshness_runs_from_acknowledgement_to_the_first_answer_that_holds_the_item() -> None:
    async with serving() as (server, api):
        clock = asyncio.get_running_loop().time
        probe = FreshnessProbe(api, at_once=2, every_seconds=0.01, monotonic=clock)
        for item_id in ("a/1", "b", "one too many"):
            probe.published(item_id, clock())
        async with running(probe.run) as probing:
            await asyncio.sleep(0.2)
            assert server.asked_k == []  # no search before the item is there
            server.held.add("a/1")
            await asyncio.sleep(0.2)
            server.held.add("b")
        report = probing.result()
        first, second = sorted(report.milliseconds)
        assert first > 190
        assert second > 390
        assert report.lost == 0
        assert server.asked_k == [10, 10]


async def test_probes_keep_their_distance() -> None:
    async with serving() as (server, api):
        server.held = {f"i{number}" for number in range(10)}
        probe = FreshnessProbe(api, at_once=5, every_seconds=0.01, spacing_seconds=2.0)
        for number in range(10):
            probe.published(f"i{number}", 100.0 + number)
        async with running(probe.run) as probing:
            pass
        assert len(probing.result().found_at) == 5


async def test_a_probe_that_is_never_found_is_given_up_and_counted() -> None:
    async with serving() as (_, api):
        clock = asyncio.get_running_loop().time
        probe = FreshnessProbe(api, at_once=2, every_seconds=0.01, patience_seconds=0.1, monotonic=clock)
        probe.published("never", clock())
        async with running(probe.run) as probing:
            pass
        assert (probing.result().lost, probing.result().milliseconds) == (1, [])


async def test_single_items_are_published_at_the_rate_and_followed_one_by_one() -> None:
    async with serving() as (server, api):
        clock = asyncio.get_running_loop().time
        sent: list[tuple[float, str, bytes]] = []

        async def send(item_id: str, payload: bytes) -> None:
            sent.append((clock(), item_id, payload))
            asyncio.get_running_loop().call_later(0.15, server.held.add, item_id)

        items = [(f"i{number}", b"%d" % number) for number in range(5)]
        report = await probe_at_rate(api, send, items, per_second=10, every_seconds=0.01)
        assert [one[1:] for one in sent] == items
        assert 0.35 < sent[-1][0] - sent[0][0] < 0.8
        assert len(report.milliseconds) == 5 and min(report.milliseconds) > 140 and report.lost == 0


async def test_a_publish_that_fails_ends_the_probing() -> None:
    async def send(item_id: str, payload: bytes) -> None:
        raise StoreUnavailable("Kafka", "gone")

    async with serving() as (_, api):
        with pytest.raises(StoreUnavailable, match="gone"):
            await probe_at_rate(api, send, [("a", b"")], per_second=10, every_seconds=0.01)


async def test_an_item_among_many_twins_is_searched_for_deeper() -> None:
    async with serving() as (server, api):
        server.held = {"a", "b", "crowded"}
        server.twins = {"crowded"}
        assert await searchable(api, ["a", "absent", "b", "crowded"]) == {"a", "b", "crowded"}
        assert server.asked_k == [10, 100]


async def test_an_absent_item_is_none_and_a_dead_server_is_unavailable() -> None:
    async with serving() as (server, api):
        assert await api.item("x") is None
        server.held.add("x y/z")
        view = await api.item("x y/z")
        assert view is not None
        assert view.vector == [1.0, 0.0]
        assert await api.holds("x y/z")
    async with ServeApi("http://127.0.0.1:9") as dead:
        assert not await dead.ready()
        with pytest.raises(StoreUnavailable, match="mimstream serve"):
            await dead.score("u", ["a"])


async def test_a_child_that_dies_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    child = Child(["replay", "/no/such/folder"], tmp_path / "replay.log", dict(os.environ))
    with pytest.raises(ChildDied, match=r"ended with status 2[\s\S]*/no/such/folder is not a folder"):
        await child.ready()
    with pytest.raises(ChildDied):
        await watch([child], every_seconds=0.01)


async def test_a_child_that_never_gets_ready_is_reported_and_stopped(tmp_path: Path) -> None:
    # nothing answers there, so the command waits for its broker
    environment = {**os.environ, "MIM_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:9"}
    child = Child(["topics", "list"], tmp_path / "topics.log", environment)
    try:
        with pytest.raises(Unavailable, match="not ready within 0 s"):
            await child.ready(timeout_seconds=0.3)
    finally:
        child.stop(timeout_seconds=5)
    with pytest.raises(ChildDied):
        child.check()
