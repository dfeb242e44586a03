"""Which slot of the state an item has, for many items at once, by their keys or by their short hashes.

Dictionaries hold it. For most items an array answers before they are asked: it has a slot at the low bits of the key,
and the slot's own key tells whether that is the item.
"""

from __future__ import annotations

from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from trainer.features.states import NO_ITEM, firsts

_PLACES_PER_SLOT = 2


class ItemSlots:
    """Slots by the first 63-bit hash of an item's id, and by its `item_hash`; slot 0 belongs to none.

    Of items that share an `item_hash` the highest slot is found by it: that depends on no order.
    """

    def __init__(self, key_S: NDArray[np.int64]) -> None:
        """`key_S` are the keys of all slots, 0 of a free one."""
        self.key_S = key_S
        self.by_key = {key: slot for slot, key in enumerate(key_S.tolist()) if key}
        slots = np.flatnonzero(key_S)
        shorts = _shorts_of(key_S[slots])
        self._by_short = dict(zip(shorts.tolist(), slots.tolist(), strict=True))
        self._shared = _repeated(shorts)
        """Short hashes that several items have."""
        self._index()

    def __len__(self) -> int:
        return len(self.by_key)

    def _index(self) -> None:
        places = 1 << (_PLACES_PER_SLOT * len(self.key_S) - 1).bit_length()
        self._low = np.int64(places - 1)
        self._slot_P = np.zeros(places, np.int32)
        slots = np.flatnonzero(self.key_S)
        self._slot_P[_shorts_of(self.key_S[slots]) & self._low] = slots  # of two, the later one stays

    def of(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slots of these items, 0 of one that has none."""
        slots = self._slot_P.take(_shorts_of(keys) & self._low).astype(np.int64)
        others = np.flatnonzero((self.key_S.take(slots) != keys) & (slots > 0))
        slots[others] = list(map(self.by_key.get, keys[others].tolist(), repeat(0)))
        return slots

    def of_shorts(self, shorts: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Slots of the items of these short hashes, 0 where there is none."""
        slots = self._slot_P.take(shorts & self._low).astype(np.int64)
        others = np.flatnonzero((_shorts_of(self.key_S.take(slots)) != shorts) & (slots > 0))
        slots[others] = list(map(self._by_short.get, shorts[others].tolist(), repeat(0)))
        return slots

    def put(self, key: int, short: int, slot: int) -> None:
        """Give a free slot to an item."""
        self.by_key[key] = slot
        self.key_S[slot] = key
        if other := self._by_short.get(short, 0):
            self._shared.add(short)
        if slot > other:
            self._by_short[short] = self._slot_P[short & self._low] = slot

    def free(self, slots: NDArray[np.int64]) -> None:
        """Take these slots from their items."""
        gone = _shorts_of(self.key_S[slots]).tolist()
        for key, short in zip(self.key_S[slots].tolist(), gone, strict=True):
            del self.by_key[key]
            self._by_short.pop(short, None)
        self.key_S[slots] = 0
        if shared := self._shared.intersection(gone):
            others = np.flatnonzero(np.isin(_shorts_of(self.key_S), [*shared]) & (self.key_S > 0))
            shorts = _shorts_of(self.key_S[others])
            self._by_short |= zip(shorts.tolist(), others.tolist(), strict=True)
            self._slot_P[shorts & self._low] = others
            self._shared = self._shared - shared | _repeated(shorts)

    def grow(self, size: int) -> None:
        """Have so many slots."""
        self.key_S = np.concatenate([self.key_S, np.zeros(size - len(self.key_S), np.int64)])
        self._index()


def _repeated(shorts: NDArray[np.uint32]) -> set[int]:
    sorted_N = np.sort(shorts)
    return set(sorted_N[~firsts(sorted_N)].tolist())


def short_of(key: int) -> int:
    """`item_hash` of an item."""
    return int(_shorts_of(np.array([key]))[0])


def _shorts_of(keys: NDArray[np.int64]) -> NDArray[np.uint32]:
    return np.minimum(np.maximum(keys.astype(np.uint32), np.uint32(1)), NO_ITEM - np.uint32(1))
