"""The pre-flight's own connections: each is closed whatever it finds, and what it finds is told the right way round."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import aiokafka.admin
import pytest
from aiokafka.errors import KafkaConnectionError

from schemas.errors import BrokerUnavailable, Misconfigured, StoreUnavailable
from streams.broker.cluster import TopicIncarnation
from streams.settings import Settings
from streams.stores.histories.server import RedisServer
from streams.wiring import preflight
from streams.wiring.preflight import _CheckUnknown, run_checks

SETTINGS = Settings()
SOUND = RedisServer("7.2.4", "noeviction", 0)


@pytest.mark.parametrize("away", [False, True])
async def test_a_broker_is_left_again_whether_it_answers_or_not(monkeypatch: pytest.MonkeyPatch, away: bool) -> None:
    done: list[str] = []

    class Client:
        def __init__(self, **options: Any) -> None:
            assert options.keys() == SETTINGS.kafka.client_options().keys()

        async def start(self) -> None:
            done.append("start")
            if away:
                raise KafkaConnectionError("away")

        async def describe_cluster(self) -> dict[str, Any]:
            return {"brokers": [{}, {}], "cluster_id": "c1"}

        async def close(self) -> None:
            done.append("close")

    monkeypatch.setattr(aiokafka.admin, "AIOKafkaAdminClient", Client)
    if away:
        with pytest.raises(BrokerUnavailable):
            await preflight._broker(SETTINGS)
    else:
        assert (await preflight._broker(SETTINGS)).endswith(", 2 broker(s), cluster c1")
    assert done == ["start", "close"]


@pytest.mark.parametrize("away", [False, True])
async def test_redis_is_left_again_whether_it_answers_or_not(monkeypatch: pytest.MonkeyPatch, away: bool) -> None:
    done: list[str] = []

    async def aclose() -> None:
        done.append("close")

    async def describe(client: Any, _: Any) -> RedisServer:
        assert client is ours
        done.append("ask")
        if away:
            raise StoreUnavailable("Redis", "away")
        return SOUND

    ours = SimpleNamespace(aclose=aclose)
    monkeypatch.setattr(preflight, "make_redis", lambda _: ours)
    monkeypatch.setattr(preflight, "describe_server", describe)
    if away:
        with pytest.raises(StoreUnavailable):
            await preflight._redis(SETTINGS)
    else:
        assert "version 7.2.4" in await preflight._redis(SETTINGS)
    assert done == ["ask", "close"]


BEFORE = TopicIncarnation("c", "mim.behaviours", "before")
NOW = TopicIncarnation("c", "mim.behaviours", "now")


@pytest.mark.parametrize(
    ("bound", "told"),
    [
        (None, "empty; 'mimstream record' fills it"),
        (NOW, "7 takes and 9 exposures of mim.behaviours"),
        (BEFORE, r"was filled from topic mim\.behaviours \(id before\).* now has id now"),
    ],
)
async def test_a_view_is_of_this_log_or_told_with_the_one_that_it_is_of(
    monkeypatch: pytest.MonkeyPatch, bound: TopicIncarnation | None, told: str
) -> None:
    closed: list[int] = []

    class View:
        def __init__(self, *_: Any) -> None: ...

        async def bound_log(self) -> TopicIncarnation | None:
            return bound

        async def counts(self) -> dict[str, int]:
            return {"takes": 7, "exposures": 9}

        async def close(self) -> None:
            closed.append(1)

    monkeypatch.setattr(preflight, "RedisBehaviourStore", View)
    monkeypatch.setattr(preflight, "make_redis", lambda _: None)
    monkeypatch.setattr(preflight, "read_incarnation", lambda *_: NOW)
    if bound is BEFORE:
        with pytest.raises(Misconfigured, match=told):
            await preflight._view(SETTINGS)
    else:
        assert await preflight._view(SETTINGS) == told
    assert closed == [1]


async def test_a_redis_that_does_not_say_what_it_evicts_still_has_its_view_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fine(*_: Any, **__: Any) -> str:
        return "fine"

    async def unknown(*_: Any) -> str:
        raise _CheckUnknown("does not say", "let it")

    for name in ("broker", "topics", "partitioner", "groups", "view"):
        monkeypatch.setattr(preflight, f"_{name}", fine)
    monkeypatch.setattr(preflight, "_redis", unknown)
    lines = await run_checks(SETTINGS, lambda: SimpleNamespace(version="v", dim=8), ["record"])  # type: ignore[arg-type, return-value]
    assert {line.name: line.state for line in lines} == {
        "broker": "ok", "topics": "ok", "partitioner": "ok", "groups": "ok", "redis": "unknown",
        "behaviour view": "ok", "pictures": "ok",
    }  # fmt: skip
