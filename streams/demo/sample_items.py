"""Items of a data set that a demo publishes by themselves, or shows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from streams.replay.timeline import item_json
from trainer.datasets.folder import DataSet, ItemRecord


def live_items(data: DataSet, count: int) -> list[tuple[str, bytes]]:
    """New items whose content no worker has seen: the newest of the set under other ids and titles."""
    total = len(data.item_ids)
    records = data.records(max(0, total - count), total)
    return [
        (item_id, item_json(replace(record, item_id=item_id, title=f"{record.title} ({number})"), picture))
        for number, (record, picture) in enumerate(zip(records, data.pictures.of(records), strict=True))
        if (item_id := f"mimstream-demo-{number}")
    ]


def with_picture(data: DataSet, item_ids: Sequence[str], count: int, seed: int) -> list[ItemRecord]:
    """A few of these items, preferably some that have a picture."""
    position = {item_id: place for place, item_id in enumerate(data.item_ids)}
    chosen = random.Random(seed).sample(list(item_ids), min(4 * count, len(item_ids)))
    records = [data.records(position[item_id], position[item_id] + 1)[0] for item_id in chosen]
    seen = [picture is not None for picture in data.pictures.of(records)]
    order = sorted(range(len(records)), key=lambda place: not seen[place])
    return [records[place] for place in order[:count]]
