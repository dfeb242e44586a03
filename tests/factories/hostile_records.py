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
import numpy as np

from schemas.item_states import MOST_WRITES, StateHead, state_key, state_value
from streams.broker.clients import make_producer
from streams.broker.topics import TOPICS, TopicName
from streams.settings import Settings
from trainer.features.config import FeatureConfig
from trainer.features.states import SharedCounts, TakeRows
from trainer.samples.id_hashes import id_hashes

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


def hostile_records(
    topic: TopicName, *, embedding_version: str = "", features: FeatureConfig | None = None
) -> Iterator[Hostile]:
    """Values, keys and headers of every kind. Keys that the broker refuses, null in a compacted topic, are left out."""
    if topic == "embeddings":
        yield from _embeddings(embedding_version)
        return
    if topic == "queries":
        yield from _queries(embedding_version)
        return
    if topic == "item-states":
        yield from _item_states(features or FeatureConfig())
        return
    if topic == "skew":
        yield from _skew(features or FeatureConfig())
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


def _queries(version: str) -> Iterator[Hostile]:
    name = "0" * 32

    def message(unit: bytes, dim: int, **more: object) -> bytes:
        plain = {"query": name, "encoder_version": version, "dim": dim, "vector": base64.b64encode(unit).decode()}
        return json.dumps(plain | more).encode()

    key = f"{version}:{name}".encode()
    for number, value in enumerate(VALUES):
        yield Hostile("queries", key, value, HEADERS[number % len(HEADERS)], True)
    for odd in KEYS:
        yield Hostile("queries", odd, message(b"\0\0\x80\x3f", 1), [], True)
        yield Hostile("queries", odd, None, [], True)
        yield Hostile("queries", f"{version}:".encode() + odd, message(b"\0\0\x80\x3f", 1), [], True)
    for vector in (b"\0" * 64, b"\xff" * 64, b"\xff\xff\x7f\x7f" * 16, b"\0" * 63):
        yield Hostile("queries", key, message(vector, 16), [], True)
    for other in ({"query": "f" * 32}, {"query": "<b>\x1b[31m"}, {"encoder_version": "another"}, {"schema_version": 9}):
        yield Hostile("queries", key, message(b"\0\0\x80\x3f", 1, **other), [], True)
    yield Hostile("queries", f"another:{name}".encode(), None, [], True)
    yield Hostile("queries", key, message(b"", 16, vector=None, reason="<script>\x1b[31m"), FORGED, False)


def _item_states(features: FeatureConfig) -> Iterator[Hostile]:
    """All of item `n`, which has no counts, or of all items together."""
    version, other, hashed = features.version, "0" * 16, id_hashes("n")[0]
    item, whole = state_key(version, hashed), state_key(version, None)
    row, shared = TakeRows.empty(features, 1), SharedCounts.empty().to_bytes()
    good = state_value(version, row.to_bytes(0))
    told = StateHead(number=7, before=0, left=0, log="log")
    head = state_value(version, shared, told)

    def refused(key: bytes, *values: bytes | None) -> Iterator[Hostile]:
        for number, value in enumerate(values):
            yield Hostile("item-states", key, value, HEADERS[number % len(HEADERS)], True)

    for key in (item, whole):
        yield from refused(key, *VALUES)
    colon, plain = f"{version}:".encode(), f"{hashed:016x}".encode()
    odd = [b"0" * 16, b"f" * 16, b"+" + plain[1:], plain + b"\n", plain[1:], b"HEAD", b"head ", b"", b"<b>\x1b[31m"]
    odd = [*KEYS, *(colon + one for one in (*KEYS, *odd))]
    for key in (*odd, version.upper().encode() + b":head", b"\xff" + whole[1:]):
        yield from refused(key, good, None)
    of_other = state_value(other, row.to_bytes(0))
    no_counts = []
    for count in (np.nan, np.inf, -1.0):
        row.decayed_UH[0, 1] = count
        no_counts.append(state_value(version, row.to_bytes(0)))
    for value in (good, head):
        yield from refused(
            item if value is good else whole,
            value.replace(b'"schema_version":1', b'"schema_version":9'),
            value.replace(b'"state":"', b'"state":"*'),
            value.replace(b'"state":"', b'"state":"<script>\\u001b[31m'),
            value.replace(b'"state":"', b'"state":null,"x":"'),
            value.replace(version.encode(), b"<script>\\u001b[31m"),
            of_other,
        )
    yield from refused(item, *no_counts, head, state_value(version, b""), state_value(version, b"\0" * 1_000_000))
    yield from refused(item, state_value(version, TakeRows.empty(features, 1).to_bytes(0), told))
    yield from refused(
        whole,
        *(None, good, state_value(version, shared), state_value(version, shared[1:], told)),
        state_value(version, b"\xff" * len(shared), told),
        *(head.replace(b'"number":7', b'"number":' + number) for number in (b"0", b"-1", b"9" * 400, b"1e999", b"NaN")),
        head.replace(b'"number":7', f'"number":{MOST_WRITES + 1}'.encode()),
        *(head.replace(b'"before":0', b'"before":' + second) for second in (b"9" * 400, b"Infinity", b'"<b>"')),
        *(head.replace(b'"left":0', b'"left":' + left) for left in (b"-1", b"1.5", b"{}")),
        head.replace(b'"log":"log"', b'"log":["\\u001b[31m"]'),
    )
    for key in (state_key(other, hashed), state_key(other, None)):  # of servers with other settings
        for value in (None, b"{", of_other):
            yield Hostile("item-states", key, value, [], False)
    yield Hostile("item-states", item, None, [], False)


