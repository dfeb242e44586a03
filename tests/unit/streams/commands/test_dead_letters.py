"""What `mimstream dead-letters` selects, does, prints and ends with; and what `mimstream forget` writes."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.errors import Misconfigured, Reason
from schemas.forgotten import ForgottenUser
from schemas.letters import DeadLetter
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics
from streams.commands import dead_letters, forget
from streams.dead_letters.inbox import DeadLetterTopic, Filter, only_open
from streams.dead_letters.requeue import Requeue
from streams.settings import Settings
from tests.factories.fake_consumer import FakeRecord
from tests.factories.memory_log import MemoryLog

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


class Scene(MemoryLog):
    """Three letters: an item's, a behaviour's an hour later, and a behaviour's that was dropped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(items=[[FakeRecord(0, 0, b"a", b"{", 1)]], behaviours=[[]], dead_letters=[[]])
        self.capsys = capsys
        given: Any = self
        self.letters = DeadLetterTopic(given, given, BrokerConfig(), now=lambda: NOW)
        self.bury("items", 0, b"a", b"{item", stage="decode", reason=Reason.NOT_JSON, failed_at=NOW)
        self.bury("behaviours", 0, b"u", b"{one", stage="record", reason=Reason.NOT_JSON)
        self.bury("behaviours", 1, b"v", None, stage="record", reason=Reason.NO_KEY)
        self.topics["behaviours"][0] += [FakeRecord(0, n, key, b"x") for n, key in ((0, b"u"), (1, b"v"))]

        @asynccontextmanager
        async def opened(_: Settings) -> AsyncIterator[Any]:
            yield self.letters, Requeue(given, given, BrokerConfig(), self.letters)

        monkeypatch.setattr(dead_letters, "_opened", opened)

    def bury(self, topic: str, offset: int, key: bytes, value: bytes | None, **over: Any) -> None:
        given: dict[str, Any] = {"failed_at": NOW + timedelta(hours=1), "detail": "why"} | over
        letter = DeadLetter(topic=topic, partition=0, offset=offset, key=key, value=value, **given)
        log = self.topics["dead-letters"][0]
        log.append(FakeRecord(0, len(log), letter.letter_key, value, headers=tuple(letter.headers())))

    async def send_and_wait(self, topic: str, value: Any = None, *, key: bytes, partition: int, headers: Any) -> Any:
        log = self.topics[topic.removeprefix("mim.")][partition]
        log.append(FakeRecord(partition, len(log), key, value, 2_000_000_000_000, tuple(headers)))
        return log[-1]

    def call(self, *arguments: str) -> tuple[int, Any]:
        """Status, and what was printed as JSON."""
        status, out = self.say(*arguments, "--json")
        return status, json.loads(out) if out else None

    def say(self, *arguments: str) -> tuple[int, str]:
        parser = argparse.ArgumentParser()
        dead_letters.add_arguments(parser)
        self.capsys.readouterr()
        with capture_logs():
            status = dead_letters.run(parser.parse_args(arguments), Settings())
        self.told = self.capsys.readouterr()
        return status, self.told.out

    def open(self) -> list[str]:
        return [one.id for one in only_open(asyncio.run(self.letters.read()))]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Scene:
    return Scene(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        ((), ["items/0/0", "behaviours/0/0", "behaviours/0/1"]),
        (("--topic", "items"), ["items/0/0"]),
        (("--stage", "record"), ["behaviours/0/0", "behaviours/0/1"]),
        (("--reason", "no_key"), ["behaviours/0/1"]),
        (("--since", "2026-05-01T12:30+00:00"), ["behaviours/0/0", "behaviours/0/1"]),
        (("--key", "u"), ["behaviours/0/0"]),
        (("behaviours/0/1", "items/0/0"), ["items/0/0", "behaviours/0/1"]),
        (("--limit", "1"), ["behaviours/0/1"]),
        (("behaviours/0/0", "items/0/0", "--limit", "1"), ["items/0/0", "behaviours/0/0"]),
    ],
)
def test_each_option_selects_what_it_names(scene: Scene, arguments: tuple[str, ...], listed: list[str]) -> None:
    status, rows = scene.call("list", *arguments)
    assert (status, [row["id"] for row in rows]) == (0, listed)
    assert ("these are the last 1 of 3" in scene.told.err) == (arguments[:1] == ("--limit",))


def test_a_row_has_everything_about_its_record(scene: Scene) -> None:
    _, rows = scene.call("list", "items/0/0")
    assert rows == [
        {
            "id": "items/0/0", "topic": "items", "partition": 0, "offset": 0, "key": "a", "stage": "decode",
            "reason": "not_json", "detail": "why", "attempts": 1, "first_failed_at": NOW.isoformat(),
            "last_failed_at": NOW.isoformat(), "requeued_from": None, "letters": 1, "value_bytes": 5, "handled": None,
        }
    ]  # fmt: skip
    assert "items/0/0" in scene.say("list")[1]


def test_handled_letters_are_listed_on_request_or_by_name(scene: Scene) -> None:
    assert scene.call("drop", "items/0/0")[0] == 0
    assert len(scene.call("list")[1]) == 2 and len(scene.call("list", "--all")[1]) == 3
    assert [row["handled"] for row in scene.call("list", "items/0/0")[1]] == ["dropped"]


def test_a_letter_that_is_not_there_is_told_with_status_1(scene: Scene) -> None:
    for action in ("list", "show"):
        assert scene.call(action, "items/0/0", "items/9/9")[0] == 1
        assert "there is no letter items/9/9" in scene.told.err
    status, told = scene.call("drop", "items/0/0", "items/9/9")
    assert status == 1 and told["counts"] == {"refused": 1, "dropped": 1}


