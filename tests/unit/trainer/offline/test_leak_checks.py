"""Each leak is planted, and must be caught."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories.offline_folders import DAY, read_protocol, without_vectors, write_days, write_stream
from trainer.datasets.exposures import sources_of_draws
from trainer.datasets.folder import open_data_set
from trainer.metrics import auc
from trainer.offline import columns
from trainer.offline.as_of import DrawnFrom
from trainer.offline.buckets import buckets
from trainer.offline.columns import Recorded, read_columns
from trainer.offline.event_index import EventIndex
from trainer.offline.features import features
from trainer.offline.labels import LabelKind
from trainer.offline.leak_checks import leaks
from trainer.offline.protocols import PROTOCOLS, Protocol


def feature(recorded: Recorded, name: str) -> np.ndarray:
    return recorded.rows.dense_NF[:, recorded.rows.dense_names.index(name)]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_days(tmp_path_factory.mktemp("days"))


@pytest.fixture(params=["stream", "days"])
def folder(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def found_in(recorded: Recorded, protocol: Protocol) -> list[str]:
    learned = recorded.learned_from(protocol.train) | recorded.learned_from(protocol.validation)
    return leaks(without_vectors(recorded), encoder_stops=np.array(protocol.encoder_stops), learned_from_N=learned)


def test_an_honest_set_has_no_leak(folder: Path) -> None:
    for name in PROTOCOLS:
        protocol, recorded = read_protocol(folder, name)
        assert found_in(recorded, protocol) == []


# ---- a feature that looks ahead ----------------------------------------------------------------------------------


def features_that_see_the_future(
    folder: Path, monkeypatch: pytest.MonkeyPatch, labels: LabelKind = "takes"
) -> list[str]:
    """Features of early rows that change when everything from some second on is another story."""
    protocol, recorded = read_protocol(folder, labels=labels)
    rows, made = recorded.rows, columns.features
    middle = int(rows.second_N[len(rows) // 2])

    def from_another_future(its_rows, histories, takes, items, sources, *, day_resolution):  # type: ignore[no-untyped-def]
        later = takes.second_T >= middle
        rng = np.random.default_rng(5)
        item = np.where(later, rng.permutation(takes.item_T), takes.item_T)
        user = np.where(later, rng.permutation(takes.user_T), takes.user_T)
        rating = None if takes.rating_T is None else np.where(later, 11 - takes.rating_T, takes.rating_T)
        other = replace(takes, item_T=item, user_T=user, rating_T=rating, announces_T=takes.announces_T & ~later)
        early = np.flatnonzero(its_rows.second_N <= middle)
        sources = DrawnFrom(sources.take_N[early], sources.user_N[early], sources.second_N[early])
        dense, names = made(its_rows.select(early), histories, other, items, sources, day_resolution=day_resolution)
        return np.concatenate([dense, np.zeros((len(its_rows) - len(early), len(names)), np.float32)]), names

    with monkeypatch.context() as patched:
        patched.setattr(columns, "features", from_another_future)
        changed = read_columns(protocol, folder, labels=labels).rows
    early = rows.second_N <= middle
    # sums over all items round differently when later ones change
    differs = ~np.all(np.isclose(rows.dense_NF[early], changed.dense_NF[: early.sum()], atol=1e-5), axis=0)
    return [name for name, yes in zip(rows.dense_names, differs, strict=True) if yes]


def test_no_feature_changes_with_what_happens_at_its_second_or_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert features_that_see_the_future(folder, monkeypatch) == []


def test_no_feature_of_rated_takes_changes_with_what_happens_at_its_second_or_later(
    stream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert features_that_see_the_future(stream, monkeypatch, "ratings") == []


@pytest.mark.parametrize(("name", "labels"), [("stream", "takes"), ("days", "takes"), ("stream", "ratings")])
def test_a_feature_that_looks_one_event_ahead_is_caught(
    name: str, labels: LabelKind, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = request.getfixturevalue(name)
    honest = EventIndex.bounds
    monkeypatch.setattr(EventIndex, "bounds", lambda self, key, second: honest(self, key, second + 1))
    caught = features_that_see_the_future(folder, monkeypatch, labels)
    assert "takes" in caught and "together" in caught and "category takes" in caught


# ---- histories, encoders, re-takes -------------------------------------------------------------------------------


def test_a_history_that_holds_the_present_second_or_day_is_caught(folder: Path) -> None:
    protocol, recorded = read_protocol(folder)
    takes = recorded.rows.label_N == 1
    late = replace(recorded.rows, history_stop_N=recorded.rows.history_stop_N + takes)
    assert "histories reach into" in found_in(replace(recorded, rows=late), protocol)[0]


def test_an_encoder_that_is_newer_than_its_row_is_caught(stream: Path) -> None:
    protocol, recorded = read_protocol(stream)
    assert len(protocol.encoder_stops) > 2 and set(recorded.rows.encoder_N) == set(range(len(protocol.encoder_stops)))
    newer = np.minimum(recorded.rows.encoder_N + 1, len(protocol.encoder_stops) - 1)
    planted = replace(recorded, rows=replace(recorded.rows, encoder_N=newer))
    assert "served by an encoder" in found_in(planted, protocol)[0]


def test_retakes_are_in_no_bucket_but_their_own_and_teach_nothing(days: Path) -> None:
    protocol, recorded = read_protocol(days)
    assert recorded.rows.retaken_N.sum() > 20
    assert recorded.rows.label_N[recorded.rows.retaken_N].all()
    chosen = buckets(recorded.facts)
    for name, rows in chosen.items():
        assert rows[recorded.rows.retaken_N].all() if name == "retaken" else not rows[recorded.rows.retaken_N].any()
    learned = np.ones(len(recorded.rows), bool)
    found = leaks(without_vectors(recorded), encoder_stops=np.array(protocol.encoder_stops), learned_from_N=learned)
    assert "re-takes are learned from" in found[0]


def test_held_out_items_teach_nothing_and_stay_in_the_test(stream: Path) -> None:
    protocol, recorded = read_protocol(stream)
    learned = recorded.learned_from(protocol.train)
    assert not recorded.held_out_N[learned].any()
    assert recorded.held_out_N[recorded.judged_by(protocol.test)].any()


def test_cold_items_look_as_if_just_published(stream: Path) -> None:
    protocol, recorded = read_protocol(stream, "cold")
    held = recorded.held_out_N
    for name in ("takes", "takes 7d", "item idle", "together", "item's rating"):
        assert not feature(recorded, name)[held].any(), name
    assert recorded.facts.cold_N[recorded.judged_by(protocol.test)].all()
    assert not np.isin(recorded.histories.item_T, np.flatnonzero(protocol.log.held_out)).any()


# ---- the take that an exposure was drawn from --------------------------------------------------------------------


def features_that_know_their_source(stream: Path, monkeypatch: pytest.MonkeyPatch, *, left_out: bool) -> set[str]:
    """Of all features there are, those of drawn exposures that change when the log never held their source.

    Means over the whole log move in the fourth decimal.
    """
    asked: list[tuple[Any, ...]] = []

    def watched(rows, histories, takes, items, sources, *, day_resolution):  # type: ignore[no-untyped-def]
        asked.append((rows, histories, takes, items, sources))
        return features(rows, histories, takes, items, sources, day_resolution=day_resolution)

    monkeypatch.setattr(columns, "features", watched)
    read_protocol(stream)
    ((rows, histories, takes, items, sources),) = asked
    drawn = np.flatnonzero(sources.second_N < rows.second_N)
    known = set()
    for row in np.random.default_rng(0).choice(drawn, 15, replace=False):
        only, others = np.array([row]), np.arange(len(takes.user_T)) != sources.take_N[row]
        own = DrawnFrom(sources.take_N[only], sources.user_N[only], sources.second_N[only])
        columns_of = {field.name: getattr(takes, field.name) for field in fields(takes)}
        without = type(takes)(**{name: column[others] for name, column in columns_of.items() if column is not None})
        (found,), names = features(
            rows.select(only), histories, takes, items, own if left_out else DrawnFrom.none(1), day_resolution=False
        )
        (expected,), _ = features(rows.select(only), histories, without, items, DrawnFrom.none(1), day_resolution=False)
        known |= {name for name, away in zip(names, np.abs(found - expected), strict=True) if away > 2e-3}
    return known


def test_no_feature_at_all_knows_the_take_that_an_exposure_was_drawn_from(
    stream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert features_that_know_their_source(stream, monkeypatch, left_out=True) == set()


def test_a_source_that_is_counted_is_seen_in_every_feature_that_counts_takes(
    stream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught = features_that_know_their_source(stream, monkeypatch, left_out=False)
    assert caught >= {"takes", "takes 1h", "takes 30d", "item idle", "item's rating", "together", "together lift"}


# ---- exposures that give the label away --------------------------------------------------------------------------

POPULARITY = ("takes", "takes 1d", "takes 3d", "item idle", "age", "age known")


def given_away(recorded: Recorded) -> dict[str, float]:
    """How far the AUC of each popularity feature is from one half."""
    labels = recorded.rows.label_N.astype(np.int64)
    return {name: abs(auc(labels, feature(recorded, name).astype(float)) - 0.5) for name in POPULARITY}


def share_taken_where_none_is_counted(recorded: Recorded) -> float:
    none_yet = feature(recorded, "takes") == 0
    assert none_yet.sum() > 100
    return float(recorded.rows.label_N[none_yet].mean())


def test_neither_popularity_nor_newness_gives_the_label_away(stream: Path) -> None:
    _, recorded = read_protocol(stream)
    away = given_away(recorded)
    assert max(away.values()) < 0.03 and away["takes 1d"] < 0.01
    assert share_taken_where_none_is_counted(recorded) < 0.4  # of all rows it is one in five


def test_counting_the_take_that_a_negative_was_drawn_from_is_caught(
    stream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DrawnFrom, "of", lambda take_N, takes: DrawnFrom.none(len(take_N)))
    assert given_away(read_protocol(stream)[1])["takes 1d"] > 0.025


def test_counting_the_take_that_announced_an_item_is_caught(stream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "defining_interactions", lambda ts, recorded, item, publish: np.zeros(len(ts), bool))
    assert share_taken_where_none_is_counted(read_protocol(stream)[1]) > 0.5


def test_negatives_from_the_past_alone_are_caught(stream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = columns.negatives_beside

    def past_alone(data, ts, seed):  # type: ignore[no-untyped-def]
        user, item, when, row, number, words = honest(data, ts, seed)
        source = sources_of_draws(ts, data.interactions.item, row, item, seed=0)
        kept = ts[source] < when
        return user[kept], item[kept], when[kept], row[kept], number[kept], words

    fair = newness(read_protocol(stream)[1])
    monkeypatch.setattr(columns, "negatives_beside", past_alone)
    planted = newness(read_protocol(stream)[1])
    assert 0.8 < fair < 1.1 < planted, (fair, planted)


def newness(recorded: Recorded) -> float:
    """How many times as often a take as a drawn exposure is of an item of the last two days."""
    age, taken = recorded.facts.age_seconds_N, recorded.rows.label_N == 1
    known = ~np.isnan(age)
    return float(np.mean(age[known & taken] < 2 * DAY) / np.mean(age[known & ~taken] < 2 * DAY))


def test_sources_are_interactions_of_the_drawn_item_within_the_window(stream: Path) -> None:
    data = open_data_set(stream)
    ts, item = data.interactions.ts, data.interactions.item
    _, drawn, _, row, _, _ = columns.negatives_beside(data, ts, 0)
    source = sources_of_draws(ts, item, row, drawn, seed=0, window=1_000)
    assert np.array_equal(item[source], drawn)
    assert np.abs(source - row).max() <= 1_000
    assert 0.3 < np.mean(ts[source] < ts[row]) < 0.9
