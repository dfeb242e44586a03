"""The click log that is made from a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.factories.offline_folders import DAY, START, real_set, write, write_small_set
from trainer.datasets.exposures import (
    PUBLISHED_AT_IS,
    behaviours_of,
    defining_interactions,
    draw_around,
    how_published,
    id_prefix,
    is_drawn_name,
    match_to_rows,
    sources_of_draws,
    spread_over_days,
)
from trainer.datasets.folder import open_data_set


def a_stream() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Second, user and item of 600 interactions, and when each of 80 items was published."""
    rng = np.random.default_rng(1)
    ts = np.sort(rng.integers(0, 2_000, 600))
    item = np.minimum(rng.geometric(0.05, 600), 80) - 1
    publish = np.full(80, 5_000)
    np.minimum.at(publish, item, ts)
    return ts, rng.integers(0, 40, 600), item, publish


def test_drawn_exposures_keep_every_rule() -> None:
    ts, user, item, publish = a_stream()
    row, number, drawn = draw_around(ts, user, item, publish, seed=4, per_take=4, window=50)
    taken = set(zip(user.tolist(), item.tolist(), strict=True))
    per_row: dict[int, list[int]] = {}
    for at, count, one in zip(row.tolist(), number.tolist(), drawn.tolist(), strict=True):
        per_row.setdefault(at, []).append(one)
        assert len(per_row[at]) == count + 1
        assert (int(user[at]), one) not in taken
        assert publish[one] <= ts[at]
        assert one in item[max(0, at - 50) : at + 51]
    assert all(len(set(chosen)) == len(chosen) <= 4 for chosen in per_row.values())


def test_with_retakes_what_a_user_took_before_may_be_drawn_and_what_they_take_then_or_later_never() -> None:
    ts, user, item, publish = a_stream()
    row, _, drawn = draw_around(ts, user, item, publish, seed=4, per_take=4, window=50, retakes=True)
    takes: dict[tuple[int, int], list[int]] = {}
    for second, who, what in zip(ts.tolist(), user.tolist(), item.tolist(), strict=True):
        takes.setdefault((who, what), []).append(second)
    earlier = 0
    for at, one in zip(row.tolist(), drawn.tolist(), strict=True):
        own = takes.get((int(user[at]), one), [])
        assert all(second < ts[at] for second in own)
        earlier += bool(own)
    assert earlier > 20


def test_a_draw_is_short_only_where_the_window_holds_no_more() -> None:
    ts, user, item, publish = a_stream()
    row, _, _ = draw_around(ts, user, item, publish, seed=4, per_take=4, window=50)
    taken = set(zip(user.tolist(), item.tolist(), strict=True))
    for at in range(len(ts)):
        around = {int(one) for one in item[max(0, at - 50) : at + 51]}
        fitting = {one for one in around if publish[one] <= ts[at] and (int(user[at]), one) not in taken}
        assert int((row == at).sum()) == min(4, len(fitting))


def test_items_are_drawn_from_after_the_moment_too_and_as_often_as_they_are_taken() -> None:
    # one popular and one rare item, taken only after the moment; the user took neither
    item = np.array([0] + [1] * 90 + [2] * 10)
    ts, user = np.arange(101), np.array([0] + [1] * 100)
    hits = np.zeros(3)
    for seed in range(400):
        row, _, drawn = draw_around(ts, user, item, np.zeros(3, int), seed=seed, per_take=1, window=100)
        hits[drawn[row == 0]] += 1
    assert hits[0] == 0
    assert 0.84 < hits[1] / hits.sum() < 0.96


def test_same_seed_same_draws_whatever_the_row_order() -> None:
    ts, user, item, publish = a_stream()
    first = draw_around(ts, user, item, publish, seed=4)
    again = draw_around(ts, user, item, publish, seed=4)
    other = draw_around(ts, user, item, publish, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[2], other[2])


@pytest.mark.parametrize(("window", "sources"), [(3, [0, 6]), (2, [-1, -1])])
def test_a_draw_may_come_from_either_end_of_its_window_and_from_nothing_beyond(window: int, sources: list[int]) -> None:
    ts, item = np.arange(7) * 10, np.array([1, 0, 0, 0, 0, 0, 2])
    row, drawn = np.array([3, 3]), np.array([1, 2])
    assert sources_of_draws(ts, item, row, drawn, seed=0, window=window).tolist() == sources


