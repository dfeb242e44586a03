"""What `mimstream serve` puts together: whose vectors it serves, when it ends, and what it says of its address."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.errors import Misconfigured
from streams.serving.config import ServeConfig
from streams.settings import Settings
from streams.stores.vectors.collection import CollectionInfo
from streams.wiring import serving
from streams.wiring.serving import LazyEncoder

ENCODER: Any = SimpleNamespace(version="made", dim=8)


async def test_an_encoder_is_loaded_once_whoever_asks_first_and_however_many() -> None:
    loads: list[int] = []
    lazy = LazyEncoder(lambda: loads.append(1) or ENCODER)  # type: ignore[func-returns-value]
    given = await asyncio.gather(lazy.get(), lazy.get())
    assert given == [ENCODER, ENCODER] and await lazy.get() is ENCODER and loads == [1]
    lazy.expected_version = "made"
    assert await lazy.get() is ENCODER


async def test_a_request_that_is_given_up_does_not_end_the_loading_for_others() -> None:
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    def load() -> Any:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
        return ENCODER

    lazy = LazyEncoder(load)
    first, second = asyncio.create_task(lazy.get()), asyncio.create_task(lazy.get())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    gate.set()
    assert await asyncio.wait_for(second, 10) is ENCODER


@pytest.mark.parametrize(
    ("center", "found"),
    [(("held", 16), ("held", 16)), ((None, 16), ("made", 8)), (None, ("made", 8))],
    ids=["filled", "empty", "none"],
)
async def test_the_vectors_in_use_are_the_centers_and_the_encoders_where_it_has_none(
    monkeypatch: pytest.MonkeyPatch, center: Any, found: tuple[str, int]
) -> None:
    async def read(_: Any) -> CollectionInfo | None:
        return None if center is None else CollectionInfo("c", center[1], center[0], is_filled=True)

    monkeypatch.setattr(serving, "read_center", read)
    assert await serving._vectors_in_use(Settings(), LazyEncoder(lambda: ENCODER)) == found


async def broken(error: Exception) -> None:
    raise error


async def test_a_part_that_ends_while_others_are_waited_for_ends_the_server_with_its_error() -> None:
    forever = asyncio.ensure_future(asyncio.Event().wait())
    failing = asyncio.ensure_future(broken(Misconfigured("a topic is missing")))
    with pytest.raises(Misconfigured, match="a topic is missing"):
        await serving._unless_ended([forever, failing], asyncio.Event().wait())
    await serving._unless_ended([forever], asyncio.sleep(0))  # what was waited for came
    cleanly = asyncio.ensure_future(asyncio.sleep(0))
    await asyncio.wait_for(serving._unless_ended([forever, cleanly], asyncio.Event().wait()), 10)
    late = asyncio.ensure_future(broken(ZeroDivisionError()))
    await serving._end([forever, late])
    assert forever.cancelled() and late.done()


@pytest.mark.parametrize("ends", ["with an error", "well"])
async def test_what_was_waited_for_is_given_up_once_a_part_ends(ends: str) -> None:
    given_up = asyncio.Event()

    async def waited() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    part = asyncio.ensure_future(broken(Misconfigured("x")) if ends != "well" else asyncio.sleep(0))
    await asyncio.gather(serving._unless_ended([part], waited()), return_exceptions=True)
    await asyncio.wait_for(given_up.wait(), 5)


async def test_a_part_that_fails_as_the_wait_is_over_does_not_end_the_server_with_its_error() -> None:
    failed = asyncio.ensure_future(broken(Misconfigured("on its way out")))
    await asyncio.wait([failed])
    stop = asyncio.Event()
    stop.set()
    await serving._unless_ended([failed], stop.wait())


async def listen(monkeypatch: pytest.MonkeyPatch, host: str, **config: Any) -> list[dict[str, Any]]:
    @asynccontextmanager
    async def listening(*_: Any, host: str, port: int, drain_seconds: float) -> Any:
        assert (port, drain_seconds) == (81, serving.DRAIN_SECONDS)
        if host == "taken":
            raise OSError(98, "Address already in use")
        yield host, port

    monkeypatch.setattr(serving, "listening", listening)
    nothing: Any = None
    async with AsyncExitStack() as running:
        with capture_logs() as said:
            await serving._listen(running, nothing, nothing, ServeConfig(host=host, port=81, **config))
    return said


@pytest.mark.parametrize(
    ("host", "tokens", "open_to_all"),
    [
        ("127.0.0.1", (), False),
        ("::1", (), False),
        ("0.0.0.0", (), True),
        ("0.0.0.0", ("a-token-of-the-shop",), False),
    ],
)
async def test_a_server_that_everybody_reaches_without_a_token_says_so(
    monkeypatch: pytest.MonkeyPatch, host: str, tokens: tuple[str, ...], open_to_all: bool
) -> None:
    said = await listen(monkeypatch, host, tokens=tokens)
    assert [line["event"] for line in said] == ["serve.open_to_all"] * open_to_all + ["serve.ready"]
    assert said[-1]["address"] == f"http://{host}:81"


async def test_an_address_that_cannot_be_used_is_named_with_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Misconfigured, match=r"cannot listen on taken:81 \(MIM_SERVE__HOST, MIM_SERVE__PORT\): Address"):
        await listen(monkeypatch, "taken")
