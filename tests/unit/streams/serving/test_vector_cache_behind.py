"""The serving cache while its follower is behind: an announcement that it reads may be days old."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.items import embedding_key
from tests.factories.vector_cache import VERSION, Bench, announced, row, unit


async def test_an_announcement_from_the_backlog_is_not_served_before_the_end_is_proven() -> None:
    bench = Bench()
    await bench.index.upsert([row("a", 2), row("b", 3)])
    for name, seed in [("a", 1), ("b", 3), ("deleted", 7)]:
        bench.cache.apply(*announced(name, unit(seed)))
    found = await bench.ask("a", "b", "deleted")
    assert np.array_equal(found["a"], unit(2)) and np.array_equal(found["b"], unit(3)) and "deleted" not in found


async def test_what_milvus_answered_is_not_undone_by_an_older_announcement() -> None:
    bench = Bench()
    await bench.index.upsert([row("a", 2)])
    await bench.ask("a")
    bench.cache.apply(*announced("a", unit(1)))
    assert np.array_equal((await bench.ask("a"))["a"], unit(2))


async def test_a_backlog_that_was_followed_to_its_end_answers_without_milvus() -> None:
    bench = Bench()
    for seed in (1, 2):
        bench.cache.apply(*announced("a", unit(seed)))
    bench.cache.confirm(bench.clock.now)
    assert np.array_equal((await bench.ask("a"))["a"], unit(2)) and not bench.index.reads


async def test_a_deleted_item_is_scored_again_once_milvus_is_seen_to_hold_it_and_no_sooner() -> None:
    bench = Bench()
    for name in ("back", "still deleted"):
        bench.cache.apply(embedding_key(VERSION, name), None)
    await bench.index.upsert([row("back", 1)])
    bench.cache.invalidate()  # the announcement of its return is in the part that was passed over
    await bench.ask("back", "still deleted")
    assert list(bench.cache.deleted) == ["still deleted"]


@dataclass
class Lagging:
    """A center that two items come to and leave, and a cache that follows it as late as it likes."""

    bench: Bench = field(default_factory=Bench)
    announcements: list[tuple[str, int | None]] = field(default_factory=list)
    stories: dict[str, list[tuple[float, int | None]]] = field(
        default_factory=lambda: {name: [(float("-inf"), None)] for name in "ab"}
    )
    position: int = 0
    to_prove: tuple[float, int] = (0.0, 0)

    async def write(self, name: str, seed: int | None) -> None:
        await (self.bench.index.delete([name]) if seed is None else self.bench.index.upsert([row(name, seed)]))
        self.announcements.append((name, seed))
        self.stories[name].append((self.bench.clock.now, seed))

    def follow(self) -> None:
        if self.position < len(self.announcements):
            name, seed = self.announcements[self.position]
            key, value = announced(name, unit(seed or 0))
            self.bench.cache.apply(key, None if seed is None else value)
            self.position += 1

    def prove(self) -> None:
        asked_at, end = self.to_prove
        if self.position >= end:
            self.bench.cache.confirm(asked_at)
            self.to_prove = (self.bench.clock.now, len(self.announcements))

    def skip(self) -> None:
        self.position = len(self.announcements)
        self.bench.cache.invalidate()

    async def check(self) -> None:
        """What is handed out was the center's word at some time in the last five seconds."""
        found = await self.bench.ask("a", "b")
        for name, story in self.stories.items():
            ends = [at for at, _ in story[1:]] + [float("inf")]
            allowed = [seed for (_, seed), end in zip(story, ends, strict=True) if end >= self.bench.clock.now - 5]
            vector = found.get(name)
            if vector is None:
                assert None in allowed
            else:
                assert any(seed is not None and np.array_equal(vector, unit(seed)) for seed in allowed)


STEPS = ["write", "write", "delete", "follow", "follow", "prove", "wait", "moment", "skip", "ask", "ask"]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from("ab")), min_size=30, max_size=60))
@example([(step, "a") for step in ("write", "write", "wait", "follow", "ask")])
def test_however_late_the_follower_is_no_vector_is_older_than_the_bound(steps: list[tuple[str, str]]) -> None:
    async def play() -> None:
        world = Lagging()
        for number, (step, name) in enumerate(steps, start=1):
            if step in ("write", "delete"):
                await world.write(name, number if step == "write" else None)
            elif step in ("wait", "moment"):
                world.bench.clock.now += 3 if step == "moment" else 6
            elif step == "ask":
                await world.check()
            else:
                {"follow": world.follow, "prove": world.prove, "skip": world.skip}[step]()

    asyncio.run(play())
