"""Columns of a folder of four items and twelve takes, worked out by hand."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories.offline_folders import DAY, START, read_protocol, write, write_days, write_stream
from trainer.features.config import FeatureConfig
from trainer.offline.columns import Recorded, read_columns
from trainer.samples.id_hashes import id_hashes

D = DAY
TAKES = [
    (10, "u", "a"), (D, "v", "a"), (D + 5, "w", "a"), (2 * D + 100, "u", "b"), (2 * D + 200, "v", "b"),
    (3 * D, "w", "b"),
    (4 * D, "v", "c"), (5 * D, "u", "c"),  # training
    (6 * D, "u", "a"), (6 * D + 100, "u", "b"),  # validation
    (7 * D, "w", "d"), (8 * D, "v", "d"),  # test
]  # fmt: skip
SHOWN = [
    (4 * D - 1, "u", "b"), (5 * D, "u", "d"), (5 * D, "x", "b"), (7 * D - 50, "w", "d"), (7 * D, "w", "b"),
    (7 * D, "x", "a"),
]  # fmt: skip
"""Of `d` one is shown before it is published and one as it is; `x` never takes anything."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`c` is published by its first take, and `b` is held out."""
    folder = tmp_path_factory.mktemp("by-hand")
    write(
        folder,
        "items",
        item_id=["a", "b", "c", "d"],
        title=["Red", "Blue", None, "Green"],
        text=["soft", None, "only", "wool"],
        category=["Hat", " hat ", None, "coat"],
        price=[1.0, math.exp(2), None, math.exp(6)],
        year=[2010, 2030, 2020, 2060],
        weight=[None, None, None, 2.5],
        cold_holdout=[False, True, False, False],
        publish_ts=[START + one for one in (0, 2 * D, 4 * D, 7 * D - 50)],
    )
    write_rows(folder, "interactions", TAKES, label=[1] * len(TAKES))
    write_rows(folder, "exposures", SHOWN)
    return folder


RATINGS = [4.0, 8.0, 3.0, 5.0, 9.0, 2.0, 7.0, 1.0, 6.0, 8.0, 4.0, 5.0]


def write_rows(folder: Path, name: str, rows: list[tuple[int, str, str]], **more: Any) -> None:
    ts, user, item = (list(column) for column in zip(*rows, strict=True))
    write(folder, name, ts=[START + one for one in ts], user_id=user, item_id=item, **more)


def row_names(recorded: Recorded) -> list[str]:
    rows = recorded.rows
    pairs = zip(rows.user_N.tolist(), rows.item_N.tolist(), strict=True)
    return [f"{'uvwx'[user]}{recorded.items.item_ids[item]}" for user, item in pairs]


def rows_of(recorded: Recorded) -> list[tuple[Any, ...]]:
    """User and item, second, label, retaken, with history, takes before, cold, of the first day, age."""
    rows, facts = recorded.rows, recorded.facts
    seconds = (rows.second_N - START).tolist()
    ages = [None if math.isnan(age) else age for age in facts.age_seconds_N.tolist()]
    flags = zip(
        *(one.tolist() for one in (rows.label_N, facts.retaken_N, facts.with_history_N, facts.takes_before_N)),
        facts.cold_N.tolist(),
        facts.from_start_N.tolist(),
        strict=True,
    )
    found = zip(row_names(recorded), seconds, flags, ages, strict=True)
    return sorted(
        ((name, second, *map(int, flag), age) for name, second, flag, age in found), key=lambda row: row[1::-1]
    )


def test_rows_know_what_came_before_them(folder: Path) -> None:
    _, recorded = read_protocol(folder, "time-split")
    assert rows_of(recorded) == [
        ("vc", 4 * D, 1, 0, 1, 0, 0, 0, None),  # the item's age is unknown: the take published it
        ("uc", 5 * D, 1, 0, 1, 1, 0, 0, D),
        ("ud", 5 * D, 0, 0, 1, 0, 1, 0, None),
        ("xb", 5 * D, 0, 0, 0, 3, 1, 0, 3 * D),
        ("ua", 6 * D, 1, 1, 1, 3, 0, 1, 6 * D),
        ("ub", 6 * D + 100, 1, 1, 1, 3, 1, 0, 4 * D + 100),
        ("wd", 7 * D - 50, 0, 0, 1, 0, 1, 0, 0),
        ("wb", 7 * D, 0, 1, 1, 4, 1, 0, 5 * D),
        ("wd", 7 * D, 1, 0, 1, 0, 1, 0, 50),
        ("xa", 7 * D, 0, 0, 0, 4, 0, 1, 7 * D),
        ("vd", 8 * D, 1, 0, 1, 1, 1, 0, D + 50),
    ]
    assert not recorded.facts.days_only and recorded.drawn_from is None and recorded.labels == "takes"


