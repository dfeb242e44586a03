"""Kafka records to messages, topic by topic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from pydantic import TypeAdapter, ValidationError

from schemas.base import ItemId, decode, produced_at
from schemas.behaviours import Behaviour
from schemas.errors import BadMessage, Reason, Unprocessable
from schemas.letters import DeadLetter
from streams.broker.clients import BrokerConfig


class Numbered(NamedTuple):
    """One record of a partition of `behaviours`; None stands for one that could not be read."""

    offset: int
    behaviour: Behaviour | None


_ITEM_ID: TypeAdapter[str] = TypeAdapter(ItemId)


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One record as it lies in its topic."""

    topic: str
    """Without prefix."""
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()

    def letter(self, stage: str, error: Unprocessable, *, failed_at: datetime, attempts: int = 1) -> DeadLetter:
        """The dead letter of this record."""
        return DeadLetter(
            topic=self.topic,
            partition=self.partition,
            offset=self.offset,
            key=self.key,
            value=self.value,
            stage=stage,
            reason=error.reason,
            detail=error.detail,
            failed_at=failed_at,
            attempts=attempts,
        ).after(self.headers)


def read_item_id(key: bytes | None) -> str:
    """The item id that a record's key holds. Raises `BadMessage`."""
    if key is None:
        raise BadMessage(Reason.NO_KEY, "a record of items needs the item's id as its key")
    try:
        return _ITEM_ID.validate_python(key.decode())
    except (UnicodeDecodeError, ValidationError):
        raise BadMessage(Reason.KEY_MISMATCH, f"key {key[:80]!r} is not an item id") from None


STAGE = "record"


class Record(Protocol):
    """The part of a Kafka record that matters here."""

    offset: int
    timestamp: int
    """When it was produced, in milliseconds since 1970."""
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


def read_batch(
    records: Sequence[Record],
    *,
    partition: int,
    now: datetime,
    max_bytes: int,
    field_map: dict[str, str] | None = None,
) -> tuple[list[Numbered], list[DeadLetter]]:
    """Decode the records of one partition; those that cannot be read are numbered too, and get a letter as of `now`.

    A record's times are judged as of the moment it was produced: a replay comes to the same verdict.
    """
    events: list[Numbered] = []
    letters: list[DeadLetter] = []
    for record in records:
        try:
            behaviour = read_behaviour(record, max_bytes=max_bytes, field_map=field_map)
        except BadMessage as error:
            events.append(Numbered(record.offset, None))
            letters.append(
                DeadLetter(
                    topic="behaviours",
                    partition=partition,
                    offset=record.offset,
                    key=record.key,
                    value=record.value,
                    stage=STAGE,
                    reason=error.reason,
                    detail=error.detail,
                    failed_at=now,
                ).after(record.headers)
            )
        else:
            events.append(Numbered(record.offset, behaviour))
    return events, letters


def read_behaviour(record: Record, *, max_bytes: int, field_map: dict[str, str] | None) -> Behaviour:
    """Decode one record, judged as of when it was produced. Raises `BadMessage`."""
    if record.value is None:
        raise BadMessage(Reason.NOT_JSON, "record has no value")
    now = produced_at(record.timestamp)
    behaviour = decode(Behaviour, record.value, now=now, max_bytes=max_bytes, field_map=field_map)
    if record.key is None:
        raise BadMessage(Reason.NO_KEY, "record has no key; it must be the user_id")
    if record.key != behaviour.user_id.encode():
        raise BadMessage(Reason.KEY_MISMATCH, f"key {record.key[:200]!r} is not the user_id {behaviour.user_id!r}")
    return behaviour


def behaviour_of(record: Any, broker: BrokerConfig, field_map: dict[str, str]) -> Behaviour | None:
    """What a record of `behaviours` says, judged as of when it was produced; None if it cannot be used."""
    try:
        return read_behaviour(record, max_bytes=broker.max_record_bytes, field_map=field_map)
    except BadMessage:
        return None
