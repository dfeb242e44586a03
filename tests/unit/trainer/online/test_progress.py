"""What training counts of itself, and the running metrics, against plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from schemas.behaviours import BehaviourKind
from tests.factories.feeding import through_bytes
from tests.factories.samples import DAY0, embedding, make_catalogue
from trainer.metrics import DAY, ScoredRows, auc, log_loss
from trainer.online.prequential import RecentScores
from trainer.online.progress import TrainProgress
from trainer.samples.rows import Impression

CLICK, CART = BehaviourKind.CLICK, BehaviourKind.CART


def row(second: int, item: int = 1, *, user: str = "u", label: int = 0, **more: Any) -> Impression:
    known = {"retaken": False, "defines_publish": False} | more
    return Impression("e", 0, 0, DAY0 + second, user, item, (), (), label=label, **known)


def learn(progress: TrainProgress, rows: list[Impression], first: float = 0.1) -> None:
    progress.add(rows, None, {"ciubm": first + 0.01 * np.arange(len(rows))})


def test_corrections_and_upgrades_are_rows_but_no_impressions_of_their_own() -> None:
    progress = TrainProgress(make_catalogue(3))
    late, upgrade = (
        {"label": 1, "correction": True},
        {"label": 1, "correction": True, "taken_as": CART, "taken_before": CLICK},
    )
    learn(progress, [row(0, label=1), row(1, **late), row(2), row(3, **upgrade), row(4, label=1), row(5, label=1)])
    assert (progress.rows, progress.steps, progress.corrected, progress.upgraded) == (6, 1, 1, 1)
    assert progress.taken_in_time == 3 and progress.in_time() == (3 / 4,)
    learn(progress, [row(1, **late)])
    (scored,) = progress.drain_scores()
    np.testing.assert_allclose(scored.scores["ciubm"], [0.1, 0.12, 0.14, 0.15])
    assert scored.label.tolist() == [1, 0, 1, 1] and (scored.occurred_at - DAY0).tolist() == [0, 2, 4, 5]
    assert progress.scored == len(scored.label)
    assert progress.drain_scores() == [] and progress.in_time() == (3 / 5,)


def test_a_span_of_training_is_told_by_its_newest_row_and_begins_anew_after_a_candidate() -> None:
    progress, again = TrainProgress(make_catalogue(3)), TrainProgress(make_catalogue(3))
    assert (progress.seconds_since_release, progress.first_event_at, progress.in_time()) == (0, None, (1.0,))
    learn(progress, [row(10), row(20)])
    learn(progress, [row(21), row(5, label=1, correction=True)])  # the last row is not the newest
    assert (progress.first_event_at, progress.last_event_at) == (DAY0 + 10, DAY0 + 21)
    assert (progress.rows_since_release, progress.seconds_since_release) == (4, 11)
    progress.begin_next()
    learn(progress, [row(27)])
    again.restore(through_bytes(progress.snapshot()))
    for each in (progress, again):
        assert (each.rows_since_release, each.seconds_since_release) == (1, 6)
        learn(each, [row(30)])
    assert again.rows_sha256 == progress.rows_sha256 and again.metrics() == progress.metrics()
    assert (again.steps, again.rows, again.corrected, again.taken_in_time) == (4, 6, 1, 0)


def test_the_age_of_an_item_is_unknown_where_the_row_itself_or_the_future_defines_it() -> None:
    catalogue = make_catalogue(4)
    for item, published in ((1, -60), (2, 50), (3, DAY - 1), (4, DAY)):
        catalogue.put_embedding(embedding(f"i{item}", item, published=published))
    progress = TrainProgress(catalogue)
    learn(progress, [row(0), row(40, defines_publish=True), row(40, 2), row(60, 2), row(70, 3), row(70, 4)])
    (scored,) = progress.drain_scores()
    np.testing.assert_array_equal(scored.age_seconds, [60, np.nan, np.nan, 10, np.nan, np.nan])
    assert scored.catalogue.tolist() == [True, True, True, True, True, False]  # published in the first 24 hours
    assert scored.item.tolist() == ["i1", "i1", "i2", "i2", "i3", "i4"]


# ---- running metrics ---------------------------------------------------------------------------------------------


def table(users: str, labels: list[int], scores: list[float], *, retaken: bool = False) -> ScoredRows:
    n = len(users)
    return ScoredRows(
        user=np.array(list(users)), item=np.array([f"i{k}" for k in range(n)]), occurred_at=np.arange(float(n)),
        label=np.array(labels), age_seconds=np.full(n, np.nan), catalogue=np.zeros(n, bool),
        retaken=np.full(n, retaken), scores={"ciubm": np.array(scores), "din": 1 - np.array(scores)},
    )  # fmt: skip


ONE = table("aabb", [1, 0, 1, 0], [0.9, 0.2, 0.3, 0.6])
AGAIN = table("ab", [0, 0], [0.99, 0.99], retaken=True)
OTHER = table("aca", [0, 1, 1], [0.4, 0.5, 0.8])


def test_running_metrics_are_those_of_the_rows_that_are_no_retakes() -> None:
    recent = RecentScores()
    assert recent.metrics() == {}
    for each in (ONE, AGAIN, OTHER):
        recent.add(each)
    labels, scores = np.array([1, 0, 1, 0, 0, 1, 1]), np.array([0.9, 0.2, 0.3, 0.6, 0.4, 0.5, 0.8])
    own = {"a": [0, 1, 4, 6], "b": [2, 3]}  # c has one label only
    expected = sum(len(rows) * auc(labels[rows], scores[rows]) for rows in own.values()) / 6
    found = recent.metrics()
    assert found["ciubm_gauc"] == pytest.approx(expected) and found["din_gauc"] == pytest.approx(1 - expected)
    assert found["ciubm_logloss"] == pytest.approx(log_loss(labels, scores))
    assert found["din_logloss"] == pytest.approx(log_loss(labels, 1 - scores))


def test_what_cannot_be_computed_is_none() -> None:
    recent = RecentScores()
    recent.add(AGAIN)
    assert recent.metrics() == dict.fromkeys(("ciubm_gauc", "ciubm_logloss", "din_gauc", "din_logloss"))


@pytest.mark.parametrize(
    ("rows", "left"), [(5, [0.0, 0.1, 1.0, 1.1, 2.0, 2.1]), (4, [1.0, 1.1, 2.0, 2.1]), (1, [2.0, 2.1])]
)
@pytest.mark.parametrize("restarted", [False, True])
def test_the_oldest_tables_leave_while_enough_rows_stay(rows: int, left: list[float], restarted: bool) -> None:
    recent = RecentScores(rows)
    for number in range(3):
        if restarted and number == 2:
            state, recent = recent.snapshot(), RecentScores(rows)
            recent.add(OTHER)  # what it held before leaves
            recent.restore(through_bytes(state))
        recent.add(replace(table("ab", [0, 1], [0.5, 0.5]), occurred_at=number + np.array([0.0, 0.1])))
    np.testing.assert_allclose(recent.snapshot().arrays["occurred_at"], left)


def test_a_forgotten_users_rows_leave_the_metrics_and_make_room() -> None:
    recent, others = RecentScores(4), RecentScores(4)
    recent.add(table("bbbb", [1, 0, 1, 0], [0.1, 0.2, 0.3, 0.4]))
    for each in (recent, others):
        each.add(OTHER)
    recent.forget("b")
    assert recent.metrics() == others.metrics()
    recent.add(table("d", [1], [0.3]))  # 4 rows in all: none has to leave
    assert recent.snapshot().arrays["lengths"].tolist() == [3, 1]


def test_a_snapshot_whose_tables_do_not_fit_is_refused() -> None:
    recent = RecentScores()
    recent.add(ONE)
    state = recent.snapshot()
    state.arrays["lengths"][:] = 3
    with pytest.raises(ValueError, match="columns"):
        RecentScores().restore(state)
