from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import metrics
from trainer.metrics import (
    DAY,
    ScoredRows,
    auc,
    buckets,
    log_loss,
    paired_gauc_difference,
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
