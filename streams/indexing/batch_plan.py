"""The plan of a batch of `items`: decided item by item from the rows as they are, without writing anything."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import numpy as np

from encoders.base import Prepared
from schemas.errors import Unprocessable
from schemas.items import ImageRetry, ItemPublished, SourceOffset
from schemas.letters import DeadLetter, RequeueHeaders
from streams.indexing.contents import ItemInputs, load_content
from streams.indexing.context import IndexContext
from streams.indexing.item_changes import ItemChange, newest_changes
from streams.indexing.prefetch import Prefetched, Vector, is_complete
from streams.runtime.delivery import deliver
from streams.stores.vectors.item_index import FOR_EVER, MAX_TITLE_CHARACTERS, ItemRow, deletion_mark


@dataclass
class BatchPlan:
    """The writes that a batch asks for, and what is announced without one."""

    encoded: list[ItemRow] = field(default_factory=list)
    """Rows with a new vector."""
    rewritten: list[ItemRow] = field(default_factory=list)
    """Rows whose content has not changed."""
    pending: list[ItemRow] = field(default_factory=list)
    """Rows without vector: their only content is a picture that is still to come."""
    deleted: list[ItemRow] = field(default_factory=list)
    """Marks of deleted items, in place of their rows."""
    stale: list[ItemRow] = field(default_factory=list)
    """Rows as they are: the center already holds something newer."""
    retries: list[ImageRetry] = field(default_factory=list)
    letters: list[DeadLetter] = field(default_factory=list)

    changes: dict[str, ItemChange] = field(default_factory=dict)
    """By item id: the change that its row or mark is made from."""

    @property
    def upserts(self) -> list[ItemRow]:
        """All rows of items on sale that are written."""
        return [*self.encoded, *self.rewritten, *self.pending]


_Encodable = tuple[ItemChange, Prepared, float | None]
"""A change without vector, what its vector is made from, and its first price."""


@dataclass
class BatchPlanner:
    """Plans a batch: fetches pictures and encodes where that was not prefetched."""

    context: IndexContext
    prefetched: Prefetched
    plan: BatchPlan
    rows: Mapping[str, ItemRow]
    """The rows as they are, pending ones and marks included."""
    _encodable: list[_Encodable] = field(default_factory=list)

    async def decide(self) -> None:
        """Sort the newest change of every item into the plan.

        A change that turns out to be unusable gives way to the one before it in the batch.
        """
        waiting = newest_changes(self.prefetched.changes, self.rows)
        while waiting:
            changed: list[tuple[ItemChange, ItemPublished, float | None]] = []
            for change in waiting:
                row = self.rows.get(change.item_id)
                if row is not None and change.is_older_than(row):
                    self._keep(change, row)
                    continue
                self.plan.changes[change.item_id] = change
                if change.item is None:
                    self.plan.deleted.append(self._mark(change, row))
                elif row is not None and is_complete(self.context, row, change, change.item):
                    self.plan.rewritten.append(_rewritten(self.context, row, change, change.item))
                else:
                    changed.append((change, change.item, change.first_price(row)))
            refused = await self._prepare(changed)
            for change in refused:
                del self.plan.changes[change.item_id]
            waiting = [change.before for change in refused if change.before is not None]
        await deliver(
            self._encodable,
            write=self._encode,
            quarantine=self._refuse,
            what="items.encode",
            patience=self.context.patience,
        )

    def _keep(self, change: ItemChange, row: ItemRow) -> None:
        """Leave a newer row as it is. A mark stays for good where an older publish lies in another partition."""
        elsewhere = change.item is not None and change.record.partition != row.source_partition
        if row.is_deleted and elsewhere and row.published_at != FOR_EVER:
            self.plan.deleted.append(replace(row, published_at=FOR_EVER))
        else:
            self.plan.stale.append(row)

    def _mark(self, change: ItemChange, row: ItemRow | None) -> ItemRow:
        encoding = self.context.encoding
        until = self.context.now() + self.context.deletions_kept
        return deletion_mark(
            change.item_id,
            encoder_version=encoding.version,
            dim=encoding.dim,
            partition=change.record.partition,
            offset=change.record.offset,
            time_ms=change.time_ms,
            until=FOR_EVER if change.opposes_publish(row) else until,
        )

    async def _prepare(self, changed: Sequence[tuple[ItemChange, ItemPublished, float | None]]) -> list[ItemChange]:
        """Load contents. Returns the changes that are refused."""
        loaded = await asyncio.gather(*(self._load(*one) for one in changed))
        refused: list[ItemChange] = []
        for (change, item, price), (inputs, vector) in zip(changed, loaded, strict=True):
            if inputs.late:
                self.plan.retries.append(self._first_retry(change, item))
            for stage, error in inputs.errors:
                self._add_letter(change, stage, error)
            if inputs.prepared is None:
                if inputs.errors:
                    refused.append(change)
                else:
                    self.plan.pending.append(self._row(change, None, price))
            elif vector is None:
                self._encodable.append((change, inputs.prepared, price))
            else:
                self.plan.encoded.append(self._row(change, inputs.prepared, price, vector))
        return refused

    async def _load(
        self, change: ItemChange, item: ItemPublished, price: float | None
    ) -> tuple[ItemInputs, Vector | None]:
        """The inputs of an item and, if it was prefetched for the same first price, its vector."""
        prediction = self.prefetched.predictions.get((change.record.partition, change.record.offset))
        if prediction is not None and prediction.price == price:
            return prediction.inputs, prediction.vector
        return await load_content(self.context, item, price), None

    def _first_retry(self, change: ItemChange, item: ItemPublished) -> ImageRetry:
        requeued = RequeueHeaders.from_headers(change.record.headers)
        return ImageRetry(
            item=item,
            source=SourceOffset(partition=change.record.partition, offset=change.record.offset),
            attempt=1,
            not_before=self.context.now() + timedelta(seconds=self.context.config.retry_wait_seconds(1)),
            requeued_from=requeued.letter_key.decode() if requeued else None,
            failed_before=requeued.attempts if requeued else 0,
            first_failed_at=requeued.first_failed_at if requeued else None,
        )

    async def _encode(self, part: Sequence[_Encodable]) -> None:
        vectors = await self.context.encoding.encode([prepared for _, prepared, _ in part])
        self.plan.encoded += [self._row(*one, vector) for one, vector in zip(part, vectors, strict=True)]

    async def _refuse(self, one: _Encodable, error: Unprocessable) -> None:
        del self.plan.changes[one[0].item_id]
        self._add_letter(one[0], "encode", error)

    def _add_letter(self, change: ItemChange, stage: str, error: Unprocessable) -> None:
        self.plan.letters.append(change.record.letter(stage, error, failed_at=self.context.now()))

    def _row(
        self, change: ItemChange, prepared: Prepared | None, first_price: float | None, vector: Vector | None = None
    ) -> ItemRow:
        assert change.item is not None
        encoding = self.context.encoding
        return ItemRow(
            item_id=change.item_id,
            encoder_version=encoding.version,
            vector=np.zeros(encoding.dim, np.float32) if vector is None else vector,
            content_hash=change.item.content_hash(),
            published_at=change.item.published_at,
            category=change.item.category or None,
            price=change.item.price,
            first_price=first_price,
            has_title=prepared is not None and prepared.has_title,
            has_image=prepared is not None and prepared.has_image,
            source_partition=change.record.partition,
            source_offset=change.record.offset,
            produced_at_ms=change.time_ms,
            title=change.item.title[:MAX_TITLE_CHARACTERS],
            year=change.item.year,
            attributes=self.context.attributes_of(change.item),
            published_at_is=change.item.published_at_is,
        )


def _rewritten(context: IndexContext, row: ItemRow, change: ItemChange, item: ItemPublished) -> ItemRow:
    return replace(
        row,
        published_at=item.published_at,
        price=item.price,
        attributes=context.attributes_of(item),
        published_at_is=item.published_at_is,
        source_partition=change.record.partition,
        source_offset=change.record.offset,
        produced_at_ms=change.time_ms,
    )
