"""Kafka records to messages, topic by topic. A record's times are judged as of when it was produced.

So a replay of the log comes to the same verdict on every record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol

import structlog
from pydantic import TypeAdapter, ValidationError

from schemas.base import ItemId, decode, produced_at
from schemas.behaviours import Behaviour
from schemas.errors import BadMessage, Reason, Unprocessable
from schemas.field_maps import Envelope, FieldMap
from schemas.forgotten import ForgottenUser
from schemas.items import ItemPublished
from schemas.letters import DeadLetter
from schemas.times import EARLIEST_EVENT
from streams.broker.clients import BrokerConfig

log = structlog.get_logger()

STAGE = "record"
"""The stage that dead letters of `behaviours` name."""

_ANY_TIME = datetime.max.replace(tzinfo=UTC)
_ITEM_ID: TypeAdapter[str] = TypeAdapter(ItemId)


class Record(Protocol):
    """The part of a Kafka record that matters here."""

    partition: int
    offset: int
    timestamp: int
    """When it was produced, in milliseconds since 1970."""
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


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
    headers: tuple[tuple[str, bytes | None], ...] = ()

    @classmethod
    def of(cls, record: Record, topic: str) -> SourceRecord:
        """The record of a Kafka client; `topic` is the name without prefix."""
        return cls(
            topic, record.partition, record.offset, record.timestamp, record.key, record.value, tuple(record.headers)
        )

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


# ---- items -----------------------------------------------------------------------------------------------------------


def read_item_id(key: bytes | None) -> str:
    """The item id that a record's key holds. Raises `BadMessage`."""
    if key is None:
        raise BadMessage(Reason.NO_KEY, "a record of items needs the item's id as its key")
    try:
        return _ITEM_ID.validate_python(key.decode())
    except (UnicodeDecodeError, ValidationError):
        raise BadMessage(Reason.KEY_MISMATCH, f"key {key[:80]!r} is not an item id") from None


def read_item(
    value: bytes,
    timestamp_ms: int,
    headers: Sequence[tuple[str, bytes | None]],
    *,
    max_bytes: int,
    field_map: FieldMap,
    max_ahead: timedelta = timedelta(hours=1),
) -> ItemPublished:
    """Decode the value of a record; its key is not looked at. Raises `BadMessage`."""
    now = produced_at(timestamp_ms)
    return decode(
        ItemPublished,
        value,
        now=now,
        max_bytes=max_bytes,
        field_map=field_map,
        envelope=Envelope(now, headers),
        max_ahead=max_ahead,
        earliest=EARLIEST_EVENT,
    )


# ---- behaviours ------------------------------------------------------------------------------------------------------


class BehaviourRecord(NamedTuple):
    """One record of a partition of `behaviours`; None stands for one that could not be read."""

    offset: int
    behaviour: Behaviour | None


def read_behaviour(record: Record, *, max_bytes: int, field_map: FieldMap | None) -> Behaviour:
    """Decode one record. Raises `BadMessage`."""
    source = SourceRecord.of(record, "behaviours")
    return read_behaviour_of(source, max_bytes=max_bytes, field_map=field_map)


def read_behaviour_of(source: SourceRecord, *, max_bytes: int, field_map: FieldMap | None) -> Behaviour:
    """The same for a record as it lies in its topic. Raises `BadMessage`."""
    if source.value is None:
        raise BadMessage(Reason.NOT_JSON, "record has no value")
    now = produced_at(source.timestamp_ms)
    behaviour = decode(
        Behaviour,
        source.value,
        now=now,
        max_bytes=max_bytes,
        field_map=field_map,
        envelope=Envelope(now, source.headers),
        earliest=EARLIEST_EVENT,
    )
    if source.key is None:
        raise BadMessage(Reason.NO_KEY, "record has no key; it must be the user_id")
    if source.key != behaviour.user_id.encode():
        raise BadMessage(Reason.KEY_MISMATCH, f"key {source.key[:200]!r} is not the user_id {behaviour.user_id!r}")
    return behaviour


def behaviour_of(record: Record, broker: BrokerConfig, field_map: FieldMap) -> Behaviour | None:
    """Decode one record; None if it cannot be used."""
    try:
        return read_behaviour(record, max_bytes=broker.max_record_bytes, field_map=field_map)
    except BadMessage:
        return None


def read_batch(
    records: Sequence[Record], *, now: datetime, max_bytes: int, field_map: FieldMap | None = None
) -> tuple[list[BehaviourRecord], list[DeadLetter]]:
    """Decode records of one partition. Those that cannot be read are listed too, and get a letter as of `now`."""
    events: list[BehaviourRecord] = []
    letters: list[DeadLetter] = []
    for record in records:
        behaviour = None
        try:
            behaviour = read_behaviour(record, max_bytes=max_bytes, field_map=field_map)
        except BadMessage as error:
            letters.append(SourceRecord.of(record, "behaviours").letter(STAGE, error, failed_at=now))
        events.append(BehaviourRecord(record.offset, behaviour))
    return events, letters


# ---- forgotten -------------------------------------------------------------------------------------------------------


def read_forgotten(records: Sequence[Record], *, max_bytes: int) -> list[ForgottenUser]:
    """Decode records of `forgotten`. One that cannot be read is logged as an error, since a user waits for it.

    No time is judged: offsets decide what is erased, and a wrong clock must not keep a user from being forgotten.
    """
    users = []
    for record in records:
        try:
            if record.value is None:
                continue  # no process writes these; a request is not taken back
            user = decode(ForgottenUser, record.value, now=_ANY_TIME, max_bytes=max_bytes)
            if record.key != user.user_id.encode():
                raise BadMessage(Reason.KEY_MISMATCH, "the key is not the user_id")
        except BadMessage as error:
            log.error("forgotten.unreadable", partition=record.partition, offset=record.offset, error=str(error))
        else:
            users.append(user)
    return users
