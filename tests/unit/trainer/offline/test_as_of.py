"""What is counted of an item as of a row, without the take that the row was drawn from, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.factories.neural import random_world
from trainer.offline.as_of import DrawnFrom, ItemTakes, Takes
from trainer.offline.data import CtrData, Histories
from trainer.offline.leak_checks import leaks

HOUR = 3_600


def takes(count: int = 300) -> Takes:
    rng = np.random.default_rng(2)
    second = rng.integers(0, 40, count) * HOUR
    return Takes(rng.integers(1, 9, count), rng.integers(1, 7, count), second, None, rng.random(count) < 0.15)


def test_counts_leave_out_announcements_and_the_source_where_it_lies_before_the_row() -> None:
    log, rng = takes(), np.random.default_rng(3)
    source = np.where(rng.random(200) < 0.8, rng.integers(0, 300, 200), -1)
    item = np.where(source >= 0, log.item_T[source], rng.integers(1, 9, 200))
    rows = replace(random_world(200).rows, item_N=item, second_N=rng.integers(0, 42, 200) * HOUR)
    sources = DrawnFrom.of(source, log)
    counts = ItemTakes(rows, log, sources)
    found = counts.count(), counts.recent(5 * HOUR), counts.last()
    for row in range(200):
        now = rows.second_N[row]
        seen = (log.item_T == item[row]) & (log.second_T < now) & ~log.announces_T
        announced = source[row] >= 0 and bool(log.announces_T[source[row]])
        assert sources.take_N[row] == (-1 if announced else source[row])
        if source[row] >= 0:
            assert announced or (sources.user_N[row], sources.second_N[row]) == (
                log.user_T[source[row]],
                log.second_T[source[row]],
            )
            seen[source[row]] = False
        expected = seen.sum(), (seen & (log.second_T >= now - 5 * HOUR)).sum()
        assert (found[0][row], found[1][row]) == expected
        newest = log.second_T[seen].max() if seen.any() else np.nan
        np.testing.assert_equal(found[2][row], float(newest))


def test_without_takes_nothing_was_drawn_from_any() -> None:
    none = np.zeros(0, np.int64)
    empty = Takes(none, none, none, None, none.astype(bool))
    assert DrawnFrom.of(np.array([-1, -1]), empty).take_N.tolist() == [-1, -1]


# ---- leak checks -------------------------------------------------------------------------------------------------


def checked(data: CtrData, *, stop: int = 0, learned: bool = False) -> list[str]:
    stops = np.full(int(data.rows.encoder_N.max()) + 1, stop)
    return leaks(data, encoder_stops=stops, learned_from_N=np.full(len(data), learned))


@pytest.fixture
def honest() -> CtrData:
    data = random_world(30)
    rows = data.rows
    order = np.arange(100, 100 + len(rows))
    second_T = np.full(len(data.histories.item_T), 99)
    return replace(
        data,
        histories=replace(data.histories, second_T=second_T),
        rows=replace(rows, second_N=order, retaken_N=np.zeros(len(rows), bool)),
    )


def test_each_check_speaks_at_its_own_boundary_and_only_then(honest: CtrData) -> None:
    rows = honest.rows
    assert checked(honest) == checked(honest, stop=100) == []
    assert "served by an encoder" in checked(honest, stop=101)[0]
    taken = replace(honest.histories, second_T=np.full(len(honest.histories.item_T), 100))
    assert "1 histories reach" in checked(replace(honest, histories=taken))[0] or not len(taken.second_T)
    nobodys = replace(rows, history_stop_N=rows.history_start_N)
    assert checked(replace(honest, histories=taken, rows=nobodys)) == []
    none = np.zeros(0, np.int64)
    assert checked(replace(honest, histories=Histories.of(none, none, none), rows=nobodys)) == []
    late = Histories.of(np.ones(3, np.int64), np.array([1, 2, 3]), np.array([50, 60, 129]))
    start, stop = np.zeros(30, np.int64), np.where(np.arange(30) < 29, 2, 3)
    own = replace(rows, history_start_N=start, history_stop_N=stop)
    assert "1 histories reach" in checked(replace(honest, histories=late, rows=own))[0]
    again = replace(honest, rows=replace(rows, retaken_N=np.arange(30) < 2))
    assert checked(again) == [] and "2 re-takes" in checked(again, learned=True)[0]
    dense = np.zeros((30, 2), np.float32)
    dense[7, 1] = np.inf
    assert "not numbers" in checked(replace(honest, rows=replace(rows, dense_NF=dense)))[0]
    same = replace(rows, second_N=np.maximum(rows.second_N, 110))
    assert checked(replace(honest, rows=same)) == []
    back = rows.second_N.copy()
    back[-1] -= 2
    assert "order of time" in checked(replace(honest, rows=replace(rows, second_N=back)))[0]
