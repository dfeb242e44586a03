"""Records to messages: whose key a record has to have, and what is told of one that cannot be read."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.errors import BadMessage, Reason
from streams.broker.clients import BrokerConfig
from streams.broker.records import (
    SourceRecord,
    behaviour_of,
    read_batch,
    read_behaviour,
    read_forgotten,
    read_item_id,
)
from tests.factories.fake_consumer import IN_TIME_MS, FakeRecord

NOW = datetime(2026, 5, 1, tzinfo=UTC)
CLICK = {"event_id": "e", "kind": "click", "user_id": "ü", "item_id": "i", "occurred_at": "2026-01-01T00:00:00Z"}


def click(offset: int = 0, *, key: bytes | None = "ü".encode(), **changes: Any) -> Any:
    return FakeRecord(3, offset, key, json.dumps(CLICK | changes).encode())


def test_a_key_of_items_is_an_item_id() -> None:
    assert read_item_id("商品:7".encode()) == "商品:7"
    for key, reason in (
        (None, Reason.NO_KEY),
        (b"", Reason.KEY_MISMATCH),
        (b"\xff", Reason.KEY_MISMATCH),
        (b"a\nb", Reason.KEY_MISMATCH),
        (b"x" * 5_000, Reason.KEY_MISMATCH),
    ):
        with pytest.raises(BadMessage) as caught:
            read_item_id(key)
        assert caught.value.reason is reason and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (FakeRecord(3, 0, b"u", None), Reason.NOT_JSON),
        (FakeRecord(3, 0, b"u", b"{"), Reason.NOT_JSON),
        (click(key=None), Reason.NO_KEY),
        (click(key=b"u"), Reason.KEY_MISMATCH),
        (click(key="ü".encode("latin-1")), Reason.KEY_MISMATCH),
        (click(key=b""), Reason.KEY_MISMATCH),
        (click(query_text="x" * 500), Reason.TOO_LARGE),
    ],
    ids=["no value", "broken", "no key", "another", "another encoding", "empty", "too large"],
)
def test_a_behaviour_that_cannot_be_read_has_its_reason(record: Any, reason: Reason) -> None:
    limit = len(click().value or b"") + 100
    with pytest.raises(BadMessage) as caught:
        read_behaviour(record, max_bytes=limit, field_map=None)
    assert caught.value.reason is reason
    assert read_behaviour(click(), max_bytes=limit, field_map=None).user_id == "ü"
    assert behaviour_of(click(key=b"u"), BrokerConfig(), {}) is None


def test_a_batch_has_an_event_for_each_record_and_a_letter_for_each_that_cannot_be_read() -> None:
    again = (("requeued-from", b"behaviours/3/1"), ("attempts", b"2"), ("first-failed-at", b"2026-01-01T00:00:00Z"))
    broken = FakeRecord(3, 8, b"k", b"{", headers=(("trace", b"7"), *again))
    given: list[Any] = [click(4), broken, click(9, key=b"u")]
    events, letters = read_batch(given, now=NOW, max_bytes=1_000)
    assert [(event.offset, event.behaviour is None) for event in events] == [(4, False), (8, True), (9, True)]
    first, second = letters
    assert (first.topic, first.partition, first.offset, first.key, first.value) == ("behaviours", 3, 8, b"k", b"{")
    assert (first.stage, first.failed_at, first.attempts) == ("record", NOW, 3)
    assert (first.requeued_from, first.record_headers) == ("behaviours/3/1", (("trace", b"7"),))
    assert (second.offset, second.reason, second.attempts) == (9, Reason.KEY_MISMATCH, 1)


def test_a_source_record_is_the_clients_record_under_its_short_name() -> None:
    record: Any = FakeRecord(3, 8, b"k", None, headers=(("a", None),))
    assert SourceRecord.of(record, "items") == SourceRecord("items", 3, 8, IN_TIME_MS, b"k", None, (("a", None),))


def test_a_request_to_forget_that_cannot_be_read_is_told_and_the_others_are_obeyed() -> None:
    log = {"forgotten_at": "2026-01-01T00:00:00Z", "cluster_id": "c", "topic_id": "t", "ends": {"0": 5}}

    def asked(offset: int, user: str, key: bytes | None) -> FakeRecord:
        return FakeRecord(0, offset, key, json.dumps(log | {"user_id": user}).encode())

    records: list[Any] = [
        asked(0, "ann", b"ann"),
        asked(1, "bob", b"ann"),
        asked(2, "cid", None),
        FakeRecord(0, 3, b"dan", b"{"),
        FakeRecord(0, 4, b"ann", None),
        asked(5, "eve", b"eve"),
    ]
    with capture_logs() as lines:
        assert [user.user_id for user in read_forgotten(records, max_bytes=1_000)] == ["ann", "eve"]
    assert [(line["offset"], line["log_level"]) for line in lines] == [(1, "error"), (2, "error"), (3, "error")]
