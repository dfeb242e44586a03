"""Where passes run, and in which order."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from streams.serving.forward_passes import ForwardPasses


class Scene:
    def __init__(self) -> None:
        self.passes = ForwardPasses(ThreadPoolExecutor(2))
        self.ran_in: dict[str, str] = {}
        self.prepared: list[str] = []
        self.may_end = threading.Event()

    async def ask(self, name: str, *, waits: bool = False) -> float:
        def prepare() -> str:
            self.prepared.append(name)
            return name

        def forward(batch: str) -> NDArray[np.float64]:
            self.ran_in[batch] = threading.current_thread().name
            if waits:
                assert self.may_end.wait(10)
            return np.array([float(len(batch))])

        batch, probabilities = await self.passes.run(prepare, forward)
        assert batch == name
        return float(probabilities[0])


async def test_a_request_alone_is_computed_on_the_loop() -> None:
    scene = Scene()
    assert await scene.ask("one") == 3.0 and await scene.ask("again") == 5.0
    assert set(scene.ran_in.values()) == {threading.current_thread().name}


async def test_while_one_is_computed_others_are_prepared_and_answered() -> None:
    scene = Scene()
    slow, quick = (
        asyncio.create_task(scene.ask("slow", waits=True)),
        asyncio.create_task(scene.ask("quick")),
    )
    assert await quick == 5.0 and not slow.done() and scene.prepared == ["slow", "quick"]
    scene.may_end.set()
    assert await slow == 4.0
    assert threading.current_thread().name not in scene.ran_in.values()


async def test_others_get_their_turn_before_each_request_is_prepared() -> None:
    scene, turns, prepared = Scene(), 0, []

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def prepare() -> str:
        prepared.append(turns)
        return "x"

    beside = asyncio.create_task(others())
    await asyncio.gather(*(scene.passes.run(prepare, lambda batch: np.zeros(1)) for _ in range(5)))
    beside.cancel()
    assert len(set(prepared)) == 5


async def test_a_pass_that_fails_leaves_the_next_one_alone() -> None:
    scene = Scene()

    def fails(batch: str) -> NDArray[np.float64]:
        raise ArithmeticError(batch)

    for _ in range(2):
        with pytest.raises(ArithmeticError):
            await scene.passes.run(lambda: "x", fails)
    await scene.ask("after")
    assert scene.ran_in["after"] == threading.current_thread().name
