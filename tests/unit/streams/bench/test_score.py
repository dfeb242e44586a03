from __future__ import annotations

import json

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from schemas.errors import Unavailable
from schemas.scoring import ScoreRequest
from streams.bench.score import HISTORY, summary
from streams.bench.score_asking import ask
from streams.bench.score_queries import measure_queries, query_summary
from streams.bench.score_world import DIM, draw_world
from trainer.features.config import FeatureConfig
from trainer.networks.item_rows import ItemRows
from trainer.networks.scorer import Scorer
from trainer.samples.config import JoinConfig


def test_a_world_is_the_same_for_whoever_draws_it_and_its_release_scores_its_questions() -> None:
    sizes = {"items": 40, "users": 3, "history": 7, "candidates": 5, "questions": 4}
    world, again = draw_world(**sizes), draw_world(**sizes)
    assert world.bodies() == again.bodies() and world.histories == again.histories
    np.testing.assert_array_equal(world.vectors_IV, again.vectors_IV)
    asked = ScoreRequest.model_validate_json(world.bodies()[0])
    assert len(set(asked.item_ids)) == 5 and len(world.histories[asked.user_id]) == 7
    assert len(world.behaviours()) == 3 * 7 and len(world.rows()) == 40
    weights, manifest = world.release(7)
    scorer = Scorer.from_release(weights, manifest)
    vectors = dict(zip(world.item_ids, world.vectors_IV, strict=True))
    scores = scorer.score(ItemRows.of([*asked.item_ids, *world.histories[asked.user_id]], vectors, DIM), 5)
    assert scores.shape == (5,) and np.isfinite(scores).all() and not scorer.reads_queries
    taught = Scorer.from_release(*world.release(7, queries=True))
    assert taught.reads_queries and taught.manifest.release_id > manifest.release_id
    assert taught.manifest.features == FeatureConfig(queries=True).version != manifest.features


def test_the_ratio_is_that_of_the_medians_to_the_faster_floor_and_the_worse_of_both_concurrencies() -> None:
    seconds = {
        (1, "system"): [0.002, 0.003, 0.004],
        (1, "inline"): [0.002, 0.002, 0.002],
        (1, "threads"): [0.003, 0.003, 0.001],
        (8, "system"): [0.010, 0.010, 0.010],
        (8, "inline"): [0.020, 0.020, 0.020],
        (8, "threads"): [0.008, 0.008, 0.008],
    }
    result = summary(seconds)
    alone, together = result["by_clients"]
    assert (alone["clients"], alone["ratio_to_floor"], alone["floor"]) == (1, 1.5, "inline")
    assert (together["ratio_to_floor"], together["floor"], together["requests"]) == (1.25, "threads", 3)
    assert result["ratio_to_floor"] == 1.5


async def test_clients_ask_every_question_once_one_at_a_time_each() -> None:
    asked, in_hand, most = [], 0, 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal in_hand, most
        in_hand += 1
        most = max(most, in_hand)
        asked.append(json.loads(await request.read()))
        in_hand -= 1
        return web.Response(status=500 if asked[-1] == "bad" else 200)

    app = web.Application()
    app.router.add_post("/", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        url = str(server.make_url("/"))
        took = await ask(session, url, [json.dumps(n).encode() for n in range(20)], 3)
        assert sorted(asked) == list(range(20)) and len(took) == 20 and most <= 3
        with pytest.raises(Unavailable, match="500"):
            await ask(session, url, [b'"bad"'], 1)
        with pytest.raises(Unavailable, match="200"):
            await ask(session, url, [b'"good"'], 1, holds=b"not there")


async def test_new_searches_are_never_asked_twice_and_cached_ones_were_asked_before() -> None:
    asked: list[str | None] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append((await request.json()).get("query_text"))
        return web.Response(body=b'{"query":"used"}' if asked[-1] else b'{"query":null}')

    app = web.Application()
    app.router.add_post("/", answer)
    rounds: list[int] = []
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        seconds = await measure_queries(
            session, str(server.make_url("/")), [b"{}", b'{"user_id": "u"}'],
            requests=3, rounds=2, clients=(1, 2), on_round=lambda: rounds.append(1),
        )  # fmt: skip
    known, later = asked[:64], asked[64:]
    assert len(set(known)) == 64 and None not in known and len(rounds) == 2
    turns = [later[start : start + 23] for start in range(0, len(later), 23)]
    assert len(turns) == 12
    misses = [text for turn in turns[2::3] for text in turn]
    assert all(set(turn) == {None} for turn in turns[::3]) and all(set(turn) <= set(known) for turn in turns[1::3])
    assert len(set(misses)) == 4 * 23 and not set(misses) & set(known)
    assert {key: len(took) for key, took in seconds.items()} == {
        (clients, kind): 6 for clients in (1, 2) for kind in ("plain", "hit", "miss")
    }


def test_what_a_search_adds_is_told_by_medians_at_the_worse_concurrency() -> None:
    seconds = {
        (1, "plain"): [0.002, 0.004, 0.009],
        (1, "hit"): [0.004, 0.005, 0.001],
        (1, "miss"): [0.010, 0.010, 0.011],
        (8, "plain"): [0.010],
        (8, "hit"): [0.009],
        (8, "miss"): [0.030],
    }
    result = query_summary(seconds)
    assert (result["query_hit_ratio"], result["query_miss_ratio"]) == (1.0, 3.0)
    alone = {"clients": 1, "p50_ms": 4, "hit_p50_ms": 4, "miss_p50_ms": 10, "hit_ratio": 1, "miss_ratio": 2.5}
    assert result["queries_by_clients"][0] == alone


def test_the_history_asked_about_is_as_long_as_a_release_reads_by_default() -> None:
    assert JoinConfig().history_length == HISTORY
