"""The words that searches and titles share, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.samples.searches import MOST_WORDS, query_columns, words_of_searches

TITLES = ["Red Boots", "boots", "a lamp", None, "red boots for winter " + " ".join(map(str, range(20)))]


def in_loops(searches: list[str | None], titles: list[str | None]) -> list[list[float]]:
    rows = []
    for search, title in zip(searches, titles, strict=True):
        words, of_title = (set((text or "").lower().split()[:MOST_WORDS]) for text in (search, title))
        both = len(words & of_title)
        found, covered = both / max(1, len(words)), both / max(1, len(of_title))
        rows.append([1, found, covered, float(found == covered == 1)])
    return rows


@pytest.mark.parametrize("search", ["red boots", "BOOTS", "a", "", None, "winter boots and a lamp " * 2])
def test_one_search_of_all_rows_is_compared_with_each_title(search: str | None) -> None:
    found = query_columns(np.ones(5, bool), words_of_searches([search]), words_of_searches(TITLES))
    distinct = None if search is None else " ".join(dict.fromkeys(search.split()))
    np.testing.assert_allclose(found, in_loops([distinct] * 5, TITLES), rtol=1e-6)
    assert found.dtype == np.float32


def test_each_row_has_its_own_search_and_one_without_has_zeros() -> None:
    searches = ["red boots", None, "lamp", "boots", "boots"]
    known = np.array([True, False, True, True, True])
    found = query_columns(known, words_of_searches(searches), words_of_searches(TITLES))
    expected = np.array(in_loops(searches, TITLES)) * known[:, None]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    none = query_columns(~known & False, words_of_searches(searches), words_of_searches(TITLES))
    assert none.dtype == np.float32 and none.tolist() == [[0.0] * 4] * 5
    untitled = query_columns(known, words_of_searches(searches), np.zeros((5, 0), np.uint32))
    assert untitled.tolist() == [[float(one), 0, 0, 0] for one in known]
