"""What `mimstream record` does before its first record, and how its parts end together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.errors import StoreUnavailable
from streams.broker.cluster import TopicIncarnation
from streams.settings import Settings
from streams.wiring import recording

OURS = TopicIncarnation("c", "mim.behaviours", "b")


class Scene:
    """All parts of a recorder, which note what is asked of them in order; its three tasks end as they are told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, bound: TopicIncarnation | None) -> None:
        self.done: list[str] = []
        self.given: dict[str, Any] = {}
        self.fails: str | None = None
        self.cancelled: list[str] = []

        def step(name: str, answer: Any = None) -> Callable[..., Any]:
            async def call(*_: Any) -> Any:
                self.done.append(name)
                return answer

            return call

        def part(name: str, **methods: Any) -> Callable[..., Any]:
            def make(*_: Any, **given: Any) -> Any:
                self.given[name] = given

                async def run(stop: asyncio.Event) -> None:
                    self.done.append(f"run {name}")
                    if self.fails == name:
                        raise StoreUnavailable(name, "away")
                    try:
                        await stop.wait()
                    except asyncio.CancelledError:
                        self.cancelled.append(name)
                        raise

                return SimpleNamespace(run=run, close=step(f"close {name}"), **methods)

            return make

        store = part("store", ping=step("ping"), bound_log=step("look", bound), clear=step("clear"), bind=step("bind"))
        client = part("client", start=step("start"), stop=step("stop"))
        for name, made in (
            ("RedisBehaviourStore", store), ("make_producer", client), ("make_consumer", part(
                "consumer", start=step("start"), stop=step("stop"))),
            ("ErasureFollower", part("erasures", open=step("open erasures"))),
            ("DeletedItemFollower", part("deleted")), ("Recorder", part("recorder")),
            ("KafkaDeadLetters", part("letters")), ("RedisDeletedItems", part("marks")),
        ):  # fmt: skip
            monkeypatch.setattr(recording, name, made)
        monkeypatch.setattr(recording, "make_redis", lambda _: None)
        monkeypatch.setattr(recording, "describe_topics", lambda *_: None)
        monkeypatch.setattr(recording, "read_incarnation", lambda *_: OURS)

        async def run_until_stopped(work: Any) -> None:
            stop = asyncio.Event()
            asyncio.get_running_loop().call_soon(lambda: self.fails or stop.set())
            await asyncio.wait_for(work(stop), 10)

        monkeypatch.setattr(recording, "run_until_stopped", run_until_stopped)

    async def record(self, *, rebuild: bool, settings: Settings | None = None) -> list[str]:
        await recording.record(settings or Settings(), rebuild=rebuild, metrics_port=None)
        return self.done[: self.done.index("open erasures") + 1]


PLAIN = ["ping", "start", "start", "bind", "open erasures"]


@pytest.mark.parametrize(
    ("bound", "replaced"),
    [(None, False), (OURS, False), (TopicIncarnation("c", "mim.behaviours", "made again"), True)],
)
async def test_a_rebuild_notes_whether_the_log_was_replaced_before_it_clears_the_store(
    monkeypatch: pytest.MonkeyPatch, bound: TopicIncarnation | None, replaced: bool
) -> None:
    scene = Scene(monkeypatch, bound=bound)
    assert await scene.record(rebuild=True) == [*PLAIN[:3], "look", "clear", *PLAIN[3:]]
    assert scene.given["recorder"]["log_replaced"] is replaced


async def test_without_a_rebuild_nothing_is_cleared_and_erasures_are_known_before_anything_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch, bound=OURS)
    assert await scene.record(rebuild=False) == PLAIN
    assert scene.given["recorder"]["log_replaced"] is False
    assert {"run recorder", "run erasures", "run deleted"} <= set(scene.done)
    consumer, config = scene.given["consumer"], Settings()
    assert consumer["group_id"] == config.topics.group("record") and consumer["max_poll_interval_ms"] == 86_400_000
    assert scene.given["client"]["max_request_size"] > config.kafka.max_record_bytes


async def test_everything_is_closed_in_the_order_opposite_to_that_of_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, bound=OURS)
    await scene.record(rebuild=False)
    closing = [name for name in scene.done if name.startswith("close") or name == "stop"]
    assert closing == ["close deleted", "close erasures", "stop", "stop", "close store"]


@pytest.mark.parametrize(("session", "heartbeat"), [(30_000, 5_000), (6_000, 1_000), (1_000, 300)])
async def test_six_heartbeats_fit_into_a_session_but_none_comes_sooner_than_the_client_can_send_it(
    monkeypatch: pytest.MonkeyPatch, session: int, heartbeat: int
) -> None:
    scene, config = Scene(monkeypatch, bound=OURS), Settings()
    short = config.model_copy(update={"record": config.record.model_copy(update={"session_timeout_ms": session})})
    await scene.record(rebuild=False, settings=short)
    consumer = scene.given["consumer"]
    assert (consumer["session_timeout_ms"], consumer["heartbeat_interval_ms"]) == (session, heartbeat)


@pytest.mark.parametrize("part", ["recorder", "erasures", "deleted"])
async def test_one_part_that_fails_ends_the_others_and_the_process(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    scene = Scene(monkeypatch, bound=OURS)
    scene.fails = part
    with pytest.raises(StoreUnavailable, match=part):
        await scene.record(rebuild=False)
    assert sorted([*scene.cancelled, part]) == ["deleted", "erasures", "recorder"]
    assert scene.done.count("stop") == 2 and "close store" in scene.done
