"""Rows that are judged by what users liked: labels from the past alone, rows and features of the takes themselves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from schemas.errors import Misconfigured
from tests.factories.offline_folders import read_protocol, without_vectors, write_days, write_stream
from trainer.datasets.exposures import NEGATIVES_PER_TAKE
from trainer.datasets.folder import open_data_set
from trainer.features.config import FeatureConfig
from trainer.offline import labels as labels_module
from trainer.offline.columns import read_columns
from trainer.offline.labels import liked, means_before
from trainer.offline.leak_checks import leaks
from trainer.offline.live_features import STEP_ROWS
from trainer.offline.protocols import PROTOCOLS, ProtocolName


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("rated"), users=200, items=100, takes=3_000)


def with_ratings(folder: Path, there: Path, change: Any) -> Path:
    """The same folder with other ratings: a function of seconds and ratings, None for no column."""
    shutil.copytree(folder, there)
    path = there / "interactions.parquet"
    table = pq.read_table(path)
    ratings = change(table["ts"].to_numpy(), table["rating"].to_numpy().astype(float))
    table = table.drop_columns(["rating"])
    pq.write_table(table if ratings is None else table.append_column("rating", pa.array(ratings)), path)
    return there


# ---- labels ----------------------------------------------------------------------------------------------------------


def expected(users: NDArray[np.int64], seconds: NDArray[np.int64], ratings: NDArray[np.float64]) -> list[float]:
    found = []
    for user, second, rating in zip(users, seconds, ratings, strict=True):
        earlier = ratings[seconds < second]
        own = earlier[(users[seconds < second] == user) & ~np.isnan(earlier)]
        known = own if len(own) else earlier[~np.isnan(earlier)]
        found.append(np.nan if np.isnan(rating) or not len(known) else float(rating > known.mean() + 1e-9))
    return found


def test_a_rating_is_liked_above_the_mean_of_the_users_earlier_ones(tmp_path: Path, folder: Path) -> None:
    def with_gaps(seconds: NDArray[np.int64], ratings: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(np.arange(len(ratings)) % 7 == 0, np.nan, ratings)

    gaps = with_ratings(folder, tmp_path / "gaps", with_gaps)
    for one in folder, gaps:
        data = open_data_set(one)
        rows, ratings = data.interactions, labels_module.read_ratings(data, one)
        assert ratings is not None
        np.testing.assert_array_equal(liked(data, one), expected(rows.user, rows.ts, ratings))


@pytest.mark.parametrize(
    ("users", "seconds", "ratings", "means"),
    [
        pytest.param([1, 1, 1], [1, 2, 3], [4, 8, 9], [None, 4, 6], id="of the user's own"),
        pytest.param([1, 1, 2], [1, 2, 3], [4, 8, 9], [None, 4, 6], id="of all users' before the first"),
        pytest.param([1, 1, 1], [1, 2, 2], [4, 8, 9], [None, 4, 4], id="not of those of the same second"),
        pytest.param([2, 1, 1], [3, 2, 1], [9, 8, 4], [6, 4, None], id="whatever the order of the rows"),
        pytest.param([1, 1, 1], [1, 2, 3], [4, None, 9], [None, 4, 4], id="of ratings that are there"),
    ],
)
def test_the_mean_that_a_rating_is_compared_with_is(
    users: list[int], seconds: list[int], ratings: list[float], means: list[float]
) -> None:
    found = means_before(np.array(users), np.array(seconds), np.array(ratings, float))
    np.testing.assert_array_equal(found, np.array(means, float))


def test_a_rating_that_equals_the_mean_is_not_liked_however_the_mean_rounds(tmp_path: Path, folder: Path) -> None:
    constant = with_ratings(folder, tmp_path / "constant", lambda seconds, ratings: np.full(len(ratings), 3.7))
    found = liked(open_data_set(constant), constant)
    assert np.isnan(found).sum() == 1 and not np.nan_to_num(found).any()


@pytest.mark.parametrize("none", [np.inf, -np.inf, np.nan])
def test_a_rating_that_is_no_number_is_none(tmp_path: Path, folder: Path, none: float) -> None:
    def spoiled(seconds: NDArray[np.int64], ratings: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(np.arange(len(ratings)) % 5 == 0, none, ratings)

    one = with_ratings(folder, tmp_path / "one", spoiled)
    data = open_data_set(one)
    found = labels_module.read_ratings(data, one)
    assert found is not None and np.flatnonzero(np.isnan(found)).tolist() == list(range(0, len(found), 5))
    assert np.isnan(liked(data, one)).tolist()[::5] == [True] * len(range(0, len(found), 5))


def labels_that_see_the_future(folder: Path, there: Path) -> int:
    """Labels of early rows that differ when everything after the middle is rated the other way round."""
    seconds = open_data_set(folder).interactions.ts
    middle = int(np.median(seconds))
    other = with_ratings(folder, there, lambda when, ratings: np.where(when > middle, 11 - ratings, ratings))
    ours, theirs = liked(open_data_set(folder), folder), liked(open_data_set(other), other)
    early = seconds <= middle
    return int((np.nan_to_num(ours[early], nan=-1) != np.nan_to_num(theirs[early], nan=-1)).sum())


def test_no_label_changes_with_what_is_rated_later(tmp_path: Path, folder: Path) -> None:
    assert labels_that_see_the_future(folder, tmp_path / "other") == 0


def test_a_label_that_knows_the_users_mean_over_all_time_is_caught(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_all_time(user: NDArray[np.int64], _: NDArray[np.int64], rating: NDArray[np.float64]) -> NDArray[np.float64]:
        return (np.bincount(user, rating) / np.bincount(user))[user]

    monkeypatch.setattr(labels_module, "means_before", of_all_time)
    assert labels_that_see_the_future(folder, tmp_path / "other") > 100


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
def test_rows_are_the_rated_takes_of_the_spans_alone(name: ProtocolName, folder: Path) -> None:
    protocol, recorded = read_protocol(folder, name, "ratings")
    log, rows = protocol.log, recorded.rows
    judged = np.flatnonzero(log.ts >= protocol.train.start)
    labels = liked(log.data, folder)[judged]
    assert np.array_equal(rows.second_N, log.ts[judged])  # no two takes of this folder are of one second
    assert np.array_equal(rows.user_N, log.user[judged]) and np.array_equal(rows.item_N, log.item[judged])
    assert np.array_equal(rows.label_N, labels) and 0.4 < labels.mean() < 0.6
    assert recorded.drawn_from is None and recorded.labels == "ratings"
    learned = recorded.learned_from(protocol.train) | recorded.learned_from(protocol.validation)
    stops = np.array(protocol.encoder_stops)
    assert leaks(without_vectors(recorded), encoder_stops=stops, learned_from_N=learned) == []


def test_a_take_without_a_rating_is_no_row_and_stays_in_histories(tmp_path: Path, folder: Path) -> None:
    half = with_ratings(folder, tmp_path / "half", lambda _, ratings: np.where(ratings > 5, ratings, np.nan))
    _, some = read_protocol(half, labels="ratings")
    protocol, every = read_protocol(folder, labels="ratings")
    rated = (pq.read_table(folder / "interactions.parquet")["rating"].to_numpy() > 5)[
        protocol.log.ts >= protocol.train.start
    ]
    assert np.array_equal(some.rows.second_N, every.rows.second_N[rated])
    assert np.array_equal(some.rows.history_stop_N, every.rows.history_stop_N[rated])


@pytest.mark.parametrize(
    ("name", "takes_a_step"), [*((name, None) for name in PROTOCOLS), ("prequential", 7), ("cold", 20)]
)
def test_history_and_features_of_a_row_are_those_of_its_take_in_the_ordinary_run(
    name: ProtocolName, takes_a_step: int | None, folder: Path
) -> None:
    protocol, _ = read_protocol(folder, name)
    config = None if takes_a_step is None else FeatureConfig()
    step = STEP_ROWS if takes_a_step is None else takes_a_step * (1 + NEGATIVES_PER_TAKE)
    ordinary = read_columns(protocol, folder, live=config, step_rows=step)
    recorded = read_columns(protocol, folder, labels="ratings", live=config, step_rows=step)
    assert not recorded.leaks
    taken = ordinary.rows.select(ordinary.rows.label_N == 1)
    for column in ("user_N", "item_N", "second_N", "history_start_N", "history_stop_N", "encoder_N", "dense_NF"):
        assert np.array_equal(getattr(recorded.rows, column), getattr(taken, column)), column
    facts = ordinary.facts.select(ordinary.rows.label_N == 1)
    for column in ("age_seconds_N", "takes_before_N", "cold_N", "with_history_N", "retaken_N"):
        assert np.array_equal(getattr(recorded.facts, column), getattr(facts, column), equal_nan=True), column


def test_what_stands_for_a_missing_rating_in_features_is_known_then(tmp_path: Path, folder: Path) -> None:
    def gaps(seconds: NDArray[np.int64], ratings: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(np.arange(len(ratings)) % 7 == 0, np.nan, ratings)

    protocol, ours = read_protocol(with_ratings(folder, tmp_path / "gaps", gaps), labels="ratings")
    middle = protocol.test.start

    def otherwise_later(seconds: NDArray[np.int64], ratings: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(seconds >= middle, 1.0, gaps(seconds, ratings))

    _, theirs = read_protocol(with_ratings(folder, tmp_path / "other", otherwise_later), labels="ratings")
    early = ours.rows.second_N <= middle
    np.testing.assert_allclose(ours.rows.dense_NF[early], theirs.rows.dense_NF[: early.sum()], atol=1e-5)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_set_without_ratings_is_refused_with_what_to_do(tmp_path: Path, folder: Path) -> None:
    told = "no ratings.*column 'rating' of numbers, or leave --labels out"
    with pytest.raises(Misconfigured, match=told):
        read_protocol(write_days(tmp_path / "days"), labels="ratings")
    empty = with_ratings(folder, tmp_path / "empty", lambda _, ratings: np.full(len(ratings), np.nan))
    with pytest.raises(Misconfigured, match=told):
        read_protocol(empty, labels="ratings")