def test_under_cold_takes_of_held_out_items_are_in_no_count_and_no_history_but_are_retakes_still(folder: Path) -> None:
    _, recorded = read_protocol(folder, "cold")
    found = {(name, second): more for name, second, *more in rows_of(recorded)}
    assert found["xb", 5 * D] == [0, 0, 0, 0, 1, 0, 3 * D]
    assert found["ub", 6 * D + 100] == [1, 1, 1, 0, 1, 0, 4 * D + 100]
    assert found["wb", 7 * D] == [0, 1, 1, 0, 1, 0, 5 * D]
    assert recorded.histories.item_T.tolist() == [1, 3, 1, 1, 3, 4, 1, 4]


@pytest.mark.parametrize(("name", "judged"), [("time-split", ["vd", "wb", "wd", "xa"]), ("cold", ["vd", "wb", "wd"])])
def test_models_learn_from_what_is_neither_held_out_nor_taken_before_and_are_judged_by_all_or_the_cold(
    name: Any, judged: list[str], folder: Path
) -> None:
    protocol, recorded = read_protocol(folder, name)
    names = np.array(row_names(recorded))
    assert sorted(names[recorded.learned_from(protocol.train)]) == ["uc", "ud", "vc"]
    assert sorted(names[recorded.learned_from(protocol.validation)]) == ["wd"]
    assert sorted(names[recorded.judged_by(protocol.test)]) == judged
    assert recorded.held_out_N.tolist() == [one[1] == "b" for one in names]


def test_attributes_of_items_are_standardised_on_those_that_were_published_when_encoders_were_trained(
    folder: Path,
) -> None:
    _, recorded = read_protocol(folder, "time-split")
    items = recorded.items
    assert items.item_ids == ["", "a", "b", "c", "d"]
    assert items.titles == ["", "Red. soft", "Blue", "only", "Green. wool"]
    assert items.category_I.tolist() == [0, 2, 2, 0, 1]
    assert items.hashes_I2.tolist() == [[0, 0], *(list(id_hashes(name)) for name in "abcd")]
    # `c` is published as training begins and `d` later, so means are of the first two; `weight` was known of neither
    assert items.attribute_names == (
        *("price", "price known", "year", "title length", "text length", "text length known"),
    )
    titles, mean, away = [math.log(4), math.log(5)], math.log(20) / 2, math.log(5 / 4) / 2
    expected = {
        "price": [0, -1, 1, 0, 5],
        "price known": [0, 1, 1, 0, 1],
        "year": [0, -1, 1, 0, 4],
        "title length": [0, -1, 1, -mean / away, (math.log(6) - mean) / away],
        "text length": [0, 0, 0, 0, 0],
        "text length known": [0, 1, 0, 1, 1],
    }
    assert sum(titles) / 2 == pytest.approx(mean)
    for name, column in expected.items():
        found = items.attributes_IA[:, items.attribute_names.index(name)]
        np.testing.assert_allclose(found, column, rtol=1e-4, atol=1e-4, err_msg=name)


def test_numbers_of_items_are_features_on_a_scale_of_their_own(folder: Path) -> None:
    _, recorded = read_protocol(folder, "time-split")
    rows = recorded.rows
    columns = dict(zip(rows.dense_names, rows.dense_NF.T, strict=True))
    first = {name: row for row, name in reversed(list(enumerate(row_names(recorded))))}
    chosen = [first[name] for name in ("ua", "ub", "uc", "ud")]
    assert columns["price"][chosen].tolist() == pytest.approx([0, 2, 0, 6])
    assert columns["price known"][chosen].tolist() == [1, 1, 0, 1]
    assert columns["year"][chosen].tolist() == pytest.approx([1, 3, 2, 6])
    assert columns["weight"][chosen].tolist() == [0, 0, 0, 2.5] and columns["weight known"][chosen].sum() == 1
    age = {name: (columns["age"][row], columns["age known"][row]) for name, row in first.items()}
    assert age["ua"] == (0, 0), "of the first day"
    assert age["ub"] == (pytest.approx(math.log1p((4 * D + 100) / 3_600)), 1)
    assert age["vc"] == age["uc"] == (0, 0), "published by its take"
    assert age["vd"] == (pytest.approx(math.log1p((D + 50) / 3_600)), 1)


def test_a_set_without_categories_has_none(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "items", item_id=["a", "b"], title=["Red", "Blue"], publish_ts=[START] * 2)
    write_rows(tmp_path, "interactions", [(n * D, "u", "ab"[n % 2]) for n in range(12)], label=[1] * 12)
    _, recorded = read_protocol(tmp_path, "time-split")
    assert recorded.items.category_I.tolist() == [0, 0, 0]


