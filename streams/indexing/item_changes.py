"""From records of `items` to changes of items: decoding, and the newest change of each item of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from schemas.errors import BadMessage, Reason
from schemas.items import ItemPublished
from streams.broker.records import SourceRecord, read_item, read_item_id
from streams.stores.vectors.item_index import ItemRow


@dataclass(frozen=True, slots=True)
class ItemChange:
    """One valid event of an item, with the ones before it in the same batch."""

    record: SourceRecord
    item_id: str
    item: ItemPublished | None
    """None: deleted."""
    before: ItemChange | None = None
    """The change that counts if this one turns out to be unusable."""

    def first_price(self, row: ItemRow | None) -> float | None:
        """Price at first publish: that of the row if the item has lived since, else the first one of this life."""
        price = row.first_price if row is not None else None
        for change in self.history():
            if change.item is None:
                price = None
            elif price is None:
                price = change.item.price
        return price

    def history(self) -> list[ItemChange]:
        """Oldest first, this one included."""
        found: list[ItemChange] = []
        at: ItemChange | None = self
        while at is not None:
            found.append(at)
            at = at.before
        return found[::-1]


def read_change(
    record: SourceRecord, *, max_bytes: int, max_ahead: timedelta, field_map: Mapping[str, str]
) -> ItemChange:
    """Decode one record. Raises `BadMessage`."""
    item_id = read_item_id(record.key)
    if record.value is None:
        return ItemChange(record, item_id, None)
    item = read_item(record.value, record.timestamp_ms, max_bytes=max_bytes, field_map=field_map, max_ahead=max_ahead)
    if item.item_id != item_id:
        raise BadMessage(Reason.KEY_MISMATCH, f"key is {item_id!r}, item_id is {item.item_id!r}")
    return ItemChange(record, item_id, item)


def newest_changes(changes: Sequence[ItemChange]) -> list[ItemChange]:
    """The last change of each item; the ones before it hang on to it.

    Changes come in partition order, and an item has one partition, so the last one is the newest.
    """
    newest: dict[str, ItemChange] = {}
    for change in changes:
        before = newest.pop(change.item_id, None)
        newest[change.item_id] = ItemChange(change.record, change.item_id, change.item, before)
    return list(newest.values())


def is_newer(row: ItemRow, record: SourceRecord) -> bool:
    """Whether a row comes from a newer record than `record`.

    Within a partition offsets decide. Where a topic was deleted and created again they start over; its records are
    younger than the row then, so offset and time must agree.
    """
    return (
        row.source_partition == record.partition
        and row.source_offset > record.offset
        and row.produced_at_ms >= record.timestamp_ms
    )