MARKUP = "<script>\x1b[31m[/x]\u202e"


def _skew(features: FeatureConfig) -> Iterator[Hostile]:
    served = {
        "release_id": "r000001-000000000000",
        "number": 1 << 40,
        "before": 0,
        "now": 0,
        "targets": ["n"],
        "history": ["item0"],
        "history_seconds": [0],
        "values": base64.b64encode(b"\0" * 4 * len(features.names)).decode(),
        "probabilities": [0.5],
    }
    outcome = {"number": 1, "releases": ["r1"], "rows": 4, "differing": 0, "tolerance": 0.001, "largest": {}}
    outcome["compared_at"] = MOMENT

    def record(**content: object) -> bytes:
        return json.dumps({"schema_version": 1, "features": features.version} | content).encode()

    def hostile(key: bytes | None, value: bytes | None, refused: bool, headers: Headers | None = None) -> Hostile:
        return Hostile("skew", key, value, headers or [], refused)

    for number, value in enumerate((None, *VALUES)):
        yield hostile(b"rows", value, True, HEADERS[number % len(HEADERS)])
    for key in (None, *KEYS):  # no key decides anything
        yield hostile(key, record(served=served), False, FORGED)
    nan = base64.b64encode(b"\xff" * 4 * len(features.names)).decode()
    readable: list[Any] = [{"values": nan}, {"targets": ["never heard of"]}, {"now": -(1 << 61)}]
    readable += [{"release_id": MARKUP}, {"probabilities": [None]}, {"probabilities": [float("nan")]}]
    for change in readable:
        yield hostile(b"rows", record(served=served | change), False)
    yield hostile(b"rows", record(served=served | {"values": ""}, features="0" * 16), False)
    yield hostile(b"outcome", record(outcome=outcome | {"releases": [MARKUP], "largest": {MARKUP: 0.5}}), False)
    broken: list[Any] = [
        *({"values": values} for values in ("", "*", "AAAA", nan[4:], None, MARKUP)),
        *({"targets": targets} for targets in ([], ["n", "n"], ["n\n"], [MARKUP], [""], None, "n")),
        *({"history": history} for history in ([], ["item0"] * 2, [MARKUP])),
        {"history": ["item0"] * 1_001, "history_seconds": [0] * 1_001},
        {"targets": ["n"] * 101, "probabilities": [0.5] * 101},
        *({"now": second} for second in (1 << 70, float("inf"), MARKUP)),
        *({"history_seconds": seconds} for seconds in ([1 << 70], [float("nan")], [])),
        *({"probabilities": numbers} for numbers in ([], [0.5] * 2, ["x"])),
        *({"number": number} for number in (0, -1, 1 << 70, float("inf"))),
        {"release_id": "r" * 201},
    ]
    for change in broken:
        yield hostile(b"rows", record(served=served | change), True)
    broken = [
        *({name: number} for name in ("rows", "differing") for number in (-1, 10**400, float("nan"))),
        *({"tolerance": number} for number in (-1.0, float("inf"), float("nan"))),
        *({"largest": {"takes": number}} for number in (float("inf"), float("nan"), MARKUP)),
        *({"compared_at": moment} for moment in ("2026-01-01T00:00:00", MARKUP, 1e300)),
        {"releases": MARKUP},
    ]
    for change in broken:
        yield hostile(b"outcome", record(outcome=outcome | change), True)
    yield hostile(b"rows", record(), True)
    yield hostile(b"rows", record(served=served, outcome=outcome), True)
    yield hostile(b"rows", record(served=served, schema_version=9), True)
    yield hostile(b"rows", record(served=served, features=MARKUP), True)


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
