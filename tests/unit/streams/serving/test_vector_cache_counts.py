"""What the vector cache reports, how old exactly a vector may be, and what it remembers of deleted items."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from schemas.items import embedding_key
from tests.factories.vector_cache import DIM, VERSION, Bench, announced, row, unit


async def test_a_look_up_counts_hits_misses_and_items_that_nobody_holds() -> None:
    bench = Bench()
    await bench.index.upsert([row("a", 1), row("b", 2)])
    await bench.ask("a")
    bench.cache.confirm(bench.clock.now - 2)
    report = (await bench.cache.look_up(["a", "b", "gone", "a"])).report
    assert (report.hits, report.misses, report.absent, report.cached, report.behind_seconds) == (2, 2, 1, 2, 2.0)
    report = (await bench.cache.look_up(["a", "gone"])).report
    assert (report.hits, report.misses, report.absent, report.cached) == (2, 0, 1, 2)
    report = (await bench.cache.look_up(["b"])).report
    assert (report.hits, report.misses, report.absent) == (1, 0, 0)


@pytest.mark.parametrize(("waited", "reads"), [(5.0, 1), (5.001, 2)])
async def test_a_vector_that_was_read_is_used_for_as_long_as_the_bound_says(waited: float, reads: int) -> None:
    bench = Bench()
    await bench.index.upsert([row("a", 1)])
    await bench.ask("a")
    bench.clock.now += waited
    await bench.ask("a")
    assert len(bench.index.reads) == reads


@pytest.mark.parametrize(("ago", "reads"), [(5.0, 0), (5.001, 1)])
async def test_a_confirmation_counts_for_as_long_as_the_bound_says_and_an_older_one_takes_nothing_back(
    ago: float, reads: int
) -> None:
    bench = Bench()
    await bench.index.upsert([row("a", 1)])
    bench.cache.apply(*announced("a", unit(1)))
    bench.cache.confirm(bench.clock.now)
    bench.cache.confirm(bench.clock.now - 100)
    bench.clock.now += ago
    assert "a" in await bench.ask("a") and len(bench.index.reads) == reads


async def test_an_item_that_is_absent_is_asked_for_again_when_its_moment_is_over() -> None:
    bench = Bench()
    for waited, reads in ((0.0, 1), (0.999, 1), (0.001, 2)):
        bench.clock.now += waited
        await bench.ask("gone")
        assert len(bench.index.reads) == reads


async def test_a_read_that_a_gap_overtook_is_answered_and_not_kept() -> None:
    bench = Bench()
    asking = await bench.ask_slowly("a")
    bench.cache.apply(embedding_key(VERSION, "b"), None)
    bench.cache.invalidate()
    bench.index.gate.set()
    assert "a" in await asking
    bench.cache.confirm(bench.clock.now)
    await bench.ask("a")
    assert len(bench.index.reads) == 2 and list(bench.cache.deleted) == ["b"]


async def test_a_read_hears_of_a_change_though_another_like_it_has_just_ended() -> None:
    bench = Bench()
    first = await bench.ask_slowly("a")
    gate, bench.index.gate = bench.index.gate, asyncio.Event()
    second = asyncio.create_task(bench.ask("a"))
    await asyncio.sleep(0)
    gate.set()
    await first
    await bench.index.delete(["a"])
    bench.cache.apply(embedding_key(VERSION, "a"), None)
    bench.index.gate.set()
    await second
    bench.cache.confirm(bench.clock.now)
    assert await bench.ask("a") == {} and bench.cache._touched == []


def test_the_oldest_deletes_are_forgotten_first_where_there_are_too_many() -> None:
    bench = Bench(max_items=3)
    for name in "abcd":
        bench.cache.apply(embedding_key(VERSION, name), None)
    assert list(bench.cache.deleted) == ["b", "c", "d"]
    bench.cache.apply(*announced("c", unit(1)))
    assert list(bench.cache.deleted) == ["b", "d"]
    bench.cache.apply(embedding_key("other-1", "d"), announced("d", unit(1), "other-1")[1])
    bench.cache.apply(embedding_key("other-1", "e"), None)
    assert list(bench.cache.deleted) == ["b", "d"], "another encoder's records say nothing"


@pytest.mark.parametrize(
    ("vector", "kept"), [(unit(1), True), (unit(1) * 1.1, False), (unit(1, DIM + 1), False), (unit(1) * 0, False)]
)
async def test_only_vectors_of_this_width_and_of_length_1_are_kept(vector: np.ndarray, kept: bool) -> None:
    bench = Bench()
    bench.cache.apply(*announced("a", vector))
    bench.cache.confirm(bench.clock.now)
    assert ("a" in await bench.ask("a")) == kept


async def test_an_announcement_under_the_key_of_another_item_is_not_used() -> None:
    bench = Bench()
    bench.cache.apply(embedding_key(VERSION, "a"), announced("b", unit(1))[1])
    bench.cache.confirm(bench.clock.now)
    assert await bench.ask("a", "b") == {}
