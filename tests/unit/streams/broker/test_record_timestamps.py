"""Records whose own timestamp is none, or lies outside of the calendar: told with a reason by whoever reads them."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.base import produced_at
from schemas.errors import BadMessage, Reason
from streams.broker.clients import BrokerConfig
from streams.broker.records import SourceRecord, behaviour_of, read_batch, read_forgotten
from streams.encoder_training.topic_input import TopicContent, _add_item
from streams.indexing.item_changes import read_change
from tests.factories.fake_consumer import FakeRecord

NOW = datetime(2026, 1, 1, tzinfo=UTC)
IN_TIME = round(NOW.timestamp() * 1000)
NONE, BEFORE_THE_CALENDAR, IN_MICROSECONDS = -1, -62_135_600_400_000, IN_TIME * 1000
UNUSABLE = pytest.mark.parametrize("timestamp", [NONE, BEFORE_THE_CALENDAR, IN_MICROSECONDS, 2**63 - 1, -(2**63)])
BROKER = BrokerConfig()


def raw(key: str, timestamp: int, **fields: object) -> FakeRecord:
    return FakeRecord(0, 0, key.encode(), json.dumps(fields).encode(), timestamp)


def click(timestamp: int) -> FakeRecord:
    return raw("u", timestamp, event_id="e", kind="click", user_id="u", item_id="i", occurred_at=NOW.isoformat())


def item(timestamp: int) -> FakeRecord:
    return raw("i", timestamp, item_id="i", title="a lamp", published_at=NOW.isoformat())


@given(st.integers(-(2**63), 2**63 - 1))
@example(0)
@example(253_370_764_799_999)
@example(253_370_764_800_000)
def test_every_timestamp_that_kafka_can_hold_is_a_time_or_a_bad_message(timestamp: int) -> None:
    with suppress(BadMessage):
        assert abs(produced_at(timestamp).timestamp() * 1000 - timestamp) < 1


@UNUSABLE
def test_a_behaviour_gets_a_letter_and_its_neighbours_are_recorded(timestamp: int) -> None:
    records: list[Any] = [click(IN_TIME), click(timestamp), click(IN_TIME)]
    events, letters = read_batch(records, now=NOW, max_bytes=1_000)
    assert [event.behaviour is not None for event in events] == [True, False, True]
    assert [letter.reason for letter in letters] == [Reason.RECORD_TIMESTAMP]
    assert behaviour_of(click(timestamp), BROKER, {}) is None


@UNUSABLE
def test_an_item_is_refused_and_its_delete_obeyed(timestamp: int) -> None:
    record = item(timestamp)

    def read(value: bytes | None) -> Any:
        source = SourceRecord("items", 0, 0, timestamp, record.key, value)
        return read_change(source, max_bytes=1_000, max_ahead=NOW - NOW, field_map={})

    with pytest.raises(BadMessage) as caught:
        read(record.value)
    assert caught.value.reason is Reason.RECORD_TIMESTAMP
    assert read(None).item is None


@UNUSABLE
def test_teaching_an_encoder_counts_the_item_as_broken(timestamp: int) -> None:
    found = TopicContent()
    _add_item(found, item(timestamp), BROKER, {})
    assert (found.items, found.broken) == ({}, 1)


@pytest.mark.parametrize("timestamp", [NONE, BEFORE_THE_CALENDAR, IN_MICROSECONDS, IN_TIME // 1000])
def test_who_asked_to_be_forgotten_is_forgotten_whatever_the_clocks_say(timestamp: int) -> None:
    log = {"cluster_id": "c", "topic_id": "t", "ends": {"0": 5}}
    record = raw("anna", timestamp, user_id="anna", forgotten_at=NOW.isoformat(), **log)
    assert [user.user_id for user in read_forgotten([record], max_bytes=1_000)] == ["anna"]
