"""States of items as features read them, of any runner: the trainer's own, a server's copies, an evaluation's.

Letters: U distinct items (row 0 is padding), P partners, H half-lives, B rows, M takes of a source's user.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.features.config import HALF_LIVES, FeatureConfig
from trainer.samples.item_facts import FactRows

NEVER = np.iinfo(np.int64).min
"""Second of a take that there was not."""
NO_ITEM = np.uint32(0xFFFF_FFFF)
"""Hash of padding; a free place among partners is 0, so neither matches the other."""
CATEGORY_SLOTS, WORD_SLOTS = 1 << 12, 1 << 14
_MOST_TAKES = 1 << 53
_TRIGGER_MIX, _MOST_HASH = np.int64(0x5851_F42D_4C95_7F2D), np.iinfo(np.int64).max

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, eq=False)
class TakeRows:
    """What the takes of some items left behind. A row has a size that does not depend on their number."""

    takes_U: NDArray[np.uint32]
    """Takes ever."""
    decayed_UH: NDArray[np.float32]
    """Takes that halve with each half-life, as of the newest take."""
    last_U: NDArray[np.int64]
    """Second of the newest take, `NEVER` without one."""
    previous_U: NDArray[np.int64]
    """Second of the take before that."""
    partner_UP: NDArray[np.uint32]
    """`item_hash` of the items taken by the same users."""
    together_UP: NDArray[np.uint16]
    """Pairs of takes with each; 0 for a place that is free."""

    @classmethod
    def empty(cls, config: FeatureConfig, size: int) -> TakeRows:
        """Items that were never taken."""
        return cls(
            np.zeros(size, np.uint32),
            np.zeros((size, len(HALF_LIVES)), np.float32),
            np.full(size, NEVER, np.int64),
            np.full(size, NEVER, np.int64),
            np.zeros((size, config.partners), np.uint32),
            np.zeros((size, config.partners), np.uint16),
        )

    def __len__(self) -> int:
        return len(self.takes_U)

    def rows(self, places: NDArray[np.int64]) -> TakeRows:
        """Copies of these rows."""
        return TakeRows(*(getattr(self, one.name).take(places, axis=0) for one in fields(self)))

    def clear(self, places: NDArray[np.int64]) -> None:
        """Make these rows those of items that were never taken."""
        for one in fields(self):
            getattr(self, one.name)[places] = NEVER if one.name in ("last_U", "previous_U") else 0

    @staticmethod
    def counts_are_finite(record: bytes) -> bool:
        """Whether the decayed counts of a record of the right length are numbers of at least 0."""
        offset = np.dtype(np.uint32).itemsize
        return all(0 <= one < math.inf for one in struct.unpack_from(f"<{len(HALF_LIVES)}f", record, offset))

    def to_bytes(self, place: int) -> bytes:
        """One row exactly, as a record."""
        return b"".join(_little(getattr(self, one.name)[place : place + 1]).tobytes() for one in fields(self))

    @classmethod
    def from_bytes(cls, config: FeatureConfig, records: list[bytes]) -> TakeRows:
        """The rows of `to_bytes`, one after the other. Raises `ValueError` if a record has another length."""
        whole = cls.empty(config, len(records))
        size = sum(getattr(whole, one.name)[:1].nbytes for one in fields(cls)) if records else 0
        if any(len(record) != size for record in records):
            raise ValueError(f"a record of an item's takes has {size} bytes under these settings")
        joined = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), size)
        start = 0
        for one in fields(cls):
            column = getattr(whole, one.name)
            width = column.nbytes // max(1, len(records))
            part = np.ascontiguousarray(joined[:, start : start + width])
            column[...] = part.view(column.dtype.newbyteorder("<")).reshape(column.shape)
            start += width
        return whole


@dataclass(frozen=True, eq=False)
class SharedCounts:
    """Takes of all items together, by category and by attribute value; values that share a place are counted as one."""

    category_C: NDArray[np.uint32]
    word_C: NDArray[np.uint32]
    takes: int = 0

    @classmethod
    def empty(cls) -> SharedCounts:
        """No takes yet."""
        return cls(np.zeros(CATEGORY_SLOTS, np.uint32), np.zeros(WORD_SLOTS, np.uint32))

    def to_bytes(self) -> bytes:
        """Exact, as a record."""
        takes = np.array([self.takes], "<u8").tobytes()
        return takes + _little(self.category_C).tobytes() + _little(self.word_C).tobytes()

    @classmethod
    def from_bytes(cls, record: bytes) -> SharedCounts:
        """From `to_bytes`. Raises `ValueError` for another length, or for more takes than are ever counted."""
        if len(record) != 8 + 4 * (CATEGORY_SLOTS + WORD_SLOTS):
            raise ValueError("a record of shared counts has another length")
        counts = np.frombuffer(record, "<u4", offset=8).astype(np.uint32)
        takes = int(np.frombuffer(record, "<u8", 1)[0])
        if takes > _MOST_TAKES:
            raise ValueError(f"a record of shared counts says that there were {takes} takes")
        return cls(counts[:CATEGORY_SLOTS], counts[CATEGORY_SLOTS:], takes)


@dataclass(frozen=True, eq=False)
class ItemStates:
    """All that `features` reads of the distinct items of a batch; row 0 is padding."""

    hash_U: NDArray[np.uint32]
    """`item_hash` of each item."""
    facts: FactRows
    takes: TakeRows
    shared: SharedCounts
    before: int = NEVER
    """Takes of earlier seconds are counted, others are not."""
    triggered: TakeRows | None = None
    """What was taken right after each item was looked at, as if that were an item too; None where it is not read."""

    def __len__(self) -> int:
        return len(self.hash_U)


@dataclass(frozen=True, eq=False)
class DrawnSources:
    """For B rows: the counted take that a drawn exposure was drawn from, which its features leave out."""

    second_B: NDArray[np.int64]
    """Second of that take; `NEVER` for a row that was not drawn, or whose take is not counted."""
    partner_BM: NDArray[np.uint32]
    """`item_hash` of the items, of the query and of the trigger that the take was paired with, 0 pads."""

    @classmethod
    def none(cls, rows: int) -> DrawnSources:
        """No row was drawn from a counted take."""
        return cls(np.full(rows, NEVER, np.int64), np.zeros((rows, 0), np.uint32))


def item_hash(hashes_U2: NDArray[np.int64]) -> NDArray[np.uint32]:
    """32-bit hashes of items from `trainer.samples.id_hashes`, `NO_ITEM` for padding (zero hashes), never 0."""
    low = np.clip(hashes_U2[:, 0].astype(np.uint32), 1, NO_ITEM - np.uint32(1))
    return np.where((hashes_U2[:, 0] | hashes_U2[:, 1]) != 0, low, NO_ITEM)


def trigger_hashes(hashes_U2: NDArray[np.int64]) -> NDArray[np.int64]:
    """Hashes of items as triggers, under which is counted what is taken right after them; zeros stay zeros."""
    with np.errstate(over="ignore"):
        mixed_U2 = (hashes_U2 * _TRIGGER_MIX) & _MOST_HASH
    return np.where(hashes_U2 == 0, 0, np.maximum(mixed_U2, 1))


def trigger_hash(hash_U: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """`item_hash` of `trigger_hashes`, from that of the items: low bits of a product are those of low bits."""
    with np.errstate(over="ignore"):
        mixed_U = hash_U * np.uint32(_TRIGGER_MIX & 0xFFFF_FFFF)
    return np.asarray(np.minimum(np.maximum(mixed_U, np.uint32(1)), NO_ITEM - np.uint32(1)))


def firsts(sorted_N: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Where a value is the first of its kind among sorted ones."""
    first_N = np.ones(len(sorted_N), bool)
    np.not_equal(sorted_N[1:], sorted_N[:-1], out=first_N[1:])
    return first_N


def distinct(values: NDArray[Scalar]) -> NDArray[Scalar]:
    """What `np.unique` gives, by sorting, in a tenth of the time that its table of hashes takes."""
    sorted_N = np.sort(values, axis=None)
    return sorted_N[firsts(sorted_N)]


def _little(array: NDArray[np.generic]) -> NDArray[np.generic]:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)
