"""Events that are broken on purpose, each with the reason that must come out at the other end."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache

from PIL import Image

from schemas.errors import Reason


@dataclass(frozen=True, slots=True)
class BrokenEvent:
    """One broken record. It has an id of its own, so nothing good depends on it."""

    kind: str
    key: bytes
    value: bytes
    reason: Reason
    """Why it must be refused."""


BOMB_SIDE_PIXELS = 30_000
"""Width and height that the bomb claims: 900 million pixels in a few hundred bytes."""


def broken_item(kind: str, number: int, second: int, now: datetime) -> BrokenEvent:
    """An item event of one of `ITEM_KINDS`; `second` is the event time that it may claim, `now` bounds the future."""
    name = f"broken-item-{kind}-{number}"
    return _make(_ITEMS, kind, name, _good_item(name, second), now)


def broken_behaviour(kind: str, number: int, second: int, now: datetime) -> BrokenEvent:
    """A behaviour event of one of `BEHAVIOUR_KINDS`."""
    name = f"broken-event-{kind}-{number}"
    return _make(_BEHAVIOURS, kind, name, _good_behaviour(name, second), now)


Change = Callable[[dict[str, object], datetime], dict[str, object] | bytes]


def _make(
    table: dict[str, tuple[Reason, Change]], kind: str, name: str, good: dict[str, object], now: datetime
) -> BrokenEvent:
    reason, change = table[kind]
    changed = change(good, now)
    value = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    return BrokenEvent(kind, name.encode(), value, reason)


def _good_item(item_id: str, second: int) -> dict[str, object]:
    moment = datetime.fromtimestamp(second, UTC).isoformat()
    return {"schema_version": 1, "item_id": item_id, "title": "Broken on purpose", "published_at": moment}


def _good_behaviour(name: str, second: int) -> dict[str, object]:
    moment = datetime.fromtimestamp(second, UTC).isoformat()
    return {
        "schema_version": 1,
        "event_id": name,
        "kind": "exposure",
        "user_id": name,
        "item_id": "broken-item",
        "occurred_at": moment,
    }


@cache
def _truncated_picture() -> str:
    encoded = io.BytesIO()
    Image.linear_gradient("L").save(encoded, "JPEG", quality=90)
    whole = encoded.getvalue()
    return base64.b64encode(whole[: len(whole) // 2]).decode()


@cache
def _bomb_picture() -> str:
    """A PNG of a few hundred bytes whose header claims `BOMB_SIDE_PIXELS` squared pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", BOMB_SIDE_PIXELS, BOMB_SIDE_PIXELS, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000), 9)
    return base64.b64encode(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    ).decode()


# a picture alone: of an item with a title, the title is used
_ITEMS: dict[str, tuple[Reason, Change]] = {
    "not-json": (Reason.NOT_JSON, lambda good, now: b'{"item_id": '),
    "wrong-type": (Reason.WRONG_TYPE, lambda good, now: good | {"title": ["a", "list"]}),
    "no-content": (Reason.NO_CONTENT, lambda good, now: good | {"title": " "}),
    "truncated-image": (Reason.BAD_IMAGE, lambda good, now: good | {"title": "", "image": _truncated_picture()}),
    "bomb-image": (Reason.IMAGE_TOO_LARGE, lambda good, now: good | {"title": "", "image": _bomb_picture()}),
    "unknown-version": (Reason.UNKNOWN_VERSION, lambda good, now: good | {"schema_version": 99}),
    "no-zone": (
        Reason.TIMESTAMP_WITHOUT_ZONE,
        lambda good, now: good | {"published_at": str(good["published_at"]).removesuffix("+00:00")},
    ),
    "far-future": (
        Reason.TIMESTAMP_IN_FUTURE,
        lambda good, now: good | {"published_at": (now + timedelta(days=3650)).isoformat()},
    ),
}

_BEHAVIOURS: dict[str, tuple[Reason, Change]] = {
    "not-json": (Reason.NOT_JSON, lambda good, now: b"\xff\xfe not JSON"),
    "wrong-type": (Reason.WRONG_TYPE, lambda good, now: good | {"kind": "stare"}),
    "unknown-version": (Reason.UNKNOWN_VERSION, lambda good, now: good | {"schema_version": 99}),
    "no-zone": (
        Reason.TIMESTAMP_WITHOUT_ZONE,
        lambda good, now: good | {"occurred_at": str(good["occurred_at"]).removesuffix("+00:00")},
    ),
    "far-future": (
        Reason.TIMESTAMP_IN_FUTURE,
        lambda good, now: good | {"occurred_at": (now + timedelta(days=3650)).isoformat()},
    ),
}

ITEM_KINDS = tuple(_ITEMS)
BEHAVIOUR_KINDS = tuple(_BEHAVIOURS)
