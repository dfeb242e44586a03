"""Which of two records of an item is the newer one, where they lie in different partitions of `items`.

Producers that hash keys differently write an item to two partitions. The order is that of the item index
(`streams.stores.vectors.item_index.ItemRow.is_newer`): the offset within a partition; across partitions the newest
timestamp so far, and the partition if times are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

_PARTITIONS = 1024
LATEST_MS = (1 << 53) // _PARTITIONS - 1
"""Later times count as this one, of the year 2248: a place is exact as a float."""


class ItemState(NamedTuple):
    """What the last record of an item in a batch of one partition says."""

    time_ms: int
    """Newest timestamp of the item's records in the batch, milliseconds since 1970."""
    is_deleted: bool


def place_at(time_ms: int, partition: int = 0) -> int:
    """The place in the order, as one number; of partition 0 it is the first of its time."""
    return min(time_ms, LATEST_MS) * _PARTITIONS + partition % _PARTITIONS


def newer_states(
    states: Mapping[str, ItemState], known: Mapping[str, int | None], *, partition: int
) -> dict[str, tuple[int, bool]]:
    """Of states that were read from `partition`, those that are newer than the item's `known` place: the place of each,
    and whether it is deleted.

    A state is newer than one that was read before it from the same partition, and than one whose place is not kept.
    """
    found = {}
    for item, state in states.items():
        place, before = place_at(state.time_ms, partition), known.get(item)
        if before is not None and before % _PARTITIONS == partition % _PARTITIONS:
            place = max(place, before)  # a producer's clock may step back
        elif before is not None and place < before:
            continue
        found[item] = (place, state.is_deleted)
    return found
