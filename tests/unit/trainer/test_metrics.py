from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import metrics
from trainer.metrics import (
    DAY,
    ScoredRows,
    auc,
    buckets,
    log_loss,
    paired_gauc_difference,
    paired_report,
    prequential_report,
    user_auc,
)


def auc_by_pairs(labels: list[int], scores: list[float]) -> float:
    wins = pairs = 0.0
    for own, positive in zip(scores, labels, strict=True):
        for other, label in zip(scores, labels, strict=True):
            if positive and not label:
                pairs += 1
                wins += 1.0 if own > other else 0.5 if own == other else 0.0
    return wins / pairs if pairs else math.nan


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=60))
def test_user_auc_matches_counting_pairs(rows: list[tuple[int, int, int]]) -> None:
    users, labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    found = user_auc(users, labels, scores.astype(float))
    expected, weights = {}, {}
    for user in set(users.tolist()):
        own = users == user
        value = auc_by_pairs(labels[own].tolist(), scores[own].tolist())
        if not math.isnan(value):
            expected[user], weights[user] = value, int(own.sum())
    assert found.users.tolist() == sorted(expected)
    np.testing.assert_allclose(found.auc, [expected[user] for user in sorted(expected)])
    if expected:
        gauc = sum(expected[u] * weights[u] for u in expected) / sum(weights.values())
        assert found.weighted == pytest.approx(gauc)
    whole = auc_by_pairs(labels.tolist(), scores.tolist())
    assert auc(labels, scores.astype(float)) == pytest.approx(whole, nan_ok=True)


def test_log_loss_of_the_base_rate_is_its_entropy() -> None:
    labels = np.array([1, 0, 0, 0])
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert log_loss(labels, np.full(4, 0.25)) == pytest.approx(expected)


def test_interval_of_a_real_difference_excludes_zero_and_of_none_holds_it() -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(400), 10)
    labels = np.tile([1, 0, 0, 0, 1, 0, 0, 0, 0, 0], 400)
    good, noise, other = labels + rng.normal(size=4000), rng.normal(size=4000), rng.normal(size=4000)
    gain = paired_gauc_difference(users, labels, good, noise, rng=np.random.default_rng(1))
    none = paired_gauc_difference(users, labels, noise, other, rng=np.random.default_rng(1))
    assert gain is not None and gain.low > 0.1
    assert none is not None and none.low < 0 < none.high


def test_the_paired_difference_is_that_of_plain_loops_over_resampled_users() -> None:
    rng = np.random.default_rng(0)
    users, labels = rng.integers(0, 12, 150), rng.integers(0, 2, 150)
    ours, theirs = labels + rng.normal(0, 1, 150), rng.normal(0, 1, 150)
    found = paired_gauc_difference(users, labels, ours, theirs, rng=np.random.default_rng(7), rounds=60)
    mine, others, sizes = [], [], []
    for user in range(12):
        own = users == user
        mine.append(auc_by_pairs(labels[own].tolist(), ours[own].tolist()))
        others.append(auc_by_pairs(labels[own].tolist(), theirs[own].tolist()))
        sizes.append(int(own.sum()))
    differences = []
    for drawn in np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), size=60):
        weight = sum(times * size for times, size in zip(drawn, sizes, strict=True))
        gained = zip(drawn, sizes, mine, others, strict=True)
        differences.append(sum(times * size * (one - other) for times, size, one, other in gained) / weight)
    assert found is not None
    gain = np.average(mine, weights=sizes) - np.average(others, weights=sizes)
    low, high = np.percentile(differences, [2.5, 97.5])
    assert (found.difference, found.low, found.high) == pytest.approx((gain, low, high))
    assert paired_gauc_difference(users * 0, labels, ours, theirs, rng=rng) is None


def test_the_bootstrap_in_blocks_has_the_digits_of_one_block_and_a_bounded_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    users = 777
    whole = np.random.default_rng(3).multinomial(users, np.full(users, 1 / users), size=1000)
    values = np.random.default_rng(4).normal(size=users)
    monkeypatch.setattr(metrics, "_BLOCK_BYTES", 60_000)
    rng = np.random.default_rng(3)
    blocks = list(metrics.resampled_users(users, rng=rng, rounds=1000))
    assert len(blocks) > 50 and max(block.nbytes for block in blocks) <= 60_000
    assert np.array_equal(np.concatenate(blocks), whole)
    assert np.array_equal(np.concatenate([block @ values for block in blocks]), whole @ values)
    followed = np.random.default_rng(3)
    followed.multinomial(users, np.full(users, 1 / users), size=1000)
    assert rng.random() == followed.random()  # what is drawn next is drawn as before