def test_where_only_days_are_known_all_rows_are_at_midnight_and_ages_begin_at_nought(tmp_path: Path) -> None:
    write(tmp_path, "items", item_id=["a", "b"], title=["Red", "Blue"], publish_ts=[START, START + 7 * D])
    takes = [(n * D, "uvw"[n % 3], "b" if n == 7 else "a") for n in range(12)]
    write_rows(tmp_path, "interactions", takes, label=[1] * 12)
    write_rows(tmp_path, "exposures", [(9 * D, "x", "b"), (9 * D, "x", "a"), (3 * D, "x", "a")])
    _, recorded = read_protocol(tmp_path, "time-split")
    seconds = ((recorded.rows.second_N - START) / D).tolist()
    assert seconds == [6, 7, 8, 9, 9, 9, 10, 11] and recorded.facts.days_only
    ages = dict(zip(row_names(recorded), (recorded.facts.age_seconds_N / D).tolist(), strict=True))
    assert (ages["vb"], ages["xb"], ages["xa"]) == (0, 2, 9)
    takes_of = recorded.rows.dense_NF[:, recorded.rows.dense_names.index("takes")]
    assert takes_of[row_names(recorded).index("xb")] == pytest.approx(math.log(2)), "the first take is like any other"


def rated(folder: Path, there: Path, ratings: list[float | None]) -> Path:
    """The same folder with ratings, which make all of its rows takes."""
    shutil.copytree(folder, there)
    write_rows(there, "interactions", TAKES, label=[1] * len(TAKES), rating=ratings)
    return there


def test_a_missing_rating_counts_in_features_like_the_mean_of_all_before(folder: Path, tmp_path: Path) -> None:
    gap: list[float | None] = [*RATINGS[:4], None, *RATINGS[5:]]
    mean = [*RATINGS[:4], 5.0, *RATINGS[5:]]
    (_, one), (_, other), (_, nought) = (
        read_protocol(rated(folder, tmp_path / name, ratings), "time-split")
        for name, ratings in (("gap", gap), ("mean", mean), ("nought", [*RATINGS[:4], 0.0, *RATINGS[5:]]))
    )
    assert np.array_equal(one.rows.dense_NF, other.rows.dense_NF)
    assert not np.array_equal(one.rows.dense_NF, nought.rows.dense_NF)


def test_rated_takes_alone_are_read_in_steps_of_one_at_least(folder: Path, tmp_path: Path) -> None:
    protocol, _ = read_protocol(rated(folder, tmp_path / "rated", [*RATINGS]), "time-split")
    one, few = (
        read_columns(protocol, tmp_path / "rated", labels="ratings", live=FeatureConfig(), step_rows=rows)
        for rows in (5, 1)
    )
    assert np.array_equal(one.rows.dense_NF, few.rows.dense_NF) and len(few.rows) == 6


def test_cold_is_what_was_not_taken_before_the_test_span(tmp_path: Path) -> None:
    protocol, recorded = read_protocol(write_stream(tmp_path, users=60, items=80, takes=1_500), "time-split")
    log = protocol.log
    early = {int(item) for item, ts in zip(log.item, log.ts, strict=True) if ts < protocol.test.start}
    cold = [bool(log.held_out[item]) or int(item) not in early for item in recorded.rows.item_N]
    assert recorded.facts.cold_N.tolist() == cold
    between = protocol.validation.holds(log.ts)
    new = set(log.item[between].tolist()) - set(log.item[log.ts < protocol.validation.start].tolist())
    assert new, "some were first taken in the validation span"


def test_the_order_of_rows_of_one_day_does_not_tell_what_was_taken(tmp_path: Path) -> None:
    _, recorded = read_protocol(write_days(tmp_path), "time-split")
    rows = recorded.rows
    for day in np.unique(rows.second_N):
        labels = rows.label_N[rows.second_N == day]
        ones = int(labels.sum())
        assert 0 < labels[:ones].mean() < 0.8 and labels[ones:].any()


def test_more_items_than_are_read_at_once_have_their_numbers(tmp_path: Path) -> None:
    names = [f"i{n:04d}" for n in range(4_100)]
    prices = [1.0] * 4_099 + [math.exp(3)]
    write(tmp_path, "items", item_id=names, title=names, publish_ts=[START] * 4_100, price=prices)
    takes = [(n * D, "u", "i4099" if n == 11 else "i0000") for n in range(12)]
    write_rows(tmp_path, "interactions", takes, label=[1] * 12)
    _, recorded = read_protocol(tmp_path, "time-split")
    columns = dict(zip(recorded.rows.dense_names, recorded.rows.dense_NF.T, strict=True))
    assert columns["price"][-1] == pytest.approx(3) and len(recorded.items) == 4_101
