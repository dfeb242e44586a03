"""Comparing the topic `items` with the center: decisions alone, without reading or writing anything."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from schemas.items import ItemPublished, SourceOffset
from streams.stores.vectors.item_index import ItemRow

Fault = Literal["missing", "stale", "resurrected", "wrong", "misannounced"]
STALE_ANNOUNCEMENT: Final = "misannounced"  # its name in reports
FAULTS: tuple[Fault, ...] = ("missing", "stale", "resurrected", "wrong", STALE_ANNOUNCEMENT)

EXAMPLES = 100
"""Findings that a report lists; all are counted."""

_SETTLE_EVERY = 1_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One item about which topic and center disagree."""

    fault: Fault
    item_id: str
    partition: int
    offset: int | None
    """The newest record of the item; None if there is none any more. Of a stale announcement: in `embeddings`."""
    detail: str


@dataclass(frozen=True, slots=True)
class Position:
    """How far a partition of `items` was read."""

    partition: int
    committed: int | None
    """The group's committed offset; None if it never acknowledged anything."""
    start: int
    end: int
    recent: int | None
    """First offset produced within the deletes' retention; None if there is none."""


@dataclass(frozen=True, slots=True)
class Overdue:
    """A partition of which the center may not hold what was acknowledged, or may hold what was deleted unseen."""

    partition: int
    committed: int | None
    end: int


@dataclass
class CenterReport:
    """What a comparison found, and what a repair left of it."""

    records: int = 0
    """Records of `items` that were looked at."""
    items: int = 0
    """Items that are on sale according to the topic."""
    waiting: int = 0
    """Items whose newest record no worker has acknowledged yet; they are not judged."""
    unusable: int = 0
    """Items whose newest record cannot be used: it has a dead letter, or cannot be decoded."""
    split: int = 0
    """Items with records in several partitions: their producers hash keys differently, or partitions were added."""
    foreign: int = 0
    """Items whose newest record does not lie where murmur2 of its key puts it."""
    changed_meanwhile: int = 0
    """Items with a newer record since they were read; they are not judged."""
    found: Counter[Fault] = field(default_factory=Counter)
    examples: list[Finding] = field(default_factory=list)
    mended: int = 0
    left: int = 0
    """Faults that are still there after a repair."""
    repaired: bool = False
    seconds: float = 0.0

    def add(self, finding: Finding) -> None:
        """Count a finding; keep the first few whole."""
        self.found[finding.fault] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(finding)

    @property
    def faults(self) -> int:
        """How many items are not as they should be."""
        return sum(self.found.values())


