"""An index worker from its claim of a slot to its end: what it gives back, and when it leaves the group."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.errors import BrokerUnavailable, Fenced
from streams.indexing.app import WrongAssignment
from streams.settings import Settings
from streams.wiring import indexing

SETTINGS = Settings()


class Scene:
    """A worker whose application ends as `ends` says; notes what was done in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: Callable[[], Awaitable[None]]) -> None:
        self.done: list[str] = []
        self.held = 0
        self.joined_for: frozenset[str] | None = None
        self.leaving: Exception | None = None
        self.keeps: Callable[[], Awaitable[None]] = asyncio.Event().wait  # type: ignore[assignment]
        scene = self

        class Slot:
            instance_id = "mim.index-3"

            async def claim(self) -> None:
                scene.done.append("claim")

            async def release(self) -> None:
                scene.done.append("release")

            async def keep(self) -> None:
                try:
                    await scene.keeps()
                except asyncio.CancelledError:
                    scene.done.append("keeps no more")
                    raise

            async def assert_held(self) -> None:
                scene.held += 1

        def load(_: Any) -> Any:
            assert scene.done == ["claim"] or not scene.done
            return SimpleNamespace(version="v1", dim=8)

        async def opened(*_: Any) -> Any:
            return Slot()

        @asynccontextmanager
        async def context(*_: Any) -> Any:
            scene.done.append("open center")
            yield SimpleNamespace(patience=None)
            scene.done.append("close center")

        async def prepare(_: Any, __: Any, guard: Any) -> None:
            await guard()
            scene.done.append("prepare")

        async def run_until_stopped(work: Any, *, grace_seconds: float) -> None:
            scene.done.append("work")
            scene.flow, scene.grace_seconds = work.args[1], grace_seconds
            await ends()

        def remove(_: Any, group: str, member: str) -> bool:
            scene.done.append(f"leave {group} {member}")
            if scene.leaving is not None:
                raise scene.leaving
            return True

        async def nothing(_: Any) -> None: ...

        self.flow: Any = None
        self.grace_seconds = 0.0
        for name, stub in (
            ("_check_topics", lambda _: None), ("read_center", nothing), ("_open_slot", opened),
            ("load_encoder", load), ("open_index_context", context), ("_prepare_center", prepare),
            ("assigned_topics", lambda *_: scene.joined_for),
            ("run_until_stopped", run_until_stopped), ("remove_member", remove),
        ):  # fmt: skip
            monkeypatch.setattr(indexing, name, stub)

    async def run(self, *, leave: bool = False) -> None:
        async with asyncio.timeout(10):
            await indexing.run_index_worker(SETTINGS, "3", leave=leave, metrics_port=None)
        await asyncio.sleep(0)


async def well() -> None:
    await asyncio.sleep(0)


def raising(error: Exception) -> Callable[[], Awaitable[None]]:
    async def ends() -> None:
        raise error

    return ends


BEGIN = ["claim", "open center", "prepare", "work"]
LEAVE = f"leave {SETTINGS.topics.group('index')} mim.index-3"


@pytest.mark.parametrize("leave", [True, False])
async def test_a_worker_that_is_stopped_leaves_the_group_only_if_asked_to(
    monkeypatch: pytest.MonkeyPatch, leave: bool
) -> None:
    scene = Scene(monkeypatch, well)
    await scene.run(leave=leave)
    assert scene.done == [*BEGIN, *[LEAVE] * leave, "close center", "release", "keeps no more"]
    assert scene.grace_seconds > SETTINGS.index.drain_seconds


@pytest.mark.parametrize("away", [None, BrokerUnavailable("Kafka", "away")])
async def test_a_worker_with_partitions_that_do_not_go_together_leaves_the_group_and_says_so(
    monkeypatch: pytest.MonkeyPatch, away: Exception | None
) -> None:
    scene = Scene(monkeypatch, raising(WrongAssignment("the group remembers it")))
    scene.leaving = away
    with pytest.raises(WrongAssignment, match="the group remembers it"):
        await scene.run()
    assert scene.done.count(LEAVE) == 1 and scene.done.index(LEAVE) < scene.done.index("release")


async def test_a_worker_that_fails_otherwise_stays_a_member_and_gives_its_slot_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch, raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        await scene.run(leave=True)
    assert LEAVE not in scene.done and "release" in scene.done


async def test_a_slot_that_is_taken_by_another_ends_the_flow_of_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ends() -> None:
        with pytest.raises(Fenced):
            await asyncio.wait_for(asyncio.shield(scene.flow.failed), 5)

    scene = Scene(monkeypatch, ends)
    scene.keeps = raising(Fenced("slot taken"))
    await scene.run()


async def test_the_slot_must_be_held_for_a_repair_and_for_every_write(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ends() -> None:
        await scene.flow.guard()()

    scene = Scene(monkeypatch, ends)
    await scene.run()
    assert scene.held >= 2


@pytest.mark.parametrize(
    ("joined_for", "leaves"),
    [
        (None, False),
        ({"mim.items", "mim.items-retry", "mim.behaviours"}, False),
        ({"mim.items", "mim.items-retry"}, True),
    ],
)
async def test_a_slot_that_had_partitions_of_other_topics_leaves_before_it_joins(
    monkeypatch: pytest.MonkeyPatch, joined_for: set[str] | None, leaves: bool
) -> None:
    async def ends() -> None: ...

    scene = Scene(monkeypatch, ends)
    scene.joined_for = None if joined_for is None else frozenset(joined_for)
    await scene.run()
    left = [one for one in scene.done if one.startswith("leave")]
    assert left == [f"leave {SETTINGS.topics.group('index')} mim.index-3"] * leaves
    if leaves:
        assert scene.done.index("claim") < scene.done.index(left[0]) < scene.done.index("work")