@pytest.mark.parametrize(("window", "drawn"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3])])
def test_an_exposure_is_drawn_up_to_the_end_of_the_window_behind_its_take(window: int, drawn: list[int]) -> None:
    ts, everyone = np.arange(4), np.arange(4)
    for per_take in (3, 1):
        found = [
            draw_around(ts, everyone, everyone, np.zeros(4, np.int64), seed=seed, per_take=per_take, window=window)
            for seed in range(20)
        ]
        assert {int(item) for row, _, items in found for at, item in zip(row, items, strict=True) if at == 0} == {
            *drawn
        }


def test_the_time_of_publication_is_known_unless_it_is_that_of_a_first_take_and_unknown_on_the_first_day(
    tmp_path: Path,
) -> None:
    write(tmp_path, "items", item_id=[*"abcde"], title=[*"abcde"],
          publish_ts=[START, START + 5, START + 2 * DAY, START + 2 * DAY, START + 3 * DAY])  # fmt: skip
    ts = [START + 5, START + 9, START + 2 * DAY, START + 2 * DAY + 1]
    write(tmp_path, "interactions", user_id=[*"uvuv"], item_id=[*"bacd"], ts=ts, label=[1] * 4)
    found = how_published(open_data_set(tmp_path)).tolist()
    assert [PUBLISHED_AT_IS[one] for one in found] == ["known", "unknown", "inferred", "known", "known"]


def test_the_source_of_a_draw_is_a_take_at_its_moment_of_the_day_and_nothing_else_has_one(tmp_path: Path) -> None:
    write(tmp_path, "items", item_id=[*"abcdef"], title=[*"abcdef"], publish_ts=[START] * 6)
    days = [START + n * DAY for n in range(12)]
    write(
        tmp_path, "interactions", user_id=[f"u{n}" for n in range(12)], item_id=[*"abcdef"] * 2, ts=days, label=[1] * 12
    )
    log = behaviours_of(open_data_set(tmp_path), seed=0)
    takes = {int(log.row[p]): int(log.ts[p]) for p in np.flatnonzero(log.is_take)}
    drawn = log.draw >= 0
    assert drawn.sum() == 48 and (log.source >= 0).tolist() == drawn.tolist()
    assert log.source_ts[~drawn].tolist() == [0] * 24
    assert log.source_ts[drawn].tolist() == [takes[row] for row in log.source[drawn].tolist()]
    assert any(second % DAY for second in takes.values())


def test_a_drawn_exposure_is_told_by_the_end_of_its_name() -> None:
    assert is_drawn_name("0a1b-n12-3") and is_drawn_name("p-n1-2-n0-0")
    assert not any(map(is_drawn_name, ("p-s12", "p-x3", "p-n12-3x", "p-n12", "n1-2")))


