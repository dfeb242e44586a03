"""The slots of items: what two dictionaries say, at any moment and after a restart."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.features.item_slots import ItemSlots, short_of
from trainer.features.states import NO_ITEM, item_hash


@pytest.mark.parametrize("bits", [3, 34, 63])
def test_an_item_is_found_by_key_and_by_short_hash_as_dictionaries_find_it(bits: int) -> None:
    rng = np.random.default_rng(bits)
    # many keys of one short hash, of the same low bits, and of the bounds of a short hash
    low = (
        rng.integers(1, 1 << bits, 400)
        if bits < 63
        else rng.choice([0, 1, 2, (1 << 32) - 1, (1 << 32) - 2, 1 << 9], 400)
    )
    keys = np.unique(low | (rng.integers(0, 4, 400) << 33))
    keys = keys[keys > 0]
    slots, free, held = ItemSlots(np.zeros(8, np.int64)), [*range(1, 8)], {}
    for turn in range(600):
        key = int(rng.choice(keys))
        if key in held:
            slot = held.pop(key)
            slots.free(np.array([slot]))
            free.append(slot)
        else:
            if not free:
                free = [*range(len(slots.key_S), 2 * len(slots.key_S))]
                slots.grow(2 * len(slots.key_S))
            held[key] = free.pop(int(rng.integers(len(free))))
            slots.put(key, short_of(key), held[key])
        if turn % 20 == 0:
            by_short = {short_of(one): slot for one, slot in sorted(held.items(), key=lambda pair: pair[1])}
            asked = np.array([0, *keys.tolist()])
            shorts = np.array(sorted({short_of(one) for one in keys.tolist()}), np.uint32)
            for one in (slots, ItemSlots(slots.key_S.copy())):
                assert len(one) == len(held) and one.by_key == held
                assert one.of(asked).tolist() == [held.get(key, 0) for key in asked.tolist()]
                assert one.of_shorts(shorts).tolist() == [by_short.get(short, 0) for short in shorts.tolist()]


def test_no_item_has_the_short_hash_of_padding_or_of_a_free_place() -> None:
    keys = [1 << 32, (1 << 32) - 1, (1 << 32) + 5]
    found = item_hash(np.array([[0, 0], *([key, 7] for key in keys)])).tolist()
    assert found == [NO_ITEM, 1, NO_ITEM - 1, 5] and found[1:] == [short_of(key) for key in keys]
