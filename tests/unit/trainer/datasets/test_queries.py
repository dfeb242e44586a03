"""The distinct searches of a set, and sets of which they are not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.factories.offline_folders import START, write, write_small_set
from tests.factories.searching_folders import SEARCHED, write_searching
from trainer.datasets.folder import open_data_set
from trainer.datasets.queries import Queries, has_searches, has_triggers, reads_searches, without_searches
from trainer.samples.searches import searched


def test_a_query_of_the_same_words_and_photo_is_one_and_is_numbered_behind_the_items(tmp_path: Path) -> None:
    data = open_data_set(write_searching(tmp_path, items=9, takes=60))
    queries, rows = Queries.of(data), data.interactions
    names = {searched(*search) for search in SEARCHED} - {None}
    assert set(queries.names) == names and len(queries) == 5 == len(SEARCHED) - 2
    assert rows.search is not None and data.searches is not None
    numbers = queries.numbers(rows.search)
    assert set(numbers.tolist()) == {0, *range(10, 15)}
    for search, number in zip(rows.search.tolist(), numbers.tolist(), strict=True):
        named = None
        if search >= 0:
            named = searched(data.searches.text(search), data.searches.images([search])[0])
        assert named == (queries.names[number - 10] if number else None)
    contents = list(queries.contents(data))
    assert [content.title for content in contents] == queries.texts
    assert {searched(content.title, content.image) for content in contents} == names
    assert queries.numbers(np.array([-1])).tolist() == [0]


def test_a_stored_search_that_no_row_names_is_no_query(tmp_path: Path) -> None:
    write_small_set(tmp_path)
    write(tmp_path, "queries", query_id=["x", "y", "z"], query_text=["red", "blue", "grey"])
    ts = [START + 10, START + 20]
    write(tmp_path, "interactions", user_id=[*"ab"], item_id=[5, 7], ts=ts, label=[1, 1], query_id=["y", None])
    write(tmp_path, "exposures", user_id=["a"], item_id=[5], ts=ts[:1], query_id=["z"])
    data = open_data_set(tmp_path)
    queries = Queries.of(data)
    assert queries.texts == ["blue", "grey"] and queries.number_P.tolist() == [0, 4, 5, 0]
    assert has_searches(data) and not has_triggers(data)


def test_a_set_whose_searches_are_not_read_says_so_and_has_none(tmp_path: Path) -> None:
    data = open_data_set(write_searching(tmp_path))
    assert reads_searches(data) and has_triggers(data) and data.left_out is None
    off = without_searches(data)
    assert not reads_searches(off) and off.searches is None and len(Queries.of(off)) == 0
    assert off.left_out == "searches and trigger items are not read"
    plain = open_data_set(write_small_set(tmp_path / "plain"))
    assert without_searches(plain) is plain and not reads_searches(plain)
