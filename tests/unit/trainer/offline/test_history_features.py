"""Pairs of a user's takes at the bound of what is paired, and rows in several passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.factories.offline_folders import read_protocol, without_vectors, write_stream
from trainer.offline import history_features
from trainer.offline.as_of import ItemFacts, Takes
from trainer.offline.history_features import HISTORY, CoOccurrence, largest

LAST = HISTORY + 2


def counted(*, announces: int = 0, unpaired: int = 0) -> CoOccurrence:
    """One user takes the items 1 to `LAST`, one a second, and then the first of them again."""
    item = np.array([*range(1, LAST + 1), 1])
    nothing = np.zeros(LAST + 1)
    facts = ItemFacts(
        published_I=nothing.astype(np.int64),
        inferred_I=nothing.astype(bool),
        from_start_I=nothing.astype(bool),
        unpaired_I=(np.arange(LAST + 1) == unpaired) & (unpaired > 0),
        category_I=nothing.astype(np.int64),
        numbers_I={},
        facets={},
    )
    takes = Takes(np.ones(len(item), np.int64), item, np.arange(len(item)), None, (item == announces) & (announces > 0))
    return CoOccurrence(takes, facts)


def pairs(found: CoOccurrence, one: int, other: int, second: int = 1_000) -> int:
    (count,) = found.count(np.array([one]), np.array([other]), np.array([second]))
    return int(count)


def of_take(found: CoOccurrence, take: int, other: int, second: int = 1_000) -> int:
    (count,) = found.of_source(np.array([take]), np.array([1]), np.array([other]), np.array([second]))
    return int(count)


def test_a_take_is_paired_with_so_many_before_it_and_no_further() -> None:
    found = counted()
    assert (pairs(found, 2, 2 + HISTORY), pairs(found, 1, 2 + HISTORY)) == (1, 1), "with the first one again"
    assert pairs(found, 1, 1 + HISTORY, HISTORY + 1) == 1 and pairs(found, 1, 2 + HISTORY, HISTORY + 2) == 0
    assert pairs(found, 1, 2, 1) == 0 and pairs(found, 1, 2, 2) == 1, "from the second of the later one on"


def test_a_take_that_a_row_was_drawn_from_is_in_the_pairs_that_it_made() -> None:
    found = counted()
    assert of_take(found, HISTORY, 1, LAST) == 1 and of_take(found, HISTORY + 1, 1, LAST) == 0
    assert of_take(found, 5, 6, 5) == 0, "not taken yet"
    assert of_take(found, 5, 6) == 0, "a take with itself"
    for left_out in (counted(announces=6), counted(unpaired=6)):
        assert of_take(left_out, 5, 5) == 0 and of_take(left_out, 4, 6) == 0 and of_take(left_out, 4, 4) == 1


def test_features_do_not_depend_on_how_many_rows_are_computed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_stream(tmp_path / "small", users=20, items=20, takes=200, seed=3)
    whole = without_vectors(read_protocol(folder)[1]).rows.dense_NF
    monkeypatch.setattr(history_features, "_ROWS_PER_PASS", 100)
    parts = without_vectors(read_protocol(folder)[1]).rows.dense_NF
    assert len(whole) > 300
    np.testing.assert_array_equal(whole, parts)


def test_the_largest_value_of_a_row_may_be_below_nought_and_is_nought_without_any() -> None:
    found = largest(np.array([0, 2, 2]), np.array([-0.5, -0.9, -0.2]), 4)
    assert found.tolist() == [-0.5, 0, -0.2, 0]
