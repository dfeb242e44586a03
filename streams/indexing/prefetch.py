"""Decoding and encoding a batch before its turn, while earlier ones are still being written.

A vector is a function of content alone, so making it early cannot make it wrong. What depends on order (whether an
item changed at all, its price at first publish, whether something newer was written) is only predicted here, from the
rows as they are now, and decided in `index_batch` when all batches before are written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import numpy as np
from numpy.typing import NDArray

from schemas.errors import BadMessage, PipelineError
from schemas.items import ItemPublished
from schemas.letters import DeadLetter
from streams.broker.records import SourceRecord
from streams.indexing.contents import ItemInputs, load_content
from streams.indexing.context import IndexContext
from streams.indexing.item_changes import ItemChange, newest_changes, read_change
from streams.stores.vectors.item_index import ItemRow

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """What encoding an item needs, if `price` turns out to be its price at first publish."""

    price: float | None
    inputs: ItemInputs
    vector: Vector | None = None


@dataclass(frozen=True)
class Prefetched:
    """A decoded batch, with what was encoded ahead of its turn."""

    changes: Sequence[ItemChange]
    letters: Sequence[DeadLetter]
    """Of the records that cannot be decoded."""
    predictions: dict[tuple[int, int], Prediction] = field(default_factory=dict)
    """By partition and offset of the record."""


def decode_batch(context: IndexContext, records: Sequence[SourceRecord]) -> Prefetched:
    """Decode the records of a batch, in their order."""
    changes: list[ItemChange] = []
    letters: list[DeadLetter] = []
    for record in records:
        try:
            changes.append(
                read_change(
                    record,
                    max_bytes=context.max_record_bytes,
                    max_ahead=timedelta(seconds=context.config.max_ahead_seconds),
                    field_map=context.config.field_map,
                    outcomes=context.config.outcomes,
                )
            )
        except BadMessage as error:
            letters.append(record.letter("decode", error, failed_at=context.now()))
    return Prefetched(changes, letters)


async def prefetch(context: IndexContext, batch: Prefetched, unwritten: Collection[str]) -> None:
    """Encode what a batch seems to need, into its `predictions`. Writes nothing, retries nothing.

    Items that are `unwritten` (earlier batches hold changes of them) are left out: their rows are about to change. What
    fails is left to `index_batch`, which retries or quarantines it.
    """
    changes = [change for change in batch.changes if change.item_id not in unwritten]
    try:
        rows = await context.index.fetch(list({change.item_id: None for change in changes}), pending=True)
        needed = [
            (change, change.item, change.first_price(rows.get(change.item_id)))
            for change in newest_changes(changes, rows)
            if change.item is not None and not _is_settled(context, rows.get(change.item_id), change, change.item)
        ]
        loaded = await asyncio.gather(*(load_content(context, item, price) for _, item, price in needed))
        keys = [(change.record.partition, change.record.offset) for change, _, _ in needed]
        for key, (_, _, price), inputs in zip(keys, needed, loaded, strict=True):
            batch.predictions[key] = Prediction(price, inputs)
        ready = [(key, inputs.prepared) for key, inputs in zip(keys, loaded, strict=True) if inputs.prepared]
        vectors = await context.encoding.encode([prepared for _, prepared in ready])
    except PipelineError:
        return
    for (key, _), vector in zip(ready, vectors, strict=True):
        batch.predictions[key] = replace(batch.predictions[key], vector=vector)


def is_complete(context: IndexContext, row: ItemRow, change: ItemChange, item: ItemPublished) -> bool:
    """Whether the row's vector is the one that encoding `item` gives.

    The price at first publish is part of what encoders may look at; it changes where an item was deleted and published
    again within one batch, or had no price before.
    """
    return (
        row.encoder_version == context.encoding.version
        and row.content_hash == item.content_hash()
        and row.has_image == bool(item.image or item.image_url)
        and row.first_price == change.first_price(row)
    )


def _is_settled(context: IndexContext, row: ItemRow | None, change: ItemChange, item: ItemPublished) -> bool:
    return row is not None and (change.is_older_than(row) or is_complete(context, row, change, item))
