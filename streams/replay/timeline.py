"""A data set as one sequence of Kafka records in event-time order. Pure: no I/O but reading the set."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Literal

import numpy as np

from schemas.attributes import PublishedAtIs
from schemas.base import Message, decode
from schemas.behaviours import Behaviour, BehaviourKind
from schemas.errors import BadMessage, Misconfigured, Reason
from schemas.field_maps import FieldMap
from schemas.items import ItemPublished
from streams.replay.broken_events import BEHAVIOUR_KINDS, ITEM_KINDS, BrokenEvent, broken_behaviour, broken_item
from trainer.datasets.exposures import PUBLISHED_AT_IS, Behaviours, how_published, id_prefix
from trainer.datasets.folder import DataSet, ItemRecord

_ITEMS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One record to be sent."""

    topic: Literal["items", "behaviours"]
    key: bytes
    value: bytes
    second: int
    """Event time, in seconds since 1970. It travels in the payload; the record's own timestamp is its produce time."""
    reason: Reason | None = None
    """For an event that is broken on purpose: why it must be refused."""

    @property
    def size(self) -> int:
        """Bytes of key and value."""
        return len(self.key) + len(self.value)

    def without_picture(self) -> Outgoing | None:
        """The same record without the picture in it; None if there is none."""
        name = "image" if self.topic == "items" else "query_image"
        document = json.loads(self.value) if f'"{name}"'.encode() in self.value else {}
        if document.pop(name, None) is None:
            return None
        return replace(self, value=json.dumps(document, ensure_ascii=False).encode())


@dataclass(frozen=True)
class Timeline:
    """Items at their publish time, then the behaviours of the same second, with broken events among them.

    Iterating again gives the same records. `broken_share` of both kinds of events are added, at least one of each kind
    of damage if it is above 0, at places that `seed` decides. `now` is what "the far future" is measured from.
    """

    data: DataSet
    behaviours: Behaviours | None
    seed: int
    now: datetime
    broken_share: float = 0.0

    @property
    def items(self) -> int:
        """Records of `items`, broken ones included."""
        return len(self.data.item_ids) + self._broken_count(len(self.data.item_ids), len(ITEM_KINDS))

    @property
    def events(self) -> int:
        """Records of `behaviours`, broken ones included."""
        good = len(self.behaviours) if self.behaviours is not None else 0
        return good + self._broken_count(good, len(BEHAVIOUR_KINDS))

    def refuse_field_maps(self, items: FieldMap, behaviours: FieldMap) -> None:
        """Raise `Misconfigured` if a platform's field map reads these records, which have our own names, otherwise."""
        settings: tuple[tuple[str, FieldMap, type[Message], Iterator[Outgoing]], ...] = (
            ("MIM_INDEX__FIELD_MAP", items, ItemPublished, self._items()),
            ("MIM_RECORD__FIELD_MAP", behaviours, Behaviour, self.behaviour_records()),
        )
        for setting, field_map, model, records in settings:
            first = next(records, None) if field_map else None
            if first is None:
                continue
            read = partial(decode, model, first.value, now=self.now, max_bytes=len(first.value))
            try:
                plain = read()
            except BadMessage:
                continue  # refused for what it says, whatever the map
            try:
                alike = read(field_map=field_map) == plain
            except BadMessage:
                alike = False
            if not alike:
                raise Misconfigured(
                    f"{setting} does not read the records of a folder, which have the names of mimstream's own fields; "
                    'unset it, or give each field its own name as a further place: "item_id": ["sku", "item_id"]'
                )

    def __iter__(self) -> Iterator[Outgoing]:
        items = self._items()
        coming = next(items, None)
        for outgoing in self.behaviour_records():
            while coming is not None and coming.second <= outgoing.second:
                yield coming
                coming = next(items, None)
            yield outgoing
        if coming is not None:
            yield coming
            yield from items

    def _items(self) -> Iterator[Outgoing]:
        total = len(self.data.item_ids)
        broken = self._broken_places(total, ITEM_KINDS, stream=17)
        known = how_published(self.data).tolist()
        number = 0
        for start in range(0, total, _ITEMS_AT_ONCE):
            records = self.data.records(start, min(start + _ITEMS_AT_ONCE, total))
            for offset, (record, picture) in enumerate(zip(records, self.data.pictures.of(records), strict=True)):
                second = record.publish_ts
                payload = item_json(record, picture, published_at_is=PUBLISHED_AT_IS[known[start + offset]])
                yield Outgoing("items", record.item_id.encode(), payload, second)
                for kind in broken.get(start + offset, ()):
                    yield _outgoing("items", broken_item(kind, number, second, self.now), second)
                    number += 1

    def behaviour_records(self) -> Iterator[Outgoing]:
        """The records of `behaviours` alone, in their order."""
        log = self.behaviours
        if log is None:
            return
        broken = self._broken_places(len(log), BEHAVIOUR_KINDS, stream=19)
        prefix = id_prefix(self.data.name, self.seed)
        number = 0
        for position in range(len(log)):
            second = int(log.ts[position])
            user_id = self.data.user_ids[log.user[position]]
            event = behaviour_json(self.data, log, position, prefix)
            yield Outgoing("behaviours", user_id.encode(), event, second)
            for kind in broken.get(position, ()):
                yield _outgoing("behaviours", broken_behaviour(kind, number, second, self.now), second)
                number += 1

    def _broken_count(self, good: int, kinds: int) -> int:
        return max(kinds, round(self.broken_share * good)) if good and self.broken_share > 0 else 0

    def _broken_places(self, good: int, kinds: tuple[str, ...], *, stream: int) -> dict[int, list[str]]:
        """Position of a good event -> kinds of the broken events that follow it."""
        count = self._broken_count(good, len(kinds))
        places: dict[int, list[str]] = {}
        if count:
            for place, after in enumerate(np.random.default_rng([self.seed, stream]).integers(0, good, count)):
                places.setdefault(int(after), []).append(kinds[place % len(kinds)])
        return places


