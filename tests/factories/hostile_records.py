"""Records that no producer should send, for every topic that is read."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import kafka

from streams.broker.clients import make_producer
from streams.broker.topics import TOPICS, TopicName
from streams.settings import Settings

Headers = list[tuple[str, bytes | None]]


class NotText(str):
    """The name of a header whose bytes are no UTF-8."""

    __slots__ = ()

    def encode(self, *_: object) -> bytes:  # type: ignore[override]
        return b"\xff\xfe" + super().encode()


@dataclass(frozen=True)
class Hostile:
    """One record."""

    topic: TopicName
    key: bytes | None
    value: bytes | None
    headers: Headers
    refused: bool
    """Whether it must be a dead letter, or be counted where its topic has none."""


MOMENT = "2025-03-01T00:00:00Z"
GOOD: dict[TopicName, dict[str, Any]] = {
    "items": {"item_id": "n", "title": "a lamp", "published_at": MOMENT},
    "behaviours": {"event_id": "n", "kind": "exposure", "user_id": "n", "item_id": "item0", "occurred_at": MOMENT},
    "forgotten": {"user_id": "n", "forgotten_at": MOMENT, "cluster_id": "c", "topic_id": "t", "ends": {}},
    "items-retry": {
        "item": {"item_id": "n", "title": "a lamp", "published_at": MOMENT},
        "source": {"partition": 0, "offset": 1},
        "attempt": 1,
        "not_before": MOMENT,
    },
    "models": {"release_id": "r000001-000000000000"},
}
_ID = {"items": "item_id", "behaviours": "user_id", "forgotten": "user_id"}

VALUES = [
    b"",
    b"null",
    b"[1]",
    b"{",
    b'{"item_id": "n", "title": "cut of',
    b'{"a":' * 50_000,
    b"[" * 100_000,
    b"9" * 10_000,
    b'{"item_id": ' + b"9" * 10_000 + b"}",
    b'{"item_id": "n", "user_id": "n", "price": NaN, "published_at": Infinity, "occurred_at": 1e999}',
    b'{"item_id": "n\\u0000", "user_id": "\\ud800", "event_id": "\\udfff", "title": "\\ud83d"}',
    b'{"item_id": ["n"], "user_id": {"a": 1}, "published_at": {}, "occurred_at": [], "kind": 7, "title": false}',
    b'{"item_id": "n", "title": "x", "published_at": 2026, "event_id": "n", "occurred_at": 20260101, "kind": "click"}',
    b"\xff\xfe\x00\x01",
    b"\x00" * 100,
    gzip.compress(json.dumps(GOOD["items"]).encode(), mtime=0),
    b'{"item_id": "<script>alert(1)</script>\\u001b[31m", "user_id": "\\n"}',
    b" " * 1_000_000,
]
KEYS = [b"", b"\xff\xfe", b"k" * 100_000, b"<script>\x1b[31m", b"a\nb", b" n", b"\x00"]
FORGED: Headers = [
    ("requeued-from", b"items/0/0"),
    ("attempts", b"3"),
    ("first-failed-at", b"2026-01-01T00:00:00+00:00"),
]
HEADERS: list[Headers] = [
    [(name, None) for name, _ in FORGED],
    [*FORGED, *FORGED],
    [("requeued-from", b"x" * 10_000), ("attempts", b"-9" * 999), ("first-failed-at", b"\xff")],
    [("attempts", b"9" * 30), ("handled", b"requeued"), ("topic", b"\xff"), ("", b"")],
    [(NotText("name"), b"value"), ("content-encoding", b"gzip")],
    [(f"h{n}", b"v" * 50) for n in range(1_000)],
    FORGED,
]


def hostile_records(topic: TopicName, *, embedding_version: str = "") -> Iterator[Hostile]:
    """Values, keys and headers of every kind. Keys that the broker refuses, null in a compacted topic, are left out."""
    if topic == "embeddings":
        yield from _embeddings(embedding_version)
        return
    if topic == "dead-letters":
        for number, headers in enumerate(HEADERS):
            yield Hostile(topic, b"items/0/1", VALUES[number], headers, True)
        for key in (None, *KEYS):
            yield Hostile(topic, key, b"{", [("topic", b"items"), ("partition", None)], True)
        return
    good = GOOD[topic]
    readable = topic in _ID
    for number, value in enumerate(VALUES):
        yield Hostile(topic, b"n", value, HEADERS[number % len(HEADERS)], topic != "models")
    for key in KEYS if TOPICS[topic].compacted else (None, *KEYS):
        yield Hostile(topic, key, json.dumps(good).encode(), [], topic != "models")
        if key is not None:
            yield Hostile(topic, key, None, [], topic not in ("forgotten", "models"))
    for number, headers in enumerate(HEADERS):
        name = f"hostile-{number}"
        known = good | ({_ID[topic]: name, "event_id": name} if readable else {})
        if topic != "items-retry":
            yield Hostile(topic, name.encode(), json.dumps(known).encode(), headers, False)


def _embeddings(version: str) -> Iterator[Hostile]:
    def message(item_id: str, vector: bytes, dim: int) -> bytes:
        plain = {
            "item_id": item_id,
            "encoder_version": version,
            "dim": dim,
            "content_hash": "c",
            "published_at": MOMENT,
        }
        plain |= {"vector": base64.b64encode(vector).decode(), "source": {"partition": 0, "offset": 0}}
        return json.dumps(plain).encode()

    name = f"{version}:n".encode()
    for number, value in enumerate(VALUES):
        yield Hostile("embeddings", name, value, HEADERS[number % len(HEADERS)], True)
    for key in KEYS:
        yield Hostile("embeddings", key, message("n", b"\0\0\x80\x3f", 1), [], True)
        yield Hostile("embeddings", key, None, [], True)
        yield Hostile("embeddings", f"{version}:".encode() + key, message("n", b"\0\0\x80\x3f", 1), [], True)
    for vector in (b"\0" * 64, b"\xff" * 64, b"\xff\xff\x7f\x7f" * 16):  # zero, NaN, the largest float
        yield Hostile("embeddings", name, message("n", vector, 16), [], True)


async def send_hostile(settings: Settings, records: list[Hostile]) -> dict[int, tuple[int, int]]:
    """Send in order. Returns (partition, offset) by position in the list."""
    places: dict[int, tuple[int, int]] = {}
    servers = settings.kafka.bootstrap_servers
    async with make_producer(settings.kafka, linger_ms=0) as producer:
        with closing(kafka.KafkaProducer(bootstrap_servers=servers)) as of_any_name:
            for number, one in enumerate(records):
                topic, record = settings.topics.full_name(one.topic), {"key": one.key, "headers": one.headers}
                if any(isinstance(name, NotText) for name, _ in one.headers):  # aiokafka sends no such name
                    sent = of_any_name.send(topic, one.value, partition=0, **record)
                    done = await asyncio.to_thread(sent.get, 60)
                else:
                    done = await producer.send_and_wait(topic, one.value, partition=0, **record)
                places[number] = (done.partition, done.offset)
    return places
