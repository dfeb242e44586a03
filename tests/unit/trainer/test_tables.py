"""Rows of tables in snapshots: which ones are written, and the way back from the pieces."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from trainer.changed_rows import ChangedRows, RowsHeld
from trainer.state import State, Table, ragged, unragged
from trainer.tables import Fold, Slots, rows_without


@pytest.mark.parametrize("seed", range(6))
def test_a_snapshot_holds_what_was_written_since_another_one_and_as_many_on_the_way_over_the_table(seed: int) -> None:
    rng = random.Random(seed)
    table, held, written, count = ChangedRows(), [RowsHeld(0, 0)], dict[int, int](), rng.choice([1, 200, 3_000])
    for now in range(1, 40):
        for _ in range(rng.randrange(4)):
            row = rng.randrange(count)
            kind = rng.randrange(3)
            rows = [row] if kind == 0 else list(range(row, min(row + 3, count)))
            given: list[Any] = [row, slice(rows[0], rows[-1] + 1), np.array(rows)]
            table.touch(given[kind])
            written.update(dict.fromkeys(rows, now))
        since = rng.choice(held[-3:])
        found, new = table.select(count, since)
        wanted = {row for row in range(count) if row >= since.count or written.get(row, 0) > since.mark}
        stop = min(since.row + max(len(wanted), (count + 127) // 128), count)
        assert found.tolist() == sorted(wanted | set(range(since.row, stop)))
        assert (new.count, new.mark) == (count, now)
        assert new.place == ((since.lap, stop) if stop < count else (since.lap + 1, 0))
        held.append(new)
        count += rng.choice([0, 0, 5])
    everything, new = table.select(count, None)
    assert everything.tolist() == list(range(count)) and new.place == (0, 0)


def piece(*texts: str) -> dict[str, np.ndarray]:
    """Columns of a number, of two, of a text and of a list for each row."""
    numbers = np.array([[len(text), ord((text or " ")[0])] for text in texts], np.int64).reshape(-1, 2)
    state = State({"number": numbers[:, 0].copy(), "pair": numbers})
    state.put_texts("text", texts)
    state.add(ragged("list", [list(map(ord, text)) for text in texts]))
    return dict(state.arrays)


def test_a_table_is_made_of_its_pieces_of_which_the_later_counts_and_of_its_first_rows_if_it_became_shorter() -> None:
    fold = Fold(3)
    fold.add(np.array([0, 2, 3]), piece("a", "bcd", "gone"))
    fold.add(np.array([], np.int64), piece())
    fold.add(np.array([1, 2]), piece("", "efg"))
    with pytest.raises(ValueError, match="no piece"):
        Fold(1).arrays()
    state = State(fold.arrays())
    assert state.texts("text") == ["a", "", "efg"] and unragged("list", state) == [[97], [], [101, 102, 103]]
    assert state.arrays["number"].tolist() == [1, 0, 3] and state.arrays["pair"].tolist() == [
        [1, 97],
        [0, 32],
        [3, 101],
    ]
    widened = Fold(1)
    widened.add(np.array([], np.int64), {"vector": np.zeros((0, 0), np.float32)})  # before the first was there
    widened.add(np.array([0]), {"vector": np.ones((1, 3), np.float32)})
    assert widened.arrays()["vector"].tolist() == [[1, 1, 1]]
    none = Fold(0)
    none.add(np.array([], np.int64), piece())
    assert {name: len(column) for name, column in none.arrays().items()} == dict.fromkeys(piece(), 0)


def without_bytes(columns: dict[str, Any]) -> None:
    del columns["text.bytes"]


HARM: dict[str, Callable[[dict[str, Any]], object]] = {
    "too few values": lambda columns: columns.update(number=columns["number"][:1]),
    "too few places": lambda columns: columns.update({"text.ends": columns["text.ends"][:1]}),
    "places beyond the texts": lambda columns: columns["text.ends"].__setitem__(1, 9),
    "places before the end of the texts": lambda columns: columns["list.ends"].__setitem__(1, 2),
    "places that fall": lambda columns: columns["list.ends"].__setitem__(0, 4),
    "no texts": without_bytes,
}


@pytest.mark.parametrize("name", HARM)
def test_a_piece_whose_columns_do_not_fit_its_rows_is_refused(name: str) -> None:
    columns = piece("a", "bc")
    HARM[name](columns)
    with pytest.raises(ValueError, match=r"values for 2 rows|does not fit its places"):
        Fold(2).add(np.array([0, 1]), columns)


@pytest.mark.parametrize("rows", [[1, 0], [1, 1], [-1, 0]])
def test_rows_of_a_piece_rise_from_zero(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="not ascending"):
        Fold(2).add(np.array(rows), piece("a", "b"))


def test_rows_without_some_texts_keep_every_column_of_the_others() -> None:
    assert State(rows_without(piece("a", "bc", "", "a"), "text", {"a", "zz"})).texts("text") == ["bc", ""]
    left = State(rows_without(piece("def", "a", "bc", "", "a"), "text", {"a"}))
    assert left.texts("text") == ["def", "bc", ""] and left.arrays["number"].tolist() == [3, 2, 0]
    assert unragged("list", left) == [[100, 101, 102], [98, 99], []] and left.arrays["pair"].shape == (3, 2)


@pytest.mark.parametrize("ends", [[1, 2], [1, 4], [2, 1, 3], [], [-1, 3]])
def test_lists_whose_places_do_not_fit_are_refused(ends: list[int]) -> None:
    state = State()
    state.put_texts("text", ["a", "bc"])
    state.add(ragged("list", [[1], [2, 3]]))
    for name in ("text", "list"):
        state.arrays[f"{name}.ends"] = np.array(ends, np.int64)
    with pytest.raises(ValueError, match="'text' does not fit"):
        state.texts("text")
    with pytest.raises(ValueError, match="'list' does not fit"):
        unragged("list", state)


def test_lists_come_back_empty_ones_and_missing_texts_too() -> None:
    state, inner = State(), State(values={"one": 1})
    inner.put_optional_texts("text", [None, "", "b"])
    inner.put_bytes("none", [])
    inner.later(lambda: ragged("list", [[], [1, -2]]))
    state.put("part", inner)
    found = state.part("part")
    assert found.optional_texts("text") == [None, "", "b"] and found.pieces("none") == [] and found.values == {"one": 1}
    assert unragged("list", found) == [[], [1, -2]] and unragged("empty", ragged("empty", [])) == []
    with pytest.raises(KeyError):
        state.part("another")


def test_values_come_and_go_in_the_lowest_free_row_also_where_free_rows_were_there_before() -> None:
    slots = Slots(["a", None, "c", None])
    assert [slots.add(name) for name in "bde"] == [1, 3, 4]
    assert slots.pop(2) == "c" and slots.pop(0) == "a"
    with pytest.raises(AssertionError, match="free"):
        slots[2]
    assert [slots.add(name) for name in "xyz"] == [0, 2, 5]
    slots.clear()
    assert slots.add("new") == 0


def test_a_state_of_what_changed_alone_is_no_whole_state() -> None:
    slots = Slots(["a", "b"])

    def packed(rows: list[str | None]) -> State:
        state = State()
        state.put_texts("names", (row or "" for row in rows))
        return state

    def state() -> State:
        new = State()
        new.put_table("people.", slots.table(packed, user_column="names"))
        return new

    first = state().frozen()
    held = {name: copy.held for name, copy in first.copies.items()}
    assert first.copies["people."].user_column == "names"
    for _ in range(300):
        slots.add("c")
    slots[1] = "z"
    changed = state().frozen(held)
    numbers = changed.copies["people."].numbers.tolist()
    assert numbers[-300:] == list(range(2, 302)) and 1 in numbers
    assert first.texts("people.names") == ["a", "b"]
    since = {name: copy.held for name, copy in state().frozen().copies.items()}
    slots[200] = "y"
    slots.pop(250)
    part = state().frozen(since)
    copy = part.copies["people."]
    assert copy.numbers.tolist() == [0, 1, 2, 200, 250]
    assert copy.columns(slice(1, 5)).texts("names") == ["z", "c", "y", ""]
    with pytest.raises(ValueError, match=r"'people.' holds \d+ of 302 rows"):
        _ = part.arrays
    assert state().texts("people.names") == ["a", "z", *["c"] * 198, "y", *["c"] * 49, "", *["c"] * 51]
    assert isinstance(slots.table(packed), Table)