def test_a_summary_counts_by_kind_and_lists_nothing(scene: Scene) -> None:
    scene.call("drop", "behaviours/0/0")
    status, rows = scene.call("list", "--summary")
    counts = {(row["topic"], row["stage"], row["reason"]): (row["open"], row["handled"]) for row in rows}
    assert status == 0 and counts == {
        ("items", "decode", "not_json"): (1, 0),
        ("behaviours", "record", "not_json"): (0, 1),
        ("behaviours", "record", "no_key"): (1, 0),
    }
    assert {row["last_failed_at"] for row in rows} >= {NOW.isoformat(), (NOW + timedelta(hours=1)).isoformat()}
    assert "no_key" in scene.say("list", "--summary")[1]


def test_a_letter_is_shown_with_its_bytes(scene: Scene) -> None:
    _, (shown,) = scene.call("show", "items/0/0")
    assert base64.b64decode(shown["value_base64"]) == b"{item"
    assert scene.call("show", "behaviours/0/1")[1][0]["value_base64"] is None
    assert "{item" in scene.say("show", "items/0/0")[1]


def test_what_is_dropped_or_sent_again_is_handled_and_what_is_not_sent_is_status_1(scene: Scene) -> None:
    assert scene.call("drop", "--stage", "record") == (
        0,
        {
            "counts": {"dropped": 2},
            "letters": [{"id": f"behaviours/0/{n}", "became": "dropped", "detail": ""} for n in (0, 1)],
        },
    )
    assert scene.open() == ["items/0/0"]
    status, told = scene.call("requeue", "--all")
    assert (status, told["counts"]) == (0, {"requeued": 1}) and scene.open() == []
    assert scene.call("requeue", "--all")[1]["counts"] == {}
    assert scene.call("drop", "items/0/0")[1]["counts"] == {"already_requeued": 1}
    assert scene.call("requeue", "behaviours/0/0")[1]["counts"] == {"already_dropped": 1}
    scene.bury("models", 0, b"m", b"x", stage="decode", reason=Reason.NOT_JSON)
    assert scene.call("requeue", "models/0/0")[0] == 1
    assert scene.say("requeue", "items/0/0")[1].endswith("1 already requeued\n")
    assert scene.say("requeue", "--key", "nobody")[1].endswith("nothing to do\n")


def test_a_letter_whose_item_was_sent_anew_since_is_not_sent_again_which_is_status_1(scene: Scene) -> None:
    scene.topics["items"][0].append(FakeRecord(0, 1, b"a", b"{}", 2))
    status, told = scene.call("requeue", "items/0/0")
    assert (status, told["counts"]) == (1, {"superseded": 1})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("requeue",), "--all"),
        (("drop",), "--all"),
        (("show",), "IDs"),
        (("list", "--limit", "0"), "--limit 0"),
        (("list", "--since", "2026-05-01T12:00"), "with a zone"),
        (("list", "--since", "5w"), "30m, 2h, 7d"),
    ],
)
def test_an_order_that_could_mean_everything_or_nothing_is_refused(
    scene: Scene, arguments: tuple[str, ...], told: str
) -> None:
    with pytest.raises(Misconfigured, match=told):
        scene.call(*arguments)


@pytest.mark.parametrize(
    ("text", "ago"), [("30m", timedelta(minutes=30)), ("2h", timedelta(hours=2)), ("7d", timedelta(days=7))]
)
def test_a_time_ago_counts_from_now(text: str, ago: timedelta) -> None:
    assert dead_letters._moment(text, NOW) == NOW - ago
    parser = argparse.ArgumentParser()
    dead_letters.add_arguments(parser)
    options = parser.parse_args(["list", "--since", text, "--key", ""])
    assert dead_letters._filter(options, NOW) == Filter(since=NOW - ago, key=b"")


# ---- forget ---------------------------------------------------------------------------------------------------------


def test_a_request_to_forget_names_the_ends_of_this_click_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[tuple[str, bytes, bytes]] = []
    stopped: list[bool] = []

    class Producer:
        async def start(self) -> None: ...

        async def stop(self) -> None:
            stopped.append(True)

        async def send_and_wait(self, topic: str, value: bytes, *, key: bytes) -> None:
            sent.append((topic, key, value))

    async def ends(*_: Any) -> dict[int, int]:
        assert _[-1] == "behaviours"
        return {0: 7, 1: 9}

    found = ClusterTopics("c", {"behaviours": "b", "forgotten": "f"}, {"behaviours": [0, 1], "forgotten": [0]})
    monkeypatch.setattr(forget, "describe_topics", lambda *_: found)
    monkeypatch.setattr(forget, "read_ends", ends)
    monkeypatch.setattr(forget, "make_producer", lambda _: Producer())
    parser = argparse.ArgumentParser()
    forget.add_arguments(parser)
    assert forget.run(parser.parse_args(["user", "u-1", "--json"]), Settings()) == 0
    ((topic, key, value),) = sent
    request = ForgottenUser.model_validate_json(value)
    assert (topic, key, stopped) == ("mim.forgotten", b"u-1", [True])
    assert (request.user_id, request.cluster_id, request.topic_id, request.ends) == ("u-1", "c", "b", {0: 7, 1: 9})
    assert ForgottenUser.model_validate_json(capsys.readouterr().out) == request
    assert forget.run(parser.parse_args(["user", "u-1"]), Settings()) == 0
    assert "mim.behaviours holds now is erased" in capsys.readouterr().out
    with pytest.raises(Misconfigured, match="is no user id"):
        forget.run(parser.parse_args(["user", ""]), Settings())
    assert len(sent) == 2