class KeyedOffsets:
    """The newest record of every key of a topic, in 29 bytes a key. Partitions are added one after another.

    Within a partition the last record of a key is the newest. Across partitions it is the one with the newest
    timestamp so far, as `ItemRow.is_newer` has it.

    Keys are distinguished by 64 bits of a hash. Two that share them would hide a fault of the older; among a hundred
    million keys the chance that any two do is one in four thousand.
    """

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._times = array("q")
        self._words = array("q")  # offset twice, plus one if the record is a delete
        self._next_settling = _SETTLE_EVERY
        self._keys = np.zeros(0, np.uint64)
        """Sorted, and contiguous: a search in it copies nothing."""
        self._rows = _no_rows()

    def add(self, key: bytes, offset: int, time_ms: int, *, deleted: bool) -> None:
        """Add a record of the present partition. They come in the order of their offsets."""
        self._hashes.append(_hash(key))
        self._times.append(time_ms)
        self._words.append(2 * offset + deleted)
        if len(self._hashes) >= self._next_settling:
            self._settle()
            self._next_settling = len(self._hashes) + _SETTLE_EVERY

    def end_partition(self, partition: int) -> None:
        """All records of a partition were added. Call it before any query."""
        self._settle()
        its = _no_rows(len(self._hashes))
        its["time"], its["word"], its["partition"] = self._times, self._words, partition
        hashes = np.concatenate((self._keys, np.array(self._hashes, np.uint64)))
        rows = np.concatenate((self._rows, its))
        self._hashes, self._times, self._words = array("Q"), array("q"), array("q")
        self._next_settling = _SETTLE_EVERY
        order = np.lexsort((rows["partition"], rows["time"], hashes))
        hashes, rows = hashes[order], rows[order]
        same = hashes[1:] == hashes[:-1]
        rows["is_split"][1:] |= same
        last = np.append(~same, True) if len(hashes) else np.zeros(0, bool)
        self._keys, self._rows = hashes[last], rows[last]

    def _settle(self) -> None:
        """Drop all but the newest record of each key of the present partition."""
        if not self._hashes:
            return
        hashes, times, words = (np.array(one) for one in (self._hashes, self._times, self._words))
        order = np.lexsort((words, hashes))
        hashes, times, words = hashes[order], times[order], words[order]
        first = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
        last = np.append(first[1:], len(hashes)) - 1
        times = np.maximum.reduceat(times, first)
        self._hashes, self._times = array("Q", hashes[last].tobytes()), array("q", times.tobytes())
        self._words = array("q", words[last].tobytes())

    def time_if_newest(self, key: bytes, partition: int, offset: int) -> int | None:
        """The newest timestamp of the key's records in its partition, if this one is the key's newest; else None."""
        row = self._row(key)
        if row is None or row["partition"] != partition or row["word"] >> 1 != offset:
            return None
        return int(row["time"])

    def has_key(self, key: bytes) -> bool:
        """Whether there is a record of this key at all, deletes included."""
        return self._row(key) is not None

    def count_live(self) -> int:
        """How many keys have a newest record that is no delete."""
        return int(np.count_nonzero(self._rows["word"] % 2 == 0))

    def count_split(self) -> int:
        """How many keys have records in several partitions."""
        return int(np.count_nonzero(self._rows["is_split"]))

    def _row(self, key: bytes) -> Any | None:
        wanted = np.uint64(_hash(key))
        place = int(np.searchsorted(self._keys, wanted))
        return self._rows[place] if place < len(self._keys) and self._keys[place] == wanted else None


def _no_rows(size: int = 0) -> NDArray[np.void]:
    fields = [("time", np.int64), ("word", np.int64), ("partition", np.int32), ("is_split", bool)]
    return np.zeros(size, np.dtype(fields))


