"""Whose connection makes room for the next one, and how many there can be with the open files that there are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog

from streams.serving.connections import Connections, affordable_connections


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.is_closed = b"", False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.is_closed = True


class Inner(asyncio.Protocol):
    """Notes what reaches it."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def connection_made(self, transport: Any) -> None:
        self.heard.append("made")

    def data_received(self, data: bytes) -> None:
        self.heard.append(data)

    def eof_received(self) -> bool | None:
        self.heard.append("end")
        return True

    def pause_writing(self) -> None:
        self.heard.append("pause")

    def resume_writing(self) -> None:
        self.heard.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.heard.append(exc)


class Scene:
    def __init__(self, limit: int) -> None:
        self.dropped: list[str] = []
        self.inner: list[Inner] = []
        self.connections = Connections(limit, 30.0, lambda report: self.dropped.append(report.reason))  # type: ignore[attr-defined]
        self.connections.serve = self.made

    def made(self) -> Inner:
        self.inner.append(Inner())
        return self.inner[-1]

    def connect(self) -> tuple[Wire, Any]:
        wire, guard = Wire(), self.connections()
        guard.connection_made(wire)
        return wire, guard


async def test_one_more_than_there_is_room_for_closes_the_longest_waiting_and_answers_only_itself() -> None:
    scene = Scene(limit=2)
    (first, _), (second, _) = scene.connect(), scene.connect()
    assert scene.dropped == [] and len(scene.connections) == 2
    third, _ = scene.connect()
    assert (first.is_closed, first.written, second.is_closed, third.is_closed) == (True, b"", False, False)
    with scene.connections.in_hand(second), scene.connections.in_hand(third):
        fourth, _ = scene.connect()
        assert fourth.is_closed and fourth.written.startswith(b"HTTP/1.1 503") and not second.is_closed
    assert scene.dropped == ["full", "full"] and len(scene.connections) == 2


async def test_a_connection_that_was_answered_waits_anew_at_the_end_of_the_line() -> None:
    scene = Scene(limit=2)
    (first, _), (second, _) = scene.connect(), scene.connect()
    with scene.connections.in_hand(first):
        pass
    scene.connect()
    assert second.is_closed and not first.is_closed
    with scene.connections.in_hand(None), scene.connections.in_hand(Wire()):
        assert len(scene.connections) == 2


async def test_a_connection_that_is_lost_in_hand_leaves_no_place_behind() -> None:
    scene = Scene(limit=1)
    wire, guard = scene.connect()
    with scene.connections.in_hand(wire):
        guard.connection_lost(None)
        assert len(scene.connections) == 0
    other, _ = scene.connect()
    assert not other.is_closed and scene.dropped == []
    scene.connect()
    assert other.is_closed and scene.dropped == ["full"] and len(scene.connections) == 1


async def test_time_runs_from_the_first_byte_of_a_head_and_not_while_a_request_is_in_hand() -> None:
    scene = Scene(limit=2)
    wire, guard = scene.connect()

    def deadline() -> Any:
        return guard.deadline

    assert deadline() is None
    guard.data_received(b"GET")
    began = deadline()
    guard.data_received(b" /")
    assert deadline() is began is not None
    with scene.connections.in_hand(wire):
        assert deadline() is None and began.cancelled()
        guard.data_received(b"body")
        assert deadline() is None
    guard.data_received(b"GET")
    assert deadline() is not None
    guard.connection_lost(None)
    assert deadline() is None


async def test_everything_reaches_the_protocol_behind() -> None:
    scene = Scene(limit=1)
    _, guard = scene.connect()
    guard.data_received(b"x")
    assert guard.eof_received() is True
    guard.pause_writing()
    guard.resume_writing()
    lost = ConnectionResetError()
    guard.connection_lost(lost)
    assert scene.inner[0].heard == ["made", b"x", "end", "pause", "resume", lost]


@pytest.mark.parametrize(
    ("soft", "hard", "fails", "allowed", "set_to"),
    [
        (1_320, 4_096, False, 1_000, None),
        (1_319, 1_320, False, 1_000, 1_320),
        (1_319, 1_319, False, 999, 1_319),
        (1_024, 4_096, True, 704, 1_320),
        (100, 100, False, 1, 100),
    ],
)
def test_as_many_connections_are_taken_as_files_can_be_opened(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, fails: bool, allowed: int, set_to: int | None
) -> None:
    given: list[int] = []

    def setrlimit(_: int, limits: tuple[int, int]) -> None:
        given.append(limits[0])
        assert limits[1] == hard
        if fails:
            raise OSError("not allowed")

    monkeypatch.setattr("streams.serving.connections.resource.getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr("streams.serving.connections.resource.setrlimit", setrlimit)
    with structlog.testing.capture_logs() as said:
        assert affordable_connections(1_000, 320) == allowed
    assert given == [] if set_to is None else given == [set_to]
    assert [line["connections"] for line in said] == ([allowed] if allowed < 1_000 else [])
