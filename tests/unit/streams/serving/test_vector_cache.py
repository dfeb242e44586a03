"""The serving cache of vectors: never older than its bound, whatever arrives in whatever order."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from schemas.items import embedding_key
from streams.serving.vector_cache import VectorTable
from tests.factories.vector_cache import DIM, VERSION, Bench, announced, row, unit
from trainer.networks.item_rows import ItemRows
from trainer.samples.item_facts import FactRows, FactsConfig

FACTS = FactRows.empty(FactsConfig(), 1)


@pytest.fixture
async def bench() -> Bench:
    """Item a was asked for."""
    bench = Bench()
    await bench.index.upsert([row("a", 1)])
    await bench.ask("a")
    return bench


async def test_misses_are_read_in_one_round_trip_and_hits_in_none() -> None:
    bench = Bench()
    await bench.index.upsert([row("a", 1), row("b", 2), row("c", 3)])
    await bench.ask("a")
    found = await bench.ask("a", "b", "c", "b")
    assert bench.index.reads == [["a"], ["b", "c"]]
    assert all(np.array_equal(found[name], unit(seed)) for name, seed in [("a", 1), ("b", 2), ("c", 3)])


async def test_an_announced_vector_replaces_the_cached_one_at_once(bench: Bench) -> None:
    bench.cache.confirm(bench.clock.now)
    bench.cache.apply(*announced("a", unit(9)))
    assert np.array_equal((await bench.ask("a"))["a"], unit(9))
    assert len(bench.index.reads) == 1


async def test_a_tombstone_removes_the_item(bench: Bench) -> None:
    await bench.index.delete(["a"])
    bench.cache.apply(embedding_key(VERSION, "a"), None)
    assert await bench.ask("a") == {}


async def test_while_the_topic_is_followed_entries_stay_without_asking_milvus(bench: Bench) -> None:
    bench.clock.now += 100
    bench.cache.confirm(bench.clock.now - 1)
    await bench.ask("a")
    assert len(bench.index.reads) == 1


async def test_without_proof_an_entry_lives_no_longer_than_the_bound(bench: Bench) -> None:
    await bench.index.delete(["a"])  # and nobody tells
    bench.clock.now += 4.9
    assert "a" in await bench.ask("a")
    bench.clock.now += 0.2
    assert await bench.ask("a") == {}


async def test_an_absent_item_is_remembered_for_a_moment_only() -> None:
    bench = Bench()
    assert await bench.ask("new") == {}
    await bench.index.upsert([row("new", 1)])
    bench.clock.now += 0.5
    assert await bench.ask("new") == {}
    assert len(bench.index.reads) == 1
    bench.clock.now += 0.6
    assert "new" in await bench.ask("new")


@pytest.mark.parametrize("is_followed", [True, False])
async def test_an_announcement_ends_absence_at_once(is_followed: bool) -> None:
    bench = Bench()
    await bench.ask("new")
    await bench.index.upsert([row("new", 3)])
    if is_followed:
        bench.cache.confirm(bench.clock.now)
    bench.cache.apply(*announced("new", unit(3)))
    assert "new" in await bench.ask("new")


async def test_a_gap_in_the_topic_ends_absence() -> None:
    bench = Bench()
    await bench.ask("new")
    await bench.index.upsert([row("new", 3)])
    bench.cache.invalidate()
    assert "new" in await bench.ask("new")


async def test_a_read_overtaken_by_a_delete_is_not_kept_and_does_not_bring_the_item_back() -> None:
    bench = Bench()
    asking = await bench.ask_slowly("a")
    await bench.index.delete(["a"])
    bench.cache.apply(embedding_key(VERSION, "a"), None)
    bench.index.gate.set()
    await asking
    assert list(bench.cache.deleted) == ["a"]
    bench.cache.confirm(bench.clock.now)
    assert await bench.ask("a") == {}


async def test_a_read_overtaken_by_an_update_does_not_undo_it() -> None:
    bench = Bench()
    asking = await bench.ask_slowly("a")
    bench.cache.apply(*announced("a", unit(2)))
    bench.index.gate.set()
    await asking
    bench.cache.confirm(bench.clock.now)
    assert np.array_equal((await bench.ask("a"))["a"], unit(2))


async def test_vectors_of_another_encoder_never_come_in() -> None:
    bench = Bench()
    bench.cache.apply(*announced("a", unit(1), version="other-1"))
    bench.cache.apply(embedding_key(VERSION, "b"), announced("b", unit(1), version="other-1")[1])
    assert await bench.ask("a", "b") == {}


async def test_an_unreadable_announcement_sends_the_next_look_to_milvus(bench: Bench) -> None:
    await bench.index.upsert([row("a", 2)])
    bench.cache.apply(embedding_key(VERSION, "a"), b"{")
    bench.cache.apply(b"no key", b"{}")
    bench.cache.apply(*announced("a", np.full(DIM, np.nan, np.float32)))
    assert np.array_equal((await bench.ask("a"))["a"], unit(2))


async def test_after_a_gap_in_the_topic_nothing_cached_is_trusted(bench: Bench) -> None:
    bench.cache.invalidate()
    await bench.ask("a")
    assert len(bench.index.reads) == 2


async def test_the_cache_is_bounded_and_keeps_what_is_used() -> None:
    bench = Bench(max_items=3)
    await bench.index.upsert([row(name, i) for i, name in enumerate("abcd")])
    await bench.ask("a", "b", "c")
    await bench.ask("a")
    lookup = await bench.cache.look_up(["d"])
    assert lookup.report.cached == 3
    await bench.ask("a", "c", "d")
    assert bench.index.reads[-1] == ["d"]
    assert "b" in await bench.ask("b")
    assert bench.index.reads[-1] == ["b"]


@given(st.lists(st.tuples(st.sampled_from(["put", "drop", "ask"]), st.integers(0, 9)), max_size=80))
def test_the_table_answers_like_a_dictionary(steps: list[tuple[str, int]]) -> None:
    table = VectorTable(DIM, 10, FactsConfig())
    plain: dict[str, NDArray[np.float32]] = {}
    for number, (verb, key) in enumerate(steps):
        name = f"i{key}"
        if verb == "put":
            plain[name] = unit(number)
            table.put(name, unit(number), FACTS, at=0.0)
        elif verb == "drop":
            plain.pop(name, None)
            table.delete(name)
        found = table.gather([f"i{k}" for k in range(10)], since=0.0)[0].by_item()
        assert found.keys() == plain.keys()
        assert all(np.array_equal(found[k], plain[k]) for k in plain)
        assert len(table) == len(plain)


def test_the_table_never_copies_itself_to_grow() -> None:
    table = VectorTable(64, 20_000, FactsConfig())
    vector = np.ones(64, np.float32)
    tracemalloc.start()
    try:
        for i in range(10_000):
            table.put(f"i{i}", vector, FACTS, at=0.0)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000, "ids and hashes; the vectors alone have 2.6 MB"
    finally:
        tracemalloc.stop()


def test_a_full_table_drops_a_hundredth_of_its_items_those_unused_for_longest() -> None:
    table = VectorTable(DIM, 500, FactsConfig())
    for i in range(500):
        table.put(f"i{i}", unit(1), FACTS, at=0.0)
    table.gather([f"i{i}" for i in range(3)], since=0.0)[0]
    table.put("new", unit(2), FACTS, at=0.0)
    left = table.gather([*(f"i{i}" for i in range(500)), "new"], since=0.0)[0]
    assert left.without_vector() == [f"i{i}" for i in range(3, 9)]


async def test_ids_that_the_center_does_not_hold_are_remembered_within_the_bound() -> None:
    bench = Bench(max_items=50)
    for n in range(200):
        await bench.ask(f"unknown {n}")
    assert len(bench.cache._absent_until) == 50
    await bench.ask("unknown 199")
    assert bench.index.reads[-1] == ["unknown 199"] and len(bench.index.reads) == 200, "the newest are remembered"
    bench.clock.now += 10
    for n in range(60):
        await bench.ask(f"later {n}")
    assert all(name.startswith("later") for name in bench.cache._absent_until)


def test_the_table_grows_and_gives_copies() -> None:
    table = VectorTable(DIM, 5_000, FactsConfig())
    for i in range(3_000):
        table.put(f"i{i}", unit(i), FACTS, at=0.0)
    before = table.gather(["i0", "i2999"], since=0.0)[0].by_item()
    table.put("i0", unit(77), FACTS, at=0.0)
    assert np.array_equal(before["i0"], unit(0)) and np.array_equal(before["i2999"], unit(2999))


def test_what_the_table_hands_out_is_what_would_be_made_from_a_plain_mapping() -> None:
    table = VectorTable(DIM, 3, FactsConfig())
    for i in range(5):  # the first two make room
        table.put(f"i{i}", unit(i), FACTS, at=0.0)
    asked = ["i4", "never seen", "i2", "i0", "i4"]
    found = table.gather(asked, since=0.0)[0]
    expected = ItemRows.of(asked, {"i4": unit(4), "i2": unit(2)}, DIM)
    for name in ("vectors_UV", "has_vector_U", "hashes_U2"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert not found.hashes_U2[0].any() and found.hashes_U2[1:].all()
    assert found.has_vector_U.tolist() == [False, True, False, True, False, True]
    assert found.by_item().keys() == {"i4", "i2"} and found.without_vector() == ["never seen", "i0"]
