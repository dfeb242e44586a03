"""Lists of partners: which of the pairs that are counted together have places, and with which counts."""

from __future__ import annotations

import numpy as np

from trainer.features.config import FeatureConfig
from trainer.features.partners import count_pairs
from trainer.features.states import TakeRows


def count(rows: TakeRows, *pairs: tuple[int, int, int]) -> None:
    """Count pairs, given as (slot, partner, times)."""
    slots, partners, times = np.array(pairs, np.int64).T
    count_pairs(rows, np.repeat(slots, times), np.repeat(partners, times).astype(np.uint32))


def held(rows: TakeRows, slot: int) -> dict[int, int]:
    places = zip(rows.partner_UP[slot].tolist(), rows.together_UP[slot].tolist(), strict=True)
    return {partner: times for partner, times in places if times}


def test_the_most_counted_new_pairs_have_the_places_with_the_counts_that_they_came_with() -> None:
    rows = TakeRows.empty(FeatureConfig(partners=2), 3)
    count(rows, (1, 7, 3), (2, 7, 3))
    count(rows, (1, 9, 1), (1, 11, 5), (1, 13, 2), (2, 9, 1))
    assert held(rows, 1) == {11: 5, 13: 2}, "one in the free place, and one in that of the smallest count"
    assert held(rows, 2) == {7: 3, 9: 1}


def test_a_new_pair_counts_up_to_what_its_place_holds() -> None:
    rows = TakeRows.empty(FeatureConfig(partners=2), 2)
    count(rows, (1, 7, 70_000), (1, 9, 69_000))
    assert held(rows, 1) == {7: 65_535, 9: 65_535}


def test_no_partner_is_preferred_in_all_lists() -> None:
    rows = TakeRows.empty(FeatureConfig(partners=1), 65)
    count(rows, *((slot, partner, 1) for slot in range(1, 65) for partner in (7, 9)))
    assert {partner for slot in range(1, 65) for partner in held(rows, slot)} == {7, 9}


def test_a_pair_is_counted_up_to_what_its_place_holds_and_no_further() -> None:
    rows = TakeRows.empty(FeatureConfig(), 2)
    once = np.ones(1, np.int64), np.full(1, 7, np.uint32)
    often = np.ones(70_000, np.int64), np.full(70_000, 9, np.uint32)
    for pairs in (often, once, once, often):
        assert count_pairs(rows, *pairs).tolist() == [1]
    counted = dict(zip(rows.partner_UP[1].tolist(), rows.together_UP[1].tolist(), strict=True))
    assert counted == {0: 0, 7: 2, 9: 65_535}
