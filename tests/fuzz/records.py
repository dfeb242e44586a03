"""Whole records of every topic that is read, through the code that the processes read them with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from schemas.behaviours import Behaviour
from schemas.errors import BadMessage
from schemas.field_maps import FieldMap, checked_field_map
from schemas.items import ItemPublished
from schemas.letters import DeadLetter
from streams.broker.clients import BrokerConfig
from streams.broker.records import SourceRecord, behaviour_of, read_batch, read_forgotten
from streams.center.repair import RecordDecoding
from streams.center.verify_announcements import AnnouncementCheck
from streams.dead_letters.inbox import DeadLetterIndex
from streams.encoder_training.topic_input import TopicContent, _add_item
from streams.indexing.config import IndexConfig
from streams.indexing.image_retries import _decode
from streams.indexing.prefetch import decode_batch
from streams.recording.deleted_items import read_states
from streams.training.vector_records import VectorRecords
from tests.factories.item_path import NOW, ItemPath
from tests.factories.vector_cache import VERSION, Bench
from trainer.samples.forgotten import ForgottenUsers
from trainer.samples.partition_merge import Entry

Headers = tuple[tuple[str, bytes | None], ...]

ITEM_MAP: FieldMap = {
    "item_id": ["sku", "payload.id", "header:ce_id"],
    "title": "names.en",
    "image_url": "pics.0.href",
    "image": "",
    "text": ["body.x.y", "body+note", "lines.text"],
    "price": {"from": ["price.value", "price"], "values": {"free": "0"}},
    "published_at": ["ts", "record:timestamp"],
}
BEHAVIOUR_MAP: FieldMap = {
    "*": "",
    "event_id": ["id", "header:ce_id", "user+ts"],
    "kind": {"from": ["name", "header:ce_type"], "values": {"seen": "exposure"}},
    "user_id": "user",
    "item_id": "lines.sku",
    "occurred_at": ["ts", "header:ce_time"],
}
MAX_BYTES = 100_000


@dataclass(frozen=True)
class Raw:
    """A record of a Kafka client."""

    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    timestamp: int = 1_777_000_000_000
    partition: int = 0
    offset: int = 1


def parse(data: bytes) -> Raw:
    """The first line is the key, `name=value` up to an empty line are headers, the rest is the value.

    A line without `=` is a header without value, `(null)` is no key or no value, and a key that begins with `@` is the
    timestamp, up to a space, and the key.
    """
    head, separator, value = data.partition(b"\n\n")
    key, *lines = head.split(b"\n")
    timestamp = Raw.timestamp
    if key.startswith(b"@"):
        number, _, key = key[1:].partition(b" ")
        timestamp = int.from_bytes(number[:8], "big", signed=True)
    pairs = (line.partition(b"=") for line in lines)
    headers = tuple((name.decode("latin-1"), found if equals else None) for name, equals, found in pairs)
    return Raw(
        None if key == b"(null)" else key, None if not separator or value == b"(null)" else value, headers, timestamp
    )


def read_everywhere(data: bytes) -> None:
    """Read one record as every topic's readers would. Each answers with a message, a dead letter, or a count."""
    record = parse(data)
    for field_map in ({}, ITEM_MAP):
        _as_item(record, field_map)
    for field_map in ({}, BEHAVIOUR_MAP):
        _as_behaviour(record, field_map)
    _as_others(record)


@cache
def _path(mapped: bool) -> ItemPath:
    return ItemPath(IndexConfig(field_map=ITEM_MAP if mapped else {}))


def _as_item(record: Raw, field_map: FieldMap) -> None:
    checked_field_map(field_map, ItemPublished)
    context = _path(bool(field_map)).context
    source = SourceRecord.of(record, "items")  # type: ignore[arg-type]
    batch = decode_batch(context, [source])
    assert len(batch.changes) + len(batch.letters) == 1
    for letter in batch.letters:
        _written(letter)
    states = read_states([record], now=0.0)
    RecordDecoding(MAX_BYTES, field_map, context.now() - context.now()).expect(source, 0)
    found = TopicContent()
    _add_item(found, record, BrokerConfig(), field_map)
    for change in batch.changes:
        assert (change.item is None) == states[change.item_id].is_deleted
        if change.item is not None and record.value is not None and len(record.value) < MAX_BYTES:
            assert found.items == {change.item_id: change.item}


def _as_behaviour(record: Raw, field_map: FieldMap) -> None:
    checked_field_map(field_map, Behaviour)
    events, letters = read_batch([record], now=NOW, max_bytes=MAX_BYTES, field_map=field_map)  # type: ignore[list-item]
    assert len(events) == 1 and (events[0].behaviour is None) == (len(letters) == 1)
    for letter in letters:
        _written(letter)
    behaviour = behaviour_of(record, BrokerConfig(max_record_bytes=MAX_BYTES), field_map)  # type: ignore[arg-type]
    assert behaviour == events[0].behaviour
    Entry(0, 1, 0.0, behaviour, record.timestamp / 1000)
    if behaviour is not None:
        assert record.key == behaviour.user_id.encode()
        Behaviour.model_validate_json(behaviour.model_dump_json())


def _written(letter: DeadLetter) -> None:
    headers = letter.headers()
    size = sum(len(name.encode()) + len(value or b"") + 16 for name, value in headers if name != "key")
    assert size < 20_000, "a letter must fit its topic"
    assert DeadLetter.from_record(letter.value, headers) == letter


def _as_others(record: Raw) -> None:
    try:
        _decode(_path(False).context, SourceRecord.of(record, "items-retry"))  # type: ignore[arg-type]
    except BadMessage as error:
        _written(SourceRecord.of(record, "items-retry").letter("decode", error, failed_at=NOW))  # type: ignore[arg-type]

    gone = ForgottenUsers("c", "t")
    for user in read_forgotten([record], max_bytes=MAX_BYTES):  # type: ignore[list-item]
        gone.add(user)
    ForgottenUsers("c", "t").restore(gone.snapshot())

    for version in (None, VERSION):
        for queries in (False, True):
            vectors = VectorRecords(version, max_bytes=BrokerConfig().max_record_bytes)
            (vectors.add_queries if queries else vectors.add_embeddings)([record])
            found = vectors.pop()
            waits = queries and version is None
            assert vectors.other_encoders + vectors.broken + len(found) == (0 if waits else 1)
            for fetched in found:
                if fetched.embedding is not None:
                    assert np.isfinite(np.frombuffer(fetched.embedding.vector or b"", "<f4")).all()
    _cache().apply(record.key, record.value)
    check: Any = SimpleNamespace(is_current=lambda version: True)
    AnnouncementCheck._decode(check, record)

    index = DeadLetterIndex()
    index.add(key=record.key, value=record.value, headers=record.headers, at=(0, 0))
    assert index.unreadable + len(index.entries()) + len(index._handled) == 1


@cache
def _cache() -> Any:
    return Bench().cache
