"""A history holds each item once, at its newest take."""

from __future__ import annotations

import random

import numpy as np

from tests.factories.samples import behaviour
from tests.factories.timelines import Timeline
from trainer.offline.data import Histories
from trainer.samples.histories import newest_only, next_takes, place_of
from trainer.samples.join_rules import JoinRules


def test_click_cart_and_purchase_of_an_item_hold_one_place() -> None:
    line = Timeline(history_length=3)
    line.second(0, behaviour("t0", "click", item="a"))
    for n, kind in enumerate(("click", "cart", "purchase")):
        line.second(n + 1, behaviour(f"b{n}", kind, item="b"))
    line.second(5, behaviour("t1", "click", item="c"))
    line.second(9, behaviour("x", item="d"))
    (row,) = line.end()
    assert line.history(row) == ["a", "b", "c"]
    assert [second - row.second for second in row.history_seconds] == [-9, -6, -4]


def test_an_item_taken_again_moves_to_the_end() -> None:
    line = Timeline(history_length=3)
    for n, item in enumerate("abca"):
        line.second(n, behaviour(f"t{n}", "click", item=item))
    line.second(9, behaviour("x", item="d"))
    assert line.history(line.end()[0]) == ["b", "c", "a"]


def test_takes_in_any_order_and_a_longer_history_lead_to_the_same_newest_items() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        takes = [(float(at), f"i{rng.randrange(6)}") for at in range(20)]
        expected = sorted({item: at for at, item in takes}.items(), key=lambda taken: taken[1])[-3:]
        for length in (3, 4, 20):
            items: list[str] = []
            times: list[float] = []
            for at, item in rng.sample(takes, len(takes)):
                where, former = place_of(items, times, item, at)
                if where is None:
                    continue
                if former is not None:
                    del items[former], times[former]
                items.insert(where, item)
                times.insert(where, at)
                del items[:-length], times[:-length]
            assert list(zip(items, times, strict=True))[-3:] == expected


def test_of_equal_times_the_take_that_comes_last_is_the_newest() -> None:
    assert place_of(["a", "b"], [1.0, 1.0], "a", 1.0) == (1, 0)
    assert place_of(["a", "b"], [1.0, 2.0], "a", 0.5) == (None, 0)
    assert place_of(["a", "b"], [1.0, 2.0], "c", 0.5) == (0, None)


def test_the_places_of_an_earlier_builds_history_that_are_kept_are_the_newest() -> None:
    assert newest_only(["a", "b", "a", "c", "b"]) == [2, 3, 4]
    assert newest_only([]) == []


def test_histories_as_of_a_moment_hold_each_item_once_whatever_was_taken_later() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        user_T = np.sort(rng.integers(0, 3, 60))
        item_T, second_T = rng.integers(1, 9, 60), np.arange(60)
        histories = Histories.of(user_T, item_T, second_T)
        start_N, stop_N = [], []
        for user in range(3):
            first, last = np.searchsorted(user_T, [user, user + 1])
            start_N += [first] * 5
            stop_N += sorted(rng.integers(first, last + 1, 5).tolist())
        for length in (1, 4, 50):
            row_P, place_P, age_P = histories.newest(np.array(start_N), np.array(stop_N), length)
            for n, (start, stop) in enumerate(zip(start_N, stop_N, strict=True)):
                expected = list(dict.fromkeys(item_T[start:stop][::-1].tolist()))
                assert item_T[place_P[row_P == n]].tolist() == expected[:length]
                assert age_P[row_P == n].tolist() == list(range(len(expected[:length])))
                assert histories.lengths(np.array([start]), np.array([stop]))[0] == len(expected)


def test_a_log_without_repeated_items_needs_no_positions_of_next_takes() -> None:
    one = np.array([1, 1, 2])
    assert next_takes(one, np.array([5, 6, 5])).tolist() == [3, 3, 3]
    assert Histories.of(one, np.array([5, 6, 5]), one).next_T is None
    assert next_takes(one, np.array([5, 5, 5])).tolist() == [1, 3, 3]


def test_releases_of_earlier_builds_are_rebuilt_with_every_take_in_their_histories() -> None:
    now = JoinRules.of(Timeline.config(), [0])
    assert JoinRules.kept(now.settings, [0], ()).items_once
    earlier = {name: value for name, value in now.settings.items() if name != "items_once"}
    rules = JoinRules.kept(earlier, [0], ())
    line = Timeline()
    line.join = rules.join(line.catalogue)
    for n in range(2):
        line.second(n, behaviour(f"t{n}", "click", item="a"))
    line.second(9, behaviour("x", item="d"))
    assert line.history(line.end()[0]) == ["a", "a"]


def test_a_snapshot_of_an_earlier_build_is_restored_with_each_item_once() -> None:
    line, again = Timeline(), Timeline()
    line.join = JoinRules.kept(
        {name: value for name, value in JoinRules.of(Timeline.config(), [0]).settings.items() if name != "items_once"},
        [0],
        (),
    ).join(line.catalogue)
    for n, item in enumerate("aba"):
        line.second(n, behaviour(f"t{n}", "click", item=item))
    again.catalogue.restore(line.catalogue.snapshot())
    again.join.restore(line.join.snapshot())
    again.second(9, behaviour("x", item="d"))
    assert again.history(again.end()[0]) == ["b", "a"]
