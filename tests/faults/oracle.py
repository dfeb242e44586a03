"""What must hold after a round, worked out from the log alone, in the plainest way and with none of the product's code.

The log is what the broker acknowledged and kept. From it follow: what the center must hold, what each user's history
must be, which behaviours are late, repeated or broken, and which rows training must have made of the others.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from tests.faults.scenario import ATTRIBUTION_SECONDS, LATENESS_SECONDS


class Logged(NamedTuple):
    """One record as the log holds it."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    time_ms: int = 0


@dataclass
class Items:
    """What the center must hold."""

    held: dict[str, Logged] = field(default_factory=dict)
    """By item id: the record that holds the newest good word on it."""
    gone: set[str] = field(default_factory=set)
    """Items whose last word is a delete."""
    broken: dict[tuple[int, int], bytes | None] = field(default_factory=dict)
    """Value of each record that cannot be read, by partition and offset."""


def expected_items(log: Mapping[int, Sequence[Logged]]) -> Items:
    """The newest good word on each item.

    In a partition the last one is the newest. Of the newest ones of several partitions it is the one whose partition
    has seen the newest timestamp of a good word on the item, then the one of the higher partition.
    """
    found = Items()
    newest: dict[str, tuple[int, int, Logged]] = {}
    for partition, records in log.items():
        last: dict[str, tuple[int, int, Logged]] = {}
        for record in records:
            item_id = (record.key or b"").decode()
            if record.value is None or is_good_item(item_id, record.value):
                before = last[item_id][0] if item_id in last else record.time_ms
                last[item_id] = (max(before, record.time_ms), partition, record)
            else:
                found.broken[record.partition, record.offset] = record.value
        for item_id, word in last.items():
            if item_id not in newest or word[:2] > newest[item_id][:2]:
                newest[item_id] = word
    for item_id, (_, _, record) in newest.items():
        if record.value is None:
            found.gone.add(item_id)
        else:
            found.held[item_id] = record
    return found


def is_good_item(item_id: str, value: bytes) -> bool:
    """Whether an item event is one of the good ones that rounds send."""
    event = _object(value)
    if event is None or event.get("item_id") != item_id:
        return False
    title, published_at = event.get("title"), event.get("published_at")
    if not isinstance(title, str) or not isinstance(published_at, str):
        return False
    return bool(title.strip() or event.get("image_url")) and datetime.fromisoformat(published_at).tzinfo is not None


class Row(NamedTuple):
    """A training row, as far as its scores tell."""

    user: str
    item: str
    second: int
    label: int


@dataclass
class Behaviours:
    """What must have become of the click log."""

    records: int = 0
    exposures: int = 0
    takes: int = 0
    repeated: int = 0
    broken: dict[tuple[int, int], bytes | None] = field(default_factory=dict)
    histories: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    """By user: (item, event time) of the newest hundred items, each at its newest take, oldest first."""
    late: int = 0
    """In the trainer's eyes; the recorder knows no lateness."""
    repeated_in_training: int = 0
    rows: list[Row] = field(default_factory=list)
    """In training order."""
    accepted_takes: int = 0
    searched: set[str] = field(default_factory=set)
    """What anybody searched for."""


def expected_behaviours(log: Mapping[int, Sequence[Logged]]) -> Behaviours:
    """What an uninterrupted reader makes of the log."""
    found = Behaviours()
    taken: dict[str, list[tuple[float, str]]] = {}
    exposures: list[tuple[int, str, dict[str, Any]]] = []
    takes: dict[str, int] = {}
    for records in log.values():
        seen_by_recorder: set[tuple[str, str]] = set()
        seen_by_trainer: set[str] = set()
        newest: int | None = None
        for record in records:
            found.records += 1
            event = good_behaviour(record)
            if event is None:
                found.broken[record.partition, record.offset] = record.value
                continue
            if "query_text" in event:
                found.searched.add(event["query_text"])
            user, event_id, is_take = event["user_id"], event["event_id"], event["kind"] != "exposure"
            at = datetime.fromisoformat(event["occurred_at"]).timestamp()
            if (user, event_id) in seen_by_recorder:
                found.repeated += 1
            else:
                seen_by_recorder.add((user, event_id))
                found.takes += is_take
                found.exposures += not is_take
                if is_take:
                    taken.setdefault(user, []).append((at, event["item_id"]))
            second = math.floor(at)
            if event_id in seen_by_trainer:
                found.repeated_in_training += 1
            elif newest is not None and second < newest - LATENESS_SECONDS:
                found.late += 1
            else:
                seen_by_trainer.add(event_id)
                newest = second if newest is None else max(newest, second)
                if is_take:
                    found.accepted_takes += 1
                    takes[event["exposure_id"]] = second
                else:
                    exposures.append((second, event_id, event))
    for user, events in taken.items():
        events.sort(key=lambda event: event[0])
        newest = {item: place for place, (_, item) in enumerate(events)}
        found.histories[user] = [(item, at) for place, (at, item) in enumerate(events) if newest[item] == place][-100:]
    for second, event_id, event in sorted(exposures, key=lambda exposure: exposure[:2]):
        label = int(event_id in takes and second <= takes[event_id] <= second + ATTRIBUTION_SECONDS)
        found.rows.append(Row(event["user_id"], event["item_id"], second, label))
    return found


def good_behaviour(record: Logged) -> dict[str, Any] | None:
    """The event, if it is one of the good ones that rounds send."""
    event = _object(record.value or b"")
    needed = {"event_id", "kind", "user_id", "item_id", "occurred_at"}
    if event is None or not needed <= event.keys() or event["user_id"].encode() != record.key:
        return None
    return event


def twice(rows: Sequence[Row], allowed: Sequence[Row]) -> list[Row]:
    """Rows that are there more often than the log allows."""
    return list((Counter(row[:3] for row in rows) - Counter(row[:3] for row in allowed)).elements())  # type: ignore[arg-type]


def _object(value: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(value)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
