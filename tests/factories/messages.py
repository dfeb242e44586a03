"""Items as producers send them, and how they are read."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from schemas.base import decode
from schemas.items import ItemPublished

NOW = datetime(2026, 11, 1, tzinfo=UTC)
ITEM = {"item_id": "a", "title": "shirt", "published_at": "2026-01-01T00:00:00Z"}


def item(**over: object) -> dict[str, object]:
    return {name: value for name, value in (ITEM | over).items() if value is not ...}


def read(payload: object, model: type = ItemPublished, **over: object):  # type: ignore[no-untyped-def]
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return decode(model, raw, now=NOW, max_bytes=10_000, **over)  # type: ignore[arg-type]
