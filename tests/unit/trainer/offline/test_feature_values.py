"""Every feature of a few rows against plain loops over all takes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.offline.as_of import DrawnFrom, ItemFacts, Takes
from trainer.offline.data import Histories, ImpressionColumns
from trainer.offline.facets import Facet
from trainer.offline.features import WINDOWS, features

HOUR, DAY = 3_600, 86_400
USERS, ITEMS, TAKES, ROWS = 6, 9, 90, 120


def of_items() -> ItemFacts:
    words = np.zeros((ITEMS + 1, 3), np.float32)
    words[[1, 1, 2, 3, 3, 5, 8], [0, 1, 0, 1, 2, 2, 0]] = 1.0
    return ItemFacts(
        published_I=np.arange(ITEMS + 1) * 7 * HOUR,
        inferred_I=np.arange(ITEMS + 1) % 3 == 1,
        from_start_I=np.arange(ITEMS + 1) == 2,
        unpaired_I=np.arange(ITEMS + 1) == 6,
        category_I=np.array([0, 1, 2, 1, 0, 2, 3, 1, 0, 3]),
        numbers_I={
            "price": np.array([np.nan, 1.0, np.nan, 3.0, -2.0, 5.0, 0.5, np.nan, 4.0, 2.0]),
            "unknown": np.full(ITEMS + 1, np.nan),
        },
        facets={
            "colour": Facet.of_values(np.array([0, 1, 1, 2, 0, 2, 1, 0, 2, 1])),
            "genres": Facet.of_words(words),
        },
    )


ITEM_FACTS = of_items()
_rng = np.random.default_rng(5)
USER_T, ITEM_T = _rng.integers(1, USERS, TAKES), _rng.integers(1, ITEMS + 1, TAKES)
SECOND_T = _rng.integers(0, 40 * 24, TAKES) * HOUR // 4
LOG = Takes(USER_T, ITEM_T, SECOND_T, _rng.integers(1, 6, TAKES).astype(float), _rng.random(TAKES) < 0.15)
ORDER = np.lexsort((np.arange(TAKES), SECOND_T, USER_T))
HISTORIES = Histories.of(USER_T[ORDER], ITEM_T[ORDER], SECOND_T[ORDER])
SOURCE_N = np.where(_rng.random(ROWS) < 0.6, _rng.integers(0, TAKES, ROWS), -1)


def of_rows() -> ImpressionColumns:
    item = np.where(SOURCE_N >= 0, ITEM_T[SOURCE_N], _rng.integers(1, ITEMS + 1, ROWS))
    user, second = _rng.integers(1, USERS + 1, ROWS), _rng.integers(0, 42 * 24, ROWS) * HOUR // 4
    second = np.where((SOURCE_N >= 0) & (np.arange(ROWS) % 4 == 0), SECOND_T[SOURCE_N], second)  # drawn in that second
    users, seconds = USER_T[ORDER], SECOND_T[ORDER]
    start = np.array([(users < one).sum() for one in user])
    stop = start + np.array([((users == one) & (seconds < now)).sum() for one, now in zip(user, second, strict=True)])
    none, no_features = np.zeros(ROWS, np.int64), np.zeros((ROWS, 0), np.float32)
    label, retaken = none.astype(np.int8), none.astype(bool)
    return ImpressionColumns(user, item, second, label, retaken, start, stop, none, no_features, ())


IMPRESSIONS = of_rows()
COUNTED_T = ~LOG.announces_T & ~ITEM_FACTS.unpaired_I[ITEM_T]


def found(*, day_resolution: bool = False, takes: Takes = LOG) -> dict[str, NDArray[np.float32]]:
    sources = DrawnFrom.of(SOURCE_N, takes)
    values, names = features(IMPRESSIONS, HISTORIES, takes, ITEM_FACTS, sources, day_resolution=day_resolution)
    return dict(zip(names, values.T, strict=True))


class Row:
    """What one row may know, by loops."""

    def __init__(self, row: int) -> None:
        self.user, self.item = int(IMPRESSIONS.user_N[row]), int(IMPRESSIONS.item_N[row])
        self.now = int(IMPRESSIONS.second_N[row])
        source = int(SOURCE_N[row])
        self.source = source if source >= 0 and not LOG.announces_T[source] and SECOND_T[source] < self.now else -1
        self.seen = [t for t in range(TAKES) if SECOND_T[t] < self.now]
        own = sorted((t for t in self.seen if USER_T[t] == self.user), key=lambda t: (SECOND_T[t], t))
        self.own = own
        self.history = list(dict.fromkeys(int(ITEM_T[t]) for t in reversed(own)))
        self.weights = [2 ** (-back / 5) for back in range(len(self.history))]
        self.of_item = [t for t in self.seen if ITEM_T[t] == self.item and not LOG.announces_T[t] and t != self.source]

    def takes_of(self, item: int) -> int:
        return sum(1 for t in self.seen if ITEM_T[t] == item and not LOG.announces_T[t])

    def pairs_with(self, item: int) -> int:
        """Pairs of two takes of one user, without that of the row's source and its user's newest take of the item."""
        known = [t for t in self.seen if COUNTED_T[t]]
        wanted = {self.item, item}
        count = sum(
            1
            for place, one in enumerate(known)
            for other in known[place + 1 :]
            if USER_T[one] == USER_T[other] and {int(ITEM_T[one]), int(ITEM_T[other])} == wanted
        )
        if self.source >= 0 and COUNTED_T[self.source]:
            theirs = [t for t in known if USER_T[t] == USER_T[self.source] and ITEM_T[t] == item]
            newest = max(theirs, key=lambda t: (SECOND_T[t], t), default=self.source)
            count -= newest != self.source
        return count

    def weighted(self, values: list[float]) -> float:
        return sum(w * v for w, v in zip(self.weights, values, strict=True)) / max(sum(self.weights), 1e-9)


def assert_column(values: NDArray[np.float32], expected: list[float]) -> None:
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [Row(row) for row in range(ROWS)]


def test_of_the_user_and_of_how_often_an_item_was_taken(rows: list[Row]) -> None:
    columns = found()
    assert_column(columns["history length"], [math.log1p(len(row.own)) for row in rows])
    assert_column(columns["has history"], [float(bool(row.own)) for row in rows])
    idle = [math.log1p((row.now - SECOND_T[row.own[-1]]) / HOUR) if row.own else 0.0 for row in rows]
    assert_column(columns["user idle"], idle)
    assert_column(columns["takes"], [math.log1p(len(row.of_item)) for row in rows])
    for name, length in WINDOWS.items():
        counts = [sum(1 for t in row.of_item if SECOND_T[t] >= row.now - length) for row in rows]
        assert_column(columns[f"takes {name}"], [math.log1p(count) for count in counts])
    last = [max((int(SECOND_T[t]) for t in row.of_item), default=None) for row in rows]
    waits = [0.0 if at is None else math.log1p((row.now - at) / HOUR) for row, at in zip(rows, last, strict=True)]
    assert_column(columns["item idle"], waits)
    assert sum(row.source >= 0 for row in rows) > 20 and sum(at is None for at in last) > 5


def test_no_rows_have_all_features_too() -> None:
    sources = DrawnFrom.none(0)
    rows = IMPRESSIONS.select(np.zeros(0, np.int64))
    values, names = features(rows, HISTORIES, LOG, ITEM_FACTS, sources, day_resolution=False)
    assert values.shape == (0, len(names)) and set(names) == found().keys()


def test_windows_below_a_day_are_left_out_where_only_days_are_known() -> None:
    assert found().keys() - found(day_resolution=True).keys() == {"takes 1h", "takes 6h"}


def test_the_age_is_known_where_the_time_of_publication_is_or_the_item_was_taken_again(rows: list[Row]) -> None:
    known = [row.item != 2 and (row.item % 3 != 1 or bool(row.of_item)) for row in rows]
    ages = [math.log1p(max(row.now - row.item * 7 * HOUR, 0) / HOUR) for row in rows]
    columns = found()
    assert_column(columns["age"], [age if yes else 0.0 for age, yes in zip(ages, known, strict=True)])
    assert_column(columns["age known"], [float(yes) for yes in known])
    assert any(row.item % 3 == 1 and not row.of_item for row in rows)
    assert any(row.now < row.item * 7 * HOUR and yes for row, yes in zip(rows, known, strict=True))


def test_ratings_are_relative_to_the_mean_so_far_and_to_what_their_raters_gave(rows: list[Row]) -> None:
    rating = LOG.rating_T
    assert rating is not None

    def before(at: int, user: int | None = None) -> list[int]:
        return [t for t in range(TAKES) if SECOND_T[t] < at and user in (None, USER_T[t])]

    above = [rating[t] - sum(rating[before(SECOND_T[t])]) / max(len(before(SECOND_T[t])), 1) for t in range(TAKES)]

    def mean(at: int, user: int) -> float:
        known = before(at, user)
        return float(sum(above[t] for t in known)) / (len(known) + 5)

    given = [above[t] - mean(SECOND_T[t], USER_T[t]) for t in range(TAKES)]
    means = [mean(row.now, row.user) for row in rows]
    squares = [sum(above[t] ** 2 for t in row.own) / max(len(row.own), 1) for row in rows]
    columns = found()
    assert_column(columns["user's rating"], means)
    spreads = [math.sqrt(max(square - one**2, 0.0)) for square, one in zip(squares, means, strict=True)]
    assert_column(columns["user's rating spread"], spreads)
    assert_column(
        columns["item's rating"], [sum(given[t] for t in row.of_item) / (len(row.of_item) + 5) for row in rows]
    )
    assert not any("rating" in name for name in found(takes=replace(LOG, rating_T=None)))


def test_categories_are_compared_with_their_usual_share(rows: list[Row]) -> None:
    category, columns = ITEM_FACTS.category_I, found()
    own, share, lift, popularity = [], [], [], []
    for row in rows:
        kind = category[row.item]
        mine = sum(1 for t in row.own if category[ITEM_T[t]] == kind) if kind else 0
        usual = (sum(1 for t in row.seen if category[ITEM_T[t]] == kind) + 1) / (len(row.seen) + 4)
        own.append(math.log1p(mine))
        share.append(mine / max(len(row.own), 1))
        lift.append(math.log((mine + 5 * usual) / (len(row.own) + 5) / usual) if kind else 0.0)
        popularity.append(math.log(usual))
    assert_column(columns["category takes"], own)
    assert_column(columns["category share"], share)
    assert_column(columns["category lift"], lift)
    assert_column(columns["category popularity"], popularity)
    same = [[float(category[row.item] == category[one] > 0) for one in row.history] for row in rows]
    assert_column(columns["category recent"], [row.weighted(values) for row, values in zip(rows, same, strict=True)])
    assert_column(columns["category newest"], [values[0] if values else 0.0 for values in same])


def test_facets_and_numbers_are_compared_with_the_history(rows: list[Row]) -> None:
    columns, price = found(), ITEM_FACTS.numbers_I["price"]
    for name, facet in ITEM_FACTS.facets.items():
        shared = [[facet.shared(np.array([row.item]), np.array([one])).item() for one in row.history] for row in rows]
        assert_column(columns[f"{name} shared"], [row.weighted(one) for row, one in zip(rows, shared, strict=True)])
        assert_column(columns[f"{name} share"], [sum(one) / max(len(one), 1) for one in shared])
    assert_column(columns["price"], [float(np.nan_to_num(price[row.item])) for row in rows])
    assert_column(columns["price known"], [float(np.isfinite(price[row.item])) for row in rows])
    assert not any("unknown" in name for name in columns)
    against, away, mean = [], [], []
    for row in rows:
        target = price[row.item]
        known = [
            (weight, price[one])
            for weight, one in zip(row.weights, row.history, strict=True)
            if np.isfinite(price[one]) and np.isfinite(target)
        ]
        total = sum(weight for weight, _ in known)
        mean.append(sum(w * one for w, one in known) / total if known else 0.0)
        against.append(target - mean[-1] if known else 0.0)
        away.append(sum(w * abs(one - target) for w, one in known) / total if known else 0.0)
    assert_column(columns["price against history"], against)
    assert_column(columns["price away from history"], away)
    assert_column(columns["price of history"], mean)


def test_pairs_are_those_of_all_users_before_the_row_without_the_one_of_its_source(rows: list[Row]) -> None:
    columns = found()
    counts = [[row.pairs_with(one) for one in row.history] for row in rows]
    near, lift = [], []
    for row, pairs in zip(rows, counts, strict=True):
        own, others = len(row.of_item), [row.takes_of(one) for one in row.history]
        near.append([n / math.sqrt((own + 2) * (other + 2)) for n, other in zip(pairs, others, strict=True)])
        usual = sum(math.sqrt((own + 1) * (other + 1)) for other in others)
        lift.append(math.log((sum(pairs) + 0.5) / (usual + 1)))
    assert_column(columns["together"], [math.log1p(sum(pairs)) for pairs in counts])
    assert_column(columns["together most"], [math.log1p(max(pairs, default=0)) for pairs in counts])
    assert_column(columns["together near"], [row.weighted(one) for row, one in zip(rows, near, strict=True)])
    assert_column(columns["together nearest"], [max(one, default=0.0) for one in near])
    assert_column(columns["together lift"], lift)
