"""Features and histories against plain loops."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from streams.evaluation.study import with_vectors
from tests.factories.offline_folders import DAY, START, read_protocol, without_vectors, write_days, write_stream
from trainer.offline import similarities
from trainer.offline.data import history_matrix
from trainer.offline.encoder_versions import Vectors
from trainer.offline.event_index import EventIndex
from trainer.offline.facets import facet_of
from trainer.offline.history_features import HALF_LIFE, HISTORY
from trainer.offline.protocols import held_out_by_hash


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = write_stream(tmp_path_factory.mktemp("small"), users=60, items=80, takes=1_500, seed=3)
    return read_protocol(folder)


def test_past_answers_like_a_loop() -> None:
    rng = np.random.default_rng(0)
    key, second = rng.integers(0, 6, 200), rng.integers(100, 160, 200)
    value = rng.normal(size=200)
    asked_key, asked_second = rng.integers(0, 8, 300), rng.integers(80, 180, 300)
    past = EventIndex(key, second, value)
    for at, (one, when) in enumerate(zip(asked_key, asked_second, strict=True)):
        seen = (key == one) & (second < when)
        assert past.count(asked_key, asked_second)[at] == seen.sum()
        assert past.recent(asked_key, asked_second, 20)[at] == (seen & (second >= when - 20)).sum()
        assert past.total(asked_key, asked_second)[at] == pytest.approx(value[seen].sum())
        newest = past.last(asked_key, asked_second)[at]
        assert newest == second[seen].max() if seen.any() else math.isnan(newest)
        place = past.newest(asked_key, asked_second)[at]
        assert (place >= 0) == seen.any() and (place < 0 or second[place] == newest)


def test_nothing_happened_is_an_answer_too() -> None:
    none = np.zeros(0, np.int64)
    past = EventIndex(none, none)
    asked = np.array([3, 4])
    assert past.count(asked, asked).tolist() == [0, 0]
    assert np.isnan(past.last(asked, asked)).all()
    assert past.newest(asked, asked).tolist() == [-1, -1]


def test_of_many_events_of_one_second_the_last_is_the_newest() -> None:
    key = np.arange(200) % 2
    past = EventIndex(key, np.full(200, 7))
    assert past.newest(np.array([0, 1]), np.array([8, 8])).tolist() == [198, 199]


def test_histories_are_what_the_user_took_before(small) -> None:  # type: ignore[no-untyped-def]
    protocol, recorded = small
    data = without_vectors(recorded)
    rows = np.arange(0, len(data), 37)
    found = history_matrix(data, rows, 12)
    assert found.shape[1] == 12
    log = protocol.log
    for row, line in zip(rows, found, strict=True):
        seen = (log.user == data.rows.user_N[row]) & (log.ts < data.rows.second_N[row])
        own = log.item[seen][np.argsort(log.ts[seen], kind="stable")][::-1][:12]
        assert line[: len(own)].tolist() == own.tolist()
        assert not line[len(own) :].any()


def test_a_history_matrix_without_histories_is_a_column_of_padding(small) -> None:  # type: ignore[no-untyped-def]
    _, recorded = small
    data = without_vectors(recorded)
    assert history_matrix(data, np.zeros(0, np.int64), 5).shape == (0, 1)


def test_co_occurrence_and_categories_match_plain_loops(small) -> None:  # type: ignore[no-untyped-def]
    protocol, recorded = small
    log, rows = protocol.log, recorded.rows
    names = rows.dense_names
    announces = np.zeros(len(log.ts), bool)
    order = np.argsort(log.ts, kind="stable")
    _, firsts = np.unique(log.item[order], return_index=True)
    announces[order[firsts]] = True
    counted = [at for at in order if not announces[at] and not log.held_out[log.item[at]]]
    per_user: dict[int, list[int]] = defaultdict(list)
    for at in counted:
        per_user[int(log.user[at])].append(int(at))
    positives = np.flatnonzero(rows.label_N == 1)[::23]  # they have no source to be left out
    for row in positives:
        user, item, now = int(rows.user_N[row]), int(rows.item_N[row]), int(rows.second_N[row])
        history = [int(log.item[at]) for at in order if log.user[at] == user and log.ts[at] < now][::-1][:HISTORY]
        pairs = 0
        for takes in per_user.values():
            before = [at for at in takes if log.ts[at] < now]
            own = {int(log.item[at]): place for place, at in enumerate(before)}
            if item in own:
                others = [one for one in history if one in own and one != item]
                pairs += sum(abs(own[one] - own[item]) <= HISTORY for one in others)
        assert rows.dense_NF[row, names.index("together")] == pytest.approx(math.log1p(pairs), abs=1e-5)
        category = recorded.items.category_I
        weights = [2 ** (-back / HALF_LIFE) for back in range(len(history))]
        same = sum(w for w, one in zip(weights, history, strict=True) if category[one] == category[item])
        assert rows.dense_NF[row, names.index("category recent")] == pytest.approx(same / sum(weights), abs=1e-5)
        takes_before = sum(1 for at in order if log.item[at] == item and log.ts[at] < now and not announces[at])
        assert rows.dense_NF[row, names.index("takes")] == pytest.approx(math.log1p(takes_before), abs=1e-5)


def test_similarities_are_those_of_the_version_that_serves_the_row(  # type: ignore[no-untyped-def]
    small, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recorded = small
    rng = np.random.default_rng(0)
    versions, size = 4, len(recorded.items)
    vectors = rng.normal(size=(versions, size, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    has = rng.random((versions, size)) < 0.8
    has[:, recorded.rows.item_N[-1]] = True
    has[:, 0] = False
    data = with_vectors(recorded, Vectors(vectors * has[:, :, None], has))
    names = data.rows.dense_names
    assert len(data) > 200
    for row in (*range(0, len(data), 97), len(data) - 1):
        version, target = data.rows.encoder_N[row], data.rows.item_N[row]
        start, stop = data.rows.history_start_N[row], data.rows.history_stop_N[row]
        history = data.histories.item_T[start:stop][::-1][:HISTORY]
        known = [(back, int(one)) for back, one in enumerate(history) if has[version, one] and has[version, target]]
        cosines = [float(vectors[version, one] @ vectors[version, target]) for _, one in known]
        weights = [2 ** (-back / HALF_LIFE) for back, _ in known]
        got = {name: data.rows.dense_NF[row, names.index(name)] for name in names if name.startswith("cosine")}
        assert got["cosine known"] == bool(known)
        assert data.rows.dense_NF[row, names.index("has vector")] == has[version, target]
        newest = cosines[0] if known and known[0][0] == 0 else 0.0
        assert got["cosine newest"] == pytest.approx(newest, abs=1e-5)
        assert known or not any(got.values()), "nothing is known"
        if known:
            assert got["cosine mean"] == pytest.approx(np.mean(cosines), abs=1e-5)
            assert got["cosine largest"] == pytest.approx(max(cosines), abs=1e-5)
            assert got["cosine recent"] == pytest.approx(np.average(cosines, weights=weights), abs=1e-5)
    monkeypatch.setattr(similarities, "_ROWS_PER_PASS", 100)
    monkeypatch.setattr(similarities, "_PAIRS_PER_PASS", 70)
    parts = with_vectors(recorded, Vectors(vectors * has[:, :, None], has))
    np.testing.assert_array_equal(parts.rows.dense_NF, data.rows.dense_NF)


def test_days_end_histories_at_the_previous_midnight(tmp_path: Path) -> None:
    protocol, recorded = read_protocol(write_days(tmp_path / "days"))
    assert protocol.encoder_stops == tuple(START + day * DAY for day in range(3, 7))
    rows = recorded.rows
    assert set(rows.second_N.tolist()) <= {START + day * DAY for day in range(3, 7)}
    some = recorded.facts.with_history_N
    assert some.any() and not some.all()
    rows = rows.select(some)
    newest = recorded.histories.second_T[rows.history_stop_N - 1]
    assert (newest < rows.second_N).all() and (newest == rows.second_N - DAY).any()
    assert (rows.encoder_N == (rows.second_N - START) // DAY - 3).all()


def test_facets_share_values_or_words_and_padding_shares_nothing() -> None:
    section = facet_of(["", "men", "women", "men", ""])
    assert section is not None
    assert section.shared(np.array([1, 1, 4, 0]), np.array([3, 2, 4, 0])).tolist() == [1, 0, 0, 0]
    genres = facet_of(["", "comedy, drama", "comedy", "war", "comedy, drama", "", "comedy"])
    assert genres is not None
    same, part, nothing = genres.shared(np.array([1, 1, 1]), np.array([4, 2, 3]))
    assert same == pytest.approx(1) and 0 < part < same and nothing == 0
    assert facet_of(["", "a", "b", "c"]) is None


def test_a_tenth_is_held_out_where_the_set_names_none() -> None:
    held = held_out_by_hash([str(one) for one in range(5_000)])
    assert not held[0] and 0.08 < held.mean() < 0.12