def test_a_million_users_are_resampled_a_few_rounds_at_a_time() -> None:
    block = next(metrics.resampled_users(1_000_000, rng=np.random.default_rng(0), rounds=1000))
    assert block.nbytes <= 1 << 26


def scored(n: int, **columns: object) -> ScoredRows:
    values: dict[str, object] = {
        "user": np.array([f"u{i % 150}" for i in range(n)]),
        "item": np.array(["i"] * n),
        "occurred_at": np.zeros(n),
        "label": (np.arange(n) // 150 % 2),
        "age_seconds": np.full(n, 2 * DAY),
        "catalogue": np.zeros(n, bool),
        "retaken": np.zeros(n, bool),
        "scores": {"ciubm": np.linspace(0, 1, n)},
    }
    return ScoredRows(**(values | columns))  # type: ignore[arg-type]


def test_buckets_keep_retakes_apart_and_leave_unknown_ages_out() -> None:
    rows = scored(
        6,
        age_seconds=np.array([60.0, 7200.0, 3 * DAY, 60.0, np.nan, 60.0]),
        catalogue=np.array([False, False, False, True, False, False]),
        retaken=np.array([False, False, False, False, False, True]),
    )
    found = {name: np.flatnonzero(chosen).tolist() for name, chosen in buckets(rows).items()}
    assert found == {"overall": [0, 1, 2, 3, 4], "under_1h": [0], "under_24h": [0, 1], "older": [2, 3], "retaken": [5]}


def test_small_buckets_are_not_reported() -> None:
    assert prequential_report(scored(600))["ciubm"]["overall"] is not None
    assert prequential_report(scored(450))["ciubm"]["overall"] is None  # too few impressions
    few_users = scored(600, user=np.array([f"u{i % 99}" for i in range(600)]))
    assert prequential_report(few_users)["ciubm"]["overall"] is None


def test_a_bucket_at_the_least_size_is_reported_with_its_figures_and_one_below_is_not() -> None:
    users = np.array([f"u{i % 100}" for i in range(500)])
    labels, scores = (np.arange(500) // 100 == 3).astype(int), np.linspace(0.2, 0.8, 500)
    rows = scored(500, user=users, label=labels, scores={"ciubm": scores, "din": 1 - scores})
    report = prequential_report(rows)
    expected = user_auc(np.arange(500) % 100, labels, scores)
    assert report["ciubm"]["overall"] == {
        "auc": auc(labels, scores),
        "gauc": expected.weighted,
        "logloss": log_loss(labels, scores),
        "impressions": 500,
        "users": 100,
    }
    compared = paired_report(rows, "din", "ciubm", rng=np.random.default_rng(0))
    found = compared["overall"]
    assert found is not None and found.difference == pytest.approx(1 - 2 * expected.weighted) and found.high < 0
    assert compared["retaken"] is None and report["din"]["retaken"] is None
    for fewer in (499, 500):
        less = ScoredRows.concatenate([scored(fewer, user=np.array([f"u{i % (fewer - 400)}" for i in range(fewer)]))])
        assert (prequential_report(less)["ciubm"]["overall"] is not None) == (fewer == 500)


def test_ages_at_a_bound_are_of_the_older_bucket() -> None:
    rows = scored(4, age_seconds=np.array([3599.0, 3600.0, DAY - 1, DAY]))
    found = {name: np.flatnonzero(chosen).tolist() for name, chosen in buckets(rows).items()}
    assert (found["under_1h"], found["under_24h"], found["older"]) == ([0], [0, 1, 2], [3])


def test_tables_are_joined_in_their_order() -> None:
    both = ScoredRows.concatenate([scored(2, occurred_at=np.array([1.0, 2.0])), scored(1, occurred_at=np.array([0.5]))])
    assert both.occurred_at.tolist() == [1.0, 2.0, 0.5] and len(both) == 3
    np.testing.assert_array_equal(both.scores["ciubm"], [0.0, 1.0, 0.0])