def item_json(record: ItemRecord, picture: bytes | None, *, published_at_is: PublishedAtIs = "known") -> bytes:
    """The payload of an item's publish event."""
    document: dict[str, object] = {
        "schema_version": 1,
        "item_id": record.item_id,
        "event": "publish",
        "title": record.title,
        "text": record.text,
        "published_at": _moment(record.publish_ts),
    }
    if record.category is not None:
        document["category"] = record.category
    if record.price is not None:
        document["price"] = record.price
    if record.year is not None:
        document["year"] = record.year
    if record.described:
        document["attributes"] = record.described
    if published_at_is != "known":
        document["published_at_is"] = published_at_is
    if picture:
        document["image"] = base64.b64encode(picture).decode()
    return json.dumps(document, ensure_ascii=False).encode()


def behaviour_json(data: DataSet, log: Behaviours, position: int, prefix: str) -> bytes:
    """The payload of one behaviour event; its ids follow from set, seed and row alone."""
    row = int(log.row[position])
    own_id = data.interactions.event_id[row] if data.interactions.event_id is not None and row >= 0 else None
    exposure_id = f"{prefix}-{log.exposure_name(position)}"
    taken = row >= 0 and bool(data.interactions.taken[row])
    if own_id is not None and log.draw[position] < 0 and not taken:
        exposure_id = str(own_id)
    document: dict[str, object] = {
        "schema_version": 1,
        "event_id": exposure_id,
        "kind": BehaviourKind.EXPOSURE.value,
        "user_id": data.user_ids[log.user[position]],
        "item_id": data.item_ids[log.item[position]],
        "occurred_at": _moment(int(log.ts[position])),
    }
    source = int(log.source[position])
    if source >= 0:
        document["drawn_from"] = _take_id(data, source, prefix)
        document["drawn_at"] = _moment(int(log.source_ts[position]))
    if log.is_take[position]:
        document["event_id"] = _take_id(data, row, prefix)
        document["kind"] = data.interactions.kind_of(row).value
        document["exposure_id"] = exposure_id
    if log.defines_publish[position]:
        document["defines_publish"] = True
    if log.trigger[position] >= 0:
        document["trigger_item"] = data.item_ids[log.trigger[position]]
    if (search := int(log.search[position])) >= 0 and data.searches is not None:
        if (text := data.searches.text(search)) is not None:
            document["query_text"] = text
        if (image := data.searches.images([search])[0]) is not None:
            document["query_image"] = base64.b64encode(image).decode()
    return json.dumps(document, ensure_ascii=False).encode()


def _take_id(data: DataSet, row: int, prefix: str) -> str:
    ids = data.interactions.event_id
    return f"{prefix}-t{row}" if ids is None else str(ids[row])


def _outgoing(topic: Literal["items", "behaviours"], broken: BrokenEvent, second: int) -> Outgoing:
    return Outgoing(topic, broken.key, broken.value, second, broken.reason)


def _moment(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat()
