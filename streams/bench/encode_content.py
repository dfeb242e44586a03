"""What the benchmark publishes: items with pictures and texts, as the bytes of records of `items`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoders.base import ItemContent
from schemas.errors import Misconfigured
from streams.demo.packaged import open_packaged
from streams.replay.timeline import item_json
from trainer.datasets.folder import ItemRecord, open_data_set


@dataclass(frozen=True)
class BenchItems:
    """The same items twice: as records, and as what the towers are given."""

    name: str
    records: list[tuple[bytes, bytes]]
    """Key and value."""
    items: list[ItemContent]


def read_content(folder: Path | None, count: int) -> BenchItems:
    """`count` items that have a picture, spread over the set. Raises `Misconfigured` if it holds fewer."""
    data = open_packaged() if folder is None else open_data_set(folder, behaviours=False)
    order = np.random.default_rng(0).permutation(len(data.item_ids))
    chosen: list[tuple[ItemRecord, bytes]] = []
    for start in range(0, len(order), count):
        some = [data.records(int(place), int(place) + 1)[0] for place in order[start : start + count]]
        chosen += [(record, picture) for record, picture in zip(some, data.pictures.of(some), strict=True) if picture]
        if len(chosen) >= count:
            break
    else:
        raise Misconfigured(f"--items {count}: {data.name} has {len(chosen)} items with a picture")
    chosen = chosen[:count]
    return BenchItems(
        name=data.name,
        records=[(record.item_id.encode(), item_json(record, picture)) for record, picture in chosen],
        items=[record.content(picture) for record, picture in chosen],
    )
