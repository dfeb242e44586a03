"""Searches, kinds and trigger items of a data-set folder, and what the rows beside them get of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.behaviours import BehaviourKind
from schemas.errors import Misconfigured
from tests.factories.offline_folders import START, write
from trainer.datasets.exposures import behaviours_of
from trainer.datasets.folder import DataSet, open_data_set
from trainer.datasets.searches import Searches
from trainer.datasets.spans import BehaviourLog
from trainer.offline.labels import read_ratings

ROWS = 4


def a_set(folder: Path, **columns: Any) -> DataSet:
    """Four interactions, the last not taken, of three items."""
    folder.mkdir(exist_ok=True)
    write(folder, "items", item_id=["a", "b", "c"], title=["A", "B", "C"], publish_ts=[START] * 3)
    rows: dict[str, Any] = {
        "user_id": ["u", "u", "v", "v"],
        "item_id": ["a", "b", "a", "c"],
        "ts": [START + 10, START + 20, START + 30, START + 40],
        "label": [1, 1, 1, 0],
    }
    write(folder, "interactions", **rows | columns)
    return open_data_set(folder)


def searched(data: DataSet, places: Any) -> list[tuple[str | None, bytes | None] | None]:
    """Words and photo of each row's search."""
    assert data.searches is not None and places is not None
    return [
        None if place < 0 else (data.searches.text(place), data.searches.images([place])[0])
        for place in places.tolist()
    ]


def test_a_set_without_such_columns_has_no_searches_kinds_or_triggers(tmp_path: Path) -> None:
    data = a_set(tmp_path)
    rows = data.interactions
    assert (rows.search, rows.trigger, rows.kinds) == (None, None, None)
    assert data.searches is not None and len(data.searches) == 0
    log = behaviours_of(data, seed=1)
    assert len(log) > 0 and set(log.search.tolist()) == set(log.trigger.tolist()) == {-1}


def test_equal_searches_are_one_and_blank_ones_are_none(tmp_path: Path) -> None:
    words = [" red shoes ", None, "red shoes", "  "]
    data = a_set(tmp_path, query_text=words)
    assert searched(data, data.interactions.search) == [("red shoes", None), None, ("red shoes", None), None]
    photos = [b"photo", b"photo", b"", None]
    data = a_set(tmp_path, query_text=words, query_image=photos)
    expected = [("red shoes", b"photo"), (None, b"photo"), ("red shoes", None), None]
    assert searched(data, data.interactions.search) == expected
    assert data.searches is not None and len(data.searches) == 3


def test_words_are_cut_where_behaviours_would_be_refused(tmp_path: Path) -> None:
    data = a_set(tmp_path, query_text=["ö" * 1_001, "ö" * 1_000, None, None])
    search = data.interactions.search
    assert search is not None and search.tolist()[0] == search.tolist()[1]
    assert searched(data, search[:1]) == [("ö" * 1_000, None)]


def test_searches_of_a_file_of_their_own_are_found_by_id(tmp_path: Path) -> None:
    write(tmp_path, "queries", query_id=[7, 8, 9], query_text=["shoes", "", None], image=[b"one", b"two", None])
    data = a_set(tmp_path, query_id=["8", None, "7", ""])
    assert searched(data, data.interactions.search) == [(None, b"two"), None, ("shoes", b"one"), None]
    searches = data.searches
    assert searches is not None and len(searches) == 3
    assert searches.images([2, 0, 1, 0]) == [None, b"one", b"two", b"one"]


def test_exposures_may_name_searches_in_another_way_than_interactions(tmp_path: Path) -> None:
    write(tmp_path, "queries", query_id=["q"], query_text=["by id"])
    shown = {"ts": [START + 10] * 2, "user_id": ["u"] * 2, "item_id": ["b", "c"], "query_text": ["by id", "own"]}
    write(tmp_path, "exposures", **shown)
    data = a_set(tmp_path, query_id=["q", None, None, None])
    assert data.negatives is not None
    assert searched(data, data.negatives.search) == [("by id", None), ("own", None)]
    assert searched(data, data.interactions.search)[0] == ("by id", None)


@pytest.mark.parametrize("file", [{}, {"image": [b"one"]}, {"query_text": ["shoes"]}])
def test_searches_that_say_nothing_or_are_not_there_are_refused(tmp_path: Path, file: dict[str, Any]) -> None:
    with pytest.raises(Misconfigured, match=r"'query_id' names rows of queries\.parquet, which is not there"):
        a_set(tmp_path, query_id=["q"] * ROWS)
    write(tmp_path, "queries", query_id=["q"], **file)
    if not file:
        with pytest.raises(Misconfigured, match="neither 'query_text' nor 'image'"):
            Searches(tmp_path)
        return
    with pytest.raises(Misconfigured, match=r"'query_id' names what queries.parquet does not hold.*'other'"):
        a_set(tmp_path, query_id=["q", "other", "q", "q"])
    with pytest.raises(Misconfigured, match="'query_text' and 'query_id' both say what was searched"):
        a_set(tmp_path, query_id=["q"] * ROWS, query_text=["x"] * ROWS)
    write(tmp_path, "queries", query_id=["q", "q"], **{name: one * 2 for name, one in file.items()})
    with pytest.raises(Misconfigured, match="the same search more than once"):
        Searches(tmp_path)


