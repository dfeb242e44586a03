"""What a replay needs of the cluster while it sends, and what it leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pytest

from schemas.errors import BrokerUnavailable
from streams.commands import replay
from streams.replay.timeline import Outgoing
from tests.factories.commands import SETTINGS


class Records(list[Outgoing]):
    """A timeline of a few records."""

    @property
    def items(self) -> int:
        return sum(one.topic == "items" for one in self)

    @property
    def events(self) -> int:
        return len(self) - self.items


class Cluster:
    """Takes records, and tells positions of groups."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.did: list[Any] = []
        self.speeds: list[float | None] = []
        whole = replay.Replay

        def started(*given: Any, speed: float | None, **more: Any) -> Any:
            self.speeds.append(speed)
            return whole(*given, speed=speed, **more)

        monkeypatch.setattr(replay, "Replay", started)
        monkeypatch.setattr(replay, "make_producer", lambda _: self)
        monkeypatch.setattr(replay, "describe_topics", lambda _, __, names: self.did.append(("asked", names)))
        monkeypatch.setattr(replay, "GroupPositions", lambda _, __, followed: self.following(followed))

    def following(self, followed: Mapping[str, Sequence[str]]) -> Cluster:
        self.did.append(("followed", followed))
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.did.append("positions closed")

    async def consumed(self) -> dict[str, dict[str, int]]:
        return {"items": {"index": 0}, "behaviours": {"record": 0, "train": 0}}

    async def start(self) -> None:
        self.did.append("started")

    async def send(self, topic: str, value: bytes | None = None, key: bytes | None = None) -> asyncio.Future[Any]:
        if value == b"away":
            raise BrokerUnavailable("Kafka", "away")
        self.did.append(("sent", topic, key))
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future

    async def flush(self) -> None: ...

    async def stop(self) -> None:
        self.did.append("stopped")


ITEM, EVENT = Outgoing("items", b"a", b"{}", 0), Outgoing("behaviours", b"u", b"{}", 0)


async def alone() -> bool:
    """Whether no other task is left."""
    await asyncio.sleep(0)
    return asyncio.all_tasks() == {asyncio.current_task()}


async def test_groups_are_followed_by_their_topics_and_everything_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, timeline = Cluster(monkeypatch), Records([ITEM, EVENT])
    given: Any = timeline
    sent = await replay.send(given, SETTINGS, ["index", "record", "train"], 9.0)
    assert (sent.items, sent.behaviours, sent.acknowledged, cluster.speeds) == (1, 1, 2, [9.0])
    assert cluster.did == [
        ("asked", ["items", "behaviours"]),
        ("followed", {"items": ["index"], "behaviours": ["record", "train"]}),
        "started", ("sent", "mim.items", b"a"), ("sent", "mim.behaviours", b"u"), "stopped", "positions closed",
    ]  # fmt: skip
    assert await alone()


async def test_items_alone_need_no_topic_of_behaviours_and_a_failure_closes_everything_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(monkeypatch)
    given: Any = Records([ITEM, Outgoing("items", b"b", b"away", 0)])
    with pytest.raises(BrokerUnavailable):
        await replay.send(given, SETTINGS, [], None)
    assert cluster.did == [("asked", ["items"]), "started", ("sent", "mim.items", b"a"), "stopped"]
    assert await alone() and cluster.speeds == [None]
