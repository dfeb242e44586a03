"""From records of `items` to changes of items: decoding, and the newest change of each item of a batch."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from schemas.errors import BadMessage, Reason
from schemas.field_maps import FieldMap
from schemas.items import ItemPublished
from streams.broker.records import SourceRecord, read_item, read_item_id
from streams.stores.vectors.item_index import FOR_EVER, ItemRow


@dataclass(frozen=True, slots=True)
class ItemChange:
    """One valid event of an item, with the ones before it in the same batch."""

    record: SourceRecord
    item_id: str
    item: ItemPublished | None
    """None: deleted."""
    time_ms: int = 0
    """Newest timestamp of the item's records of this partition up to this one, as `ItemRow.produced_at_ms`."""
    before: ItemChange | None = None
    """The change that counts if this one turns out to be unusable."""

    def is_older_than(self, row: ItemRow | None) -> bool:
        """Whether the row comes from a newer record of the item."""
        return row is not None and row.is_newer(self.record.partition, self.record.offset, self.time_ms)

    def opposes_publish(self, row: ItemRow | None) -> bool:
        """Whether this deletion leaves an older publish in another partition, which compaction does not remove."""
        partition = self.record.partition
        if row is not None and row.source_partition != partition and not row.is_deleted:
            return True
        if row is not None and row.is_deleted and row.published_at == FOR_EVER:
            return True
        return any(one.item is not None and one.record.partition != partition for one in self.history())

    def first_price(self, row: ItemRow | None) -> float | None:
        """Price at first publish: that of the row if the item has lived since, else the first one of this life."""
        price = row.first_price if row is not None else None
        for change in self.history():
            if change.is_older_than(row):
                continue
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
    record: SourceRecord,
    *,
    max_bytes: int,
    max_ahead: timedelta,
    field_map: FieldMap,
    outcomes: Container[str] = (),
) -> ItemChange:
    """Decode one record, without attributes that are `outcomes`. Raises `BadMessage`."""
    item_id = read_item_id(record.key)
    if record.value is None:
        return ItemChange(record, item_id, None)
    item = read_item(
        record.value,
        record.timestamp_ms,
        record.headers,
        max_bytes=max_bytes,
        field_map=field_map,
        max_ahead=max_ahead,
    )
    if item.item_id != item_id:
        raise BadMessage(Reason.KEY_MISMATCH, f"key is {item_id!r}, item_id is {item.item_id!r}")
    return ItemChange(record, item_id, item.without(outcomes))


def newest_changes(changes: Sequence[ItemChange], rows: Mapping[str, ItemRow]) -> list[ItemChange]:
    """The newest change of each item; the ones before it hang on to it. Changes of a partition come in its order.

    `rows` by item id, as they are: what was written before is a part of the order.

    An item has one partition as long as all producers choose it the same way. Where they do not, the order across
    partitions is that of `ItemRow.is_newer`.
    """
    by_item: dict[str, list[ItemChange]] = {}
    for change in changes:
        its = by_item.pop(change.item_id, [])
        by_item[change.item_id] = its
        its.append(change)
    return [_in_a_row(its, rows.get(item_id)) for item_id, its in by_item.items()]


def _in_a_row(changes: Sequence[ItemChange], row: ItemRow | None) -> ItemChange:
    times: dict[int, int] = {}
    timed = []
    for change in changes:
        partition, time_ms = change.record.partition, change.record.timestamp_ms
        if row is not None and row.source_partition == partition and row.source_offset < change.record.offset:
            time_ms = max(time_ms, row.produced_at_ms)
        times[partition] = max(times.get(partition, time_ms), time_ms)
        timed.append(replace(change, time_ms=times[partition]))
    newest: ItemChange | None = None
    for change in sorted(timed, key=lambda one: (one.time_ms, one.record.partition, one.record.offset)):
        newest = replace(change, before=newest)
    assert newest is not None, "no item without a change"
    return newest