def test_days_are_spread_over_their_own_day_by_the_seed() -> None:
    days = np.repeat(np.arange(3) * DAY, 500)
    spread = spread_over_days(days, seed=2)
    assert np.array_equal(spread // DAY * DAY, days)
    assert len(np.unique(spread % DAY)) > 1_000
    assert np.array_equal(spread, spread_over_days(days, seed=2))
    assert not np.array_equal(spread, spread_over_days(days, seed=3))


def test_only_the_first_interaction_at_the_publish_time_defines_it() -> None:
    # item 0: published by its row; item 1: published long before; item 2: two rows of the publishing day, the later
    # row comes first once the day is spread
    recorded = np.array([10, 20, 0, 0, 30])
    spread = np.array([10, 20, 500, 400, 30])
    item = np.array([0, 1, 2, 2, 0])
    flags = defining_interactions(spread, recorded, item, publish_ts=np.array([10, 5, 0]))
    assert flags.tolist() == [True, False, False, True, False]
    early = defining_interactions(np.array([10]), np.array([10]), np.array([0]), publish_ts=np.array([11]))
    assert early.tolist() == [False], "taken before it was published"


def test_given_negatives_are_shared_out_among_the_rows_of_their_user_and_time() -> None:
    ts, user = np.array([0, 0, 0, 7]), np.array([1, 1, 2, 1])
    shown_ts = np.array([0, 0, 0, 0, 0, 7, 9])
    shown_user = np.array([1, 2, 1, 1, 1, 1, 1])
    assert match_to_rows(ts, user, shown_ts, shown_user).tolist() == [0, 2, 0, 1, 1, 3, -1]


def test_each_taken_row_is_an_exposure_and_a_take_at_the_same_second(tmp_path: Path) -> None:
    folder = write_small_set(tmp_path / "set")
    log = behaviours_of(open_data_set(folder), seed=0)
    assert len(log) == 5  # three rows, two of them taken, label 0 is what the set itself saw
    assert log.drawn_from is None
    for take in np.flatnonzero(log.is_take):
        shown = [p for p in np.flatnonzero(~log.is_take) if log.exposure_name(p) == log.exposure_name(take)]
        assert len(shown) == 1
        assert shown[0] < take
        assert log.ts[shown[0]] == log.ts[take]
        assert log.item[shown[0]] == log.item[take]


def test_a_cap_keeps_all_that_its_users_took_and_draws_beside_it_from_their_takes_alone(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    ts, user, item, publish = a_stream()
    write(folder, "items", item_id=np.arange(80), title=["x"] * 80, publish_ts=START + publish)
    write(folder, "interactions", user_id=user, item_id=item, ts=START + ts, label=np.ones(600, int))
    data = open_data_set(folder)

    def events(cap: int | None) -> tuple[list[tuple[int, ...]], set[int], set[int]]:
        log = behaviours_of(data, seed=9, events=cap)
        own = log.draw < 0
        columns = (log.ts, log.user, log.item, log.is_take)
        rows = [tuple(int(column[n]) for column in columns) for n in np.flatnonzero(own)]
        assert np.array_equal(log.source >= 0, ~own), "each drawn exposure knows its source"
        assert np.array_equal(data.interactions.item[log.source[~own]], log.item[~own])
        return sorted(rows), set(log.user.tolist()), set(data.interactions.user[log.source[~own]].tolist())

    (whole, _, _), (capped, kept, drawn_from) = events(None), events(200)
    assert 0 < len(kept) < 40 and drawn_from <= kept
    assert capped == [one for one in whole if one[1] in kept]
    assert sum(one[3] for one in capped) <= 200
    assert events(200) == (capped, kept, drawn_from)


def test_exposure_names_are_unique(tmp_path: Path) -> None:
    folder = write_small_set(tmp_path / "set")
    write(folder, "exposures", ts=[START + 10, START + 10, START + 999], user_id=["b", "b", "a"], item_id=[9, 7, 7])
    log = behaviours_of(open_data_set(folder), seed=0)
    names = [log.exposure_name(p) for p in np.flatnonzero(~log.is_take)]
    assert sorted(names) == ["n0-0", "n0-1", "s0", "s1", "s2", "x2"]


def test_the_order_within_a_second_does_not_tell_what_was_taken(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    n = 400
    write(folder, "items", item_id=np.arange(n), title=["x"] * n, publish_ts=[START] * n)
    write(
        folder,
        "interactions",
        user_id=np.arange(n),
        item_id=np.arange(n),
        ts=START + np.arange(n) * 10 + 1,
        label=[1] * n,
    )
    log = behaviours_of(open_data_set(folder), seed=0)
    first = {}
    for p in np.flatnonzero(~log.is_take):
        first.setdefault(int(log.ts[p]), int(log.draw[p]))
    share = np.mean([draw == -1 for draw in first.values()])
    assert 0.12 < share < 0.28  # one in five


def test_without_interactions_or_exposures_there_is_nothing_to_match() -> None:
    none = np.zeros(0, int)
    assert match_to_rows(none, none, np.array([3, 4]), np.array([1, 1])).tolist() == [-1, -1]
    assert match_to_rows(np.array([3]), np.array([1]), none, none).tolist() == []
    assert match_to_rows(np.array([5]), np.array([0]), np.array([0, 5]), np.array([1, 0])).tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("shown", "retakes", "drawn_from"),
    [
        ("exposures", False, None),
        ("sampled_negatives", False, "sampled (sampled_negatives.parquet)"),
        (None, False, "drawn by seed 3: 4 per take from what was taken within 1,000 events before or after, already "
         "published then, never taken by that user"),
        (None, True, "drawn by seed 3: 4 per take from what was taken within 1,000 events before or after, already "
         "published then, not taken by that user then or later"),
    ],
)  # fmt: skip
def test_the_report_says_where_exposures_come_from(
    tmp_path: Path, shown: str | None, retakes: bool, drawn_from: str | None
) -> None:
    folder = write_small_set(tmp_path / "set")
    write(folder, "interactions", user_id=["b", "a"], item_id=[5, 7], ts=[START + 10, START + 25], label=[1, 1])
    if shown:
        write(folder, shown, user_id=["b", "c"], item_id=[7, 7], ts=[START + 10, START + 30])
    log = behaviours_of(open_data_set(folder), seed=3, retakes=retakes)
    assert log.drawn_from == drawn_from
    drawn = sorted(zip(log.ts[log.draw >= 0].tolist(), log.item[log.draw >= 0].tolist(), strict=True))
    assert drawn == ([(START + 10, 1), (START + 30, 1)] if shown else [(START + 25, 0)])
    assert not log.is_take[log.draw >= 0].any()


def test_exposures_of_a_day_stand_beside_the_moment_of_their_interaction_or_at_one_of_their_own(tmp_path: Path) -> None:
    folder = write_small_set(tmp_path / "set")
    write(folder, "items", item_id=[5, 7, 9], title=["x"] * 3, publish_ts=[START] * 3)
    days = [START + DAY, START + 2 * DAY]
    write(folder, "interactions", user_id=["a", "a"], item_id=[5, 7], ts=days, label=[1, 1])
    write(folder, "exposures", user_id=["a", "a", "b"], item_id=[9, 9, 9], ts=[*days, days[0]])
    log = behaviours_of(open_data_set(folder), seed=0)
    moment = {int(row): int(ts) for ts, row, take in zip(log.ts, log.row, log.is_take, strict=True) if take}
    beside = {int(row): int(ts) for ts, row, draw in zip(log.ts, log.row, log.draw, strict=True) if draw >= 0}
    assert {row: beside[row] for row in (0, 1)} == moment and set(beside) == {0, 1, -3}
    assert beside[-3] // DAY * DAY == days[0] and beside[-3] % DAY and beside[-3] != moment[0]


def test_ids_depend_on_set_and_seed() -> None:
    assert id_prefix("a", 0) == id_prefix("a", 0)
    assert len({id_prefix("a", 0), id_prefix("a", 1), id_prefix("b", 0)}) == 3


@pytest.mark.data
def test_the_fashion_week_uses_its_popularity_matched_negatives() -> None:
    data = real_set("hm_week_fashion")
    log = behaviours_of(data, seed=0, events=20_000)
    takes = log.is_take
    assert 19_000 < takes.sum() <= 20_000
    assert len(log) == 6 * takes.sum()
    assert (log.row >= 0).all()  # every negative stands beside a purchase of its user and day
    assert set((log.ts // DAY).tolist()) == set((data.interactions.ts // DAY).tolist())
    assert (log.ts >= data.publish_ts[log.item]).all()
    bought = set(zip(log.user[takes].tolist(), log.item[takes].tolist(), strict=True))
    shown = np.flatnonzero(log.draw >= 0)
    assert not any((int(log.user[p]), int(log.item[p])) in bought for p in shown)


@pytest.mark.data
def test_film_ratings_get_four_drawn_exposures_each() -> None:
    data = real_set("movietweetings100k_posters")
    log = behaviours_of(data, seed=0)
    assert log.is_take.sum() == 100_000
    assert 399_900 < (log.draw >= 0).sum() <= 400_000
    assert (log.ts >= data.publish_ts[log.item]).all()
    assert log.defines_publish[log.is_take].sum() == len(data.item_ids)
    # each rule again on all of them, in one go
    pair = log.user * len(data.item_ids) + log.item
    assert not np.isin(pair[log.draw >= 0], pair[log.is_take]).any()
