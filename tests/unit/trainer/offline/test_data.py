"""Histories that hold each item once, against plain loops over the takes of a slice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.factories.neural import random_world
from trainer.offline.data import CtrData, Histories, history_matrix

LENGTHS = (1, 2, 3, 7, 30)


def histories(kinds: int) -> tuple[Histories, list[int], list[int]]:
    """Sixty takes of three users, and where slices from each one's first take on start and stop."""
    rng = np.random.default_rng(kinds)
    user, item = np.repeat([4, 5, 9], [20, 10, 30]), rng.integers(1, kinds + 1, 60)
    slices = [(first, stop) for first, end in ((0, 20), (20, 30), (30, 60)) for stop in range(first, end + 1)]
    return Histories.of(user, item, np.arange(60)), [one for one, _ in slices], [other for _, other in slices]


def newest_first(item: list[int]) -> list[tuple[int, int]]:
    """(place, item) of each item's newest take."""
    found: dict[int, int] = {}
    for place in range(len(item) - 1, -1, -1):
        found.setdefault(item[place], place)
    return [(place, one) for one, place in found.items()]


@pytest.mark.parametrize("kinds", [1, 2, 5, 40, 10_000_000])
def test_the_newest_items_of_a_slice_are_those_of_a_loop(kinds: int) -> None:
    log, starts, stops = histories(kinds)
    start, stop = np.array(starts), np.array(stops)
    item = log.item_T.tolist()
    whole = [newest_first(item[a:b]) for a, b in zip(starts, stops, strict=True)]
    assert log.lengths(start, stop).tolist() == [len(one) for one in whole]
    for length in LENGTHS:
        row, place, age = log.newest(start, stop, length)
        expected = [
            (n, starts[n] + at, back)
            for n, one in enumerate(whole)
            for back, (at, _) in enumerate(sorted(one, reverse=True)[:length])
        ]
        assert list(zip(row.tolist(), place.tolist(), age.tolist(), strict=True)) == expected
        data = data_of(log, starts, stops)
        found = history_matrix(data, np.arange(len(starts)), length)
        lines = [[i for _, i in sorted(one, reverse=True)[:length]] for one in whole]
        assert found.shape == (len(starts), max(map(len, lines)))
        assert [line[: len(own)].tolist() for line, own in zip(found, lines, strict=True)] == lines
        assert not any(line[len(own) :].any() for line, own in zip(found, lines, strict=True))


def data_of(log: Histories, starts: list[int], stops: list[int]) -> CtrData:
    data = random_world(len(starts))
    rows = replace(data.rows, history_start_N=np.array(starts), history_stop_N=np.array(stops))
    return replace(data, histories=log, rows=rows)


def test_slices_without_takes_hold_nothing() -> None:
    log, _, _ = histories(2)
    nowhere = np.array([0, 7, 60])
    assert log.lengths(nowhere, nowhere).tolist() == [0, 0, 0]
    assert [len(one) for one in log.newest(nowhere, nowhere, 5)] == [0, 0, 0]
    assert history_matrix(data_of(log, [0, 7], [0, 7]), np.arange(2), 5).tolist() == [[0], [0]]
    none = np.zeros(0, np.int64)
    assert history_matrix(data_of(Histories.of(none, none, none), [0, 0], [0, 0]), np.arange(2), 5).tolist() == [
        [0],
        [0],
    ]