@pytest.mark.parametrize(("column", "values", "wanted"), [
    ("query_text", [1, 2, 3, 4], "'query_text' must hold text"),
    ("query_image", ["a", "b", "c", "d"], "'query_image' must hold encoded bytes"),
    ("trigger_item", ["a", "b", "page", "a"], "'trigger_item' names what items.parquet does not hold.*'page'"),
    ("kind", ["click", "view", "click", None], "'kind' holds view in row 1; the kind of a take is one of click, cart"),
    ("kind", ["click", None, "click", None], "'kind' holds nothing in row 1"),
])  # fmt: skip
def test_columns_of_other_values_are_refused(tmp_path: Path, column: str, values: list[Any], wanted: str) -> None:
    with pytest.raises(Misconfigured, match=wanted):
        a_set(tmp_path, **{column: values})


def test_takes_are_of_the_kind_that_their_row_says_before_that_of_the_set(tmp_path: Path) -> None:
    kinds = ["purchase", "click", "cart", None]
    rows = a_set(tmp_path, kind=kinds, qty=[1] * ROWS).interactions
    assert [rows.kind_of(row).value for row in range(3)] == kinds[:3]
    rows = a_set(tmp_path, qty=[1] * ROWS).interactions
    assert {rows.kind_of(row) for row in range(3)} == {BehaviourKind.PURCHASE}


def test_drawn_exposures_have_the_search_and_the_trigger_of_the_take_beside_them(tmp_path: Path) -> None:
    """Else a search alone would tell takes from exposures."""
    data = a_set(tmp_path, label=[1] * ROWS, query_text=["one", None, "two", None], trigger_item=["c", "a", None, ""])
    log = behaviours_of(data, seed=1)
    assert (log.draw >= 0).sum() > 2
    assert searched(data, log.search) == [{0: ("one", None), 2: ("two", None)}.get(row) for row in log.row.tolist()]
    assert log.trigger.tolist() == [{0: 2, 1: 0}.get(row, -1) for row in log.row.tolist()]


@pytest.mark.parametrize("own", [False, True])
def test_exposures_of_the_set_have_their_own_search_or_that_of_the_interaction_beside_them(
    tmp_path: Path, own: bool
) -> None:
    shown = {"ts": [START + 10, START + 30, START + 99], "user_id": ["u", "v", "w"], "item_id": ["b", "c", "c"]}
    columns = {"query_text": ["mine", None, "alone"], "trigger_item": ["b", None, "a"]} if own else {}
    write(tmp_path, "exposures", **shown, **columns)
    data = a_set(tmp_path, query_text=["one", None, "two", None], trigger_item=["c", "a", "b", None])
    log = behaviours_of(data, seed=1)
    shown_at = [int(np.flatnonzero((log.ts == ts) & ~log.is_take & ((log.row < 0) | (log.draw >= 0)))[0])
                for ts in shown["ts"]]  # fmt: skip
    texts = [one and one[0] for one in searched(data, log.search[shown_at])]
    assert texts == (["mine", None, "alone"] if own else ["one", "two", None])
    assert log.trigger[shown_at].tolist() == ([1, -1, 0] if own else [2, 1, -1])
    takes = np.flatnonzero(log.is_take)
    assert [one and one[0] for one in searched(data, log.search[takes])] == ["one", None, "two"]


def test_rows_that_name_no_user_are_left_out_and_counted_wherever_the_file_is_read(tmp_path: Path) -> None:
    shown = {"ts": [START + 10, START + 20, START + 30], "user_id": ["", "u", None], "item_id": ["b", "c", "c"]}
    write(tmp_path, "exposures", **shown, label=[1, 0, 0])
    users = ["", "u", None, "v"]
    data = a_set(tmp_path, user_id=users, label=[1, 0, 1, 1], rating=[1, 2, 3, 4], query_text=["a", "b", "c", "d"])
    assert data.user_ids == ["u", "v"] and data.interactions.item.tolist() == [1, 2]
    assert data.negatives is not None and data.negatives.item.tolist() == [2]
    assert [one and one[0] for one in searched(data, data.interactions.search)] == ["b", "d"]
    # an exposure with label 1 counts as a take, which is in the interactions already
    assert data.without_user == 3 and data.left_out == "3 rows without a user are left out"
    assert BehaviourLog.of(data, tmp_path).liked.tolist() == [False, True]
    ratings = read_ratings(data, tmp_path)
    assert ratings is not None and ratings.tolist() == [2, 4]
    assert a_set(tmp_path).without_user == 1


def test_numbers_of_users_are_none_where_they_are_null(tmp_path: Path) -> None:
    data = a_set(tmp_path, user_id=[7, None, 0, 7])
    assert data.user_ids == ["7", "0"] and data.without_user == 1