def _hash(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class ExpectedContent:
    """What an item and its row must have in common."""

    content_hash: str
    price: float | None
    published_at: datetime
    category: str | None
    has_image: bool
    facts: tuple[object, ...]
    """What a row keeps only where it `keeps_facts`."""

    @classmethod
    def of(cls, item: ItemPublished, outcomes: Container[str] = ()) -> ExpectedContent:
        """The content of an item; attributes that are `outcomes` are left out."""
        item, has_image = item.without(outcomes), bool(item.image or item.image_url)
        facts = item.year, item.attributes, item.published_at_is
        return cls(item.content_hash(), item.price, item.published_at, item.category or None, has_image, facts)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the center must hold of an item, by its newest record."""

    key: bytes
    item_id: str
    partition: int
    offset: int
    time_ms: int
    """Newest timestamp of the item's records of this partition up to this one."""
    content: ExpectedContent | None
    """None: deleted."""
    usable: bool = True
    """Whether the record can be decoded."""

    def is_behind(self, row: ItemRow) -> bool:
        """Whether a row comes from a newer record of the item."""
        return row.is_newer(self.partition, self.offset, self.time_ms)


def compare(expected: Expected, row: ItemRow | None, *, is_current: Callable[[str], bool]) -> Finding | None:
    """Compare the newest record of an item with its row; None if they agree.

    `is_current`: whether an encoder version is the one whose vectors the center holds.
    """
    partition, offset, content = expected.partition, expected.offset, expected.content

    def finding(fault: Fault, detail: str) -> Finding:
        return Finding(fault, expected.item_id, partition, offset, detail)

    if row is None or row.is_deleted:
        if content is None or (row is not None and row.source_partition != partition and expected.is_behind(row)):
            return None  # the deletion lay in another partition, and has been compacted away
        return finding("missing", "published, yet not there")
    came_from = f"{row.source_partition}/{row.source_offset}"
    if content is None:
        return finding("resurrected", f"deleted, yet there from {came_from}")
    if expected.is_behind(row):
        return finding("wrong", f"comes from {came_from}, which is not the newest record of this item")
    if (row.source_partition, row.source_offset) != (partition, offset):
        return finding("stale", f"still from {came_from}")
    same = {
        "content": row.content_hash == content.content_hash,
        "price": row.price == content.price,
        "time of publishing": row.published_at == content.published_at,
        "attributes": not row.keeps_facts or (row.year, row.attributes, row.published_at_is) == content.facts,
        "encoder version": is_current(row.encoder_version),
    }
    wrong = [name for name, agrees in same.items() if not agrees]
    return finding("wrong", f"another {', '.join(wrong)} than its record says") if wrong else None


def waits_in_vain(expected: Expected, row: ItemRow, awaited: Container[tuple[int, int]]) -> Finding | None:
    """What is wrong with a row that lacks its picture, if no retry will fetch it; None if nothing is.

    `awaited`: the records of `items` that retries in `items-retry` are still to be handled for.
    """
    if expected.content is None or not expected.content.has_image or row.has_image:
        return None
    if (expected.partition, expected.offset) in awaited:
        return None
    fault: Fault = "missing" if row.is_pending else "wrong"
    detail = "its picture was not fetched, and neither a retry nor a dead letter of it is left"
    return Finding(fault, expected.item_id, expected.partition, expected.offset, detail)


def compare_announcement(
    item_id: str, partition: int, offset: int, source: SourceOffset | None, row: ItemRow | None
) -> Finding | None:
    """Compare the last announcement of an item, from `partition` and `offset` of `embeddings`, with its row.

    `source` is the record of `items` that it is of; None if it announces the item as gone. None if they agree.
    """
    there = None if row is None or not row.is_searchable else (row.source_partition, row.source_offset)
    announced = None if source is None else (source.partition, source.offset)
    if announced == there:
        return None
    said = "announced as gone" if announced is None else f"announced from {announced[0]}/{announced[1]}"
    held = "not there" if there is None else f"there from {there[0]}/{there[1]}"
    return Finding(STALE_ANNOUNCEMENT, item_id, partition, offset, f"{said}, yet {held}")


def overdue(positions: Iterable[Position], *, center_is_empty: bool, center_is_filled: bool) -> list[Overdue]:
    """Partitions that have to be compared with the center before a worker reads on.

    A center that is not known to be filled may lack whatever was acknowledged: Milvus lost its data, or this center is
    a new one beside an old group. Of a filled one, deletes may have been compacted away before they were read. A group
    that has read a record younger than their retention was not away for longer than that; one that has read everything
    has missed nothing. A position that is unknown beside a center that is not empty proves nothing.
    """
    found = []
    for one in positions:
        if not center_is_filled and one.committed is not None:
            doubtful = one.committed > one.start
        elif center_is_empty or one.end == 0:
            doubtful = False
        else:
            behind = one.committed is None or one.committed < one.end
            doubtful = behind and (one.committed is None or one.recent is None or one.recent >= one.committed)
        if doubtful:
            found.append(Overdue(one.partition, one.committed, one.end))
    return found


def lost_retries(starts: Mapping[int, int], committed: Mapping[int, int]) -> dict[int, int]:
    """How many offsets of each partition of `items-retry` went with retention before a worker had read them.

    `starts` are the first offsets that are left, `committed` the positions of the index workers. A partition without a
    position was never read: what its workers do begins at what is left.
    """
    return {one: start - committed[one] for one, start in starts.items() if committed.get(one, start) < start}
