"""Figures of the offline evaluation against closed forms and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.metrics import UserAuc, calibration, normalised_entropy, paired_gauc_difference, user_auc
from trainer.offline.buckets import RowFacts, buckets
from trainer.offline.judging import Bootstrap, judge, mean_over_seeds


def impressions(n: int = 3_000, users: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, n)
    label = rng.integers(0, 2, n)
    return user, label, np.clip(0.3 + 0.2 * label + rng.normal(0, 0.2, n), 0.01, 0.99)


def test_ne_of_the_base_rate_is_one_and_of_the_truth_nearly_nought() -> None:
    labels = np.array([1, 0, 0, 0])
    assert normalised_entropy(labels, np.full(4, 0.25)) == pytest.approx(1)
    assert normalised_entropy(labels, labels.astype(float)) == pytest.approx(0, abs=1e-9)
    assert math.isnan(normalised_entropy(np.ones(3, int), np.full(3, 0.5)))


def test_ne_is_cross_entropy_over_the_entropy_of_the_mean() -> None:
    labels, predicted = [1, 0, 1, 1, 0], [0.7, 0.4, 0.9, 0.2, 0.1]
    loss = -sum(math.log(p if y else 1 - p) for y, p in zip(labels, predicted, strict=True)) / 5
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    assert normalised_entropy(np.array(labels), np.array(predicted)) == pytest.approx(loss / entropy)


def test_calibration_compares_tenths_of_the_predictions() -> None:
    predicted = np.linspace(0.01, 0.99, 95)
    labels = (np.arange(95) % 3 == 0).astype(int)
    shuffled = np.random.default_rng(0).permutation(95)
    bins = calibration(labels[shuffled], predicted[shuffled])
    assert [one.impressions for one in bins] == [10] * 5 + [9] * 5
    assert bins[0].predicted == pytest.approx(predicted[:10].mean())
    assert bins[0].observed == pytest.approx(labels[:10].mean())
    assert sum(one.observed * one.impressions for one in bins) == pytest.approx(labels.sum())


def test_unweighted_gauc_is_the_plain_mean_over_users() -> None:
    found = user_auc(
        np.array([1, 1, 2, 2, 2, 2, 3]), np.array([0, 1, 0, 1, 1, 0, 1]), np.array([1.0, 2, 5, 4, 3, 2, 1])
    )
    assert found.auc.tolist() == [1.0, 0.5]
    assert found.unweighted == pytest.approx(0.75)
    assert found.weighted == pytest.approx((2 * 1.0 + 4 * 0.5) / 6)


def test_a_bucket_with_too_few_impressions_or_users_is_not_judged() -> None:
    user, label, score = impressions()
    assert judge(user, label, score, calibrated=True) is not None
    assert judge(user[:499], label[:499], score[:499], calibrated=True) is None
    assert judge(user % 99, label, score, calibrated=True) is None


def test_scores_that_are_no_probabilities_have_no_loss_and_no_calibration() -> None:
    judged = judge(*impressions(), calibrated=False)
    assert judged is not None
    assert judged.figures["logloss"] is judged.figures["ne"] is judged.figures["calibration"] is None
    assert judged.figures["users"] == 200 and judged.figures["impressions"] == 3_000


def test_interval_over_users_is_that_of_a_loop() -> None:
    user, label, score = impressions()
    per_user = user_auc(user, label, score)
    low, high = Bootstrap(per_user, rng=np.random.default_rng(0), rounds=400).interval(per_user)
    rng = np.random.default_rng(1)
    draws = []
    for _ in range(400):
        chosen = rng.integers(0, len(per_user.auc), len(per_user.auc))
        draws.append(np.average(per_user.auc[chosen], weights=per_user.impressions[chosen]))
    assert low == pytest.approx(np.percentile(draws, 2.5), abs=0.006)
    assert high == pytest.approx(np.percentile(draws, 97.5), abs=0.006)


def test_paired_interval_is_narrower_than_two_of_their_own_and_agrees_with_the_shared_one() -> None:
    user, label, score = impressions()
    worse = score + np.random.default_rng(3).normal(0, 0.05, len(score))
    ours, theirs = user_auc(user, label, score), user_auc(user, label, worse)
    draws = Bootstrap(ours, rng=np.random.default_rng(0))
    gain = draws.difference(ours, theirs)
    low, high = draws.interval(ours)
    assert gain.low < gain.difference < gain.high and gain.high - gain.low < 0.5 * (high - low)
    other = paired_gauc_difference(user, label, score, worse, rng=np.random.default_rng(1))
    assert other is not None and other.difference == pytest.approx(gain.difference)
    assert other.low == pytest.approx(gain.low, abs=0.003)


def test_a_bucket_of_just_enough_impressions_and_users_is_judged() -> None:
    place = np.arange(500)
    label, score = place // 100 % 2, np.random.default_rng(0).random(500)
    found = judge(place % 100, label, score, calibrated=False)
    assert found is not None and (found.figures["impressions"], found.figures["users"]) == (500, 100)
    assert [found.figures[name] for name in ("logloss", "ne", "calibration")] == [None] * 3
    assert judge(place[1:] % 100, label[1:], score[1:], calibrated=False) is None
    assert judge(np.minimum(place % 100, 98), label, score, calibrated=False) is None


def test_users_are_those_with_both_labels_and_count_alike_where_they_are_not_weighed() -> None:
    user, label, score = impressions()
    user = np.where(np.arange(3_000) < 1_000, 7, user)  # a third of all is one user's
    label = np.where(user == 8, 1, label)
    found, per_user = judge(user, label, score, calibrated=True), user_auc(user, label, score)
    assert found is not None and found.figures["users"] == len(per_user.users) < len(np.unique(user))
    assert found.figures["gauc_unweighted"] == pytest.approx(per_user.auc.mean())
    assert found.figures["gauc"] == pytest.approx(np.average(per_user.auc, weights=per_user.impressions))
    assert found.figures["gauc"] != pytest.approx(found.figures["gauc_unweighted"], abs=1e-4)
    many = np.where(user > 95, 1_000 + np.arange(3_000), user)  # thousands of users, few of them with both labels
    assert judge(many, label, score, calibrated=True) is None


def test_an_interval_is_the_middle_of_as_many_rounds_as_asked_for() -> None:
    per_user = user_auc(*impressions())
    count = len(per_user.auc)
    low, high = Bootstrap(per_user, rng=np.random.default_rng(4), rounds=40).interval(per_user)
    weights = np.random.default_rng(4).multinomial(count, np.full(count, 1 / count), size=40) * per_user.impressions
    found = np.sort(weights @ per_user.auc / weights.sum(1))
    assert low == pytest.approx(found[0] + 0.975 * (found[1] - found[0]))
    assert high == pytest.approx(found[39] - 0.975 * (found[39] - found[38]))


def test_intervals_of_other_users_are_refused() -> None:
    user, label, score = impressions()
    draws = Bootstrap(user_auc(user, label, score), rng=np.random.default_rng(0), rounds=10)
    with pytest.raises(ValueError, match="other users"):
        draws.interval(user_auc(user + 1_000, label, score))
    with pytest.raises(ValueError, match="other users"):
        draws.difference(user_auc(user, label, score), user_auc(user + 1_000, label, score))


def test_an_interval_weighs_users_by_their_impressions() -> None:
    users = np.arange(200)
    judged = UserAuc(users, (users < 100).astype(np.float64), np.where(users < 100, 900, 100))
    low, high = Bootstrap(judged, rng=np.random.default_rng(0)).interval(judged)
    assert 0.8 < low < judged.weighted == 0.9 < high < 0.95


def test_seeds_are_averaged_user_by_user() -> None:
    users, counts = np.array([1, 2]), np.array([3, 5])
    seeds = [UserAuc(users, np.array(auc), counts) for auc in ([0.5, 1.0], [1.0, 0.0], [1.0, 0.5])]
    mean = mean_over_seeds(seeds)
    assert mean.auc.tolist() == pytest.approx([2.5 / 3, 0.5]) and mean.impressions.tolist() == [3, 5]


def test_buckets_by_age_popularity_and_cold() -> None:
    hour, day = 3_600.0, 86_400.0
    facts = RowFacts(
        age_seconds_N=np.array([60, 5 * hour, 3 * day, 20 * day, 60, np.nan, 60, 60]),
        from_start_N=np.array([False, False, False, False, True, False, False, False]),
        takes_before_N=np.array([0, 1, 9, 10, 5_000, 0, 100, 0]),
        cold_N=np.array([True, False, False, False, False, True, False, True]),
        with_history_N=np.array([True] * 7 + [False]),
        retaken_N=np.array([False] * 6 + [True, False]),
        days_only=False,
    )
    rows = {name: np.flatnonzero(chosen).tolist() for name, chosen in buckets(facts).items()}
    assert rows == {
        "overall": [0, 1, 2, 3, 4, 5],
        "cold": [0, 5],
        "under_1h": [0],
        "under_24h": [0, 1],
        "under_7d": [0, 1, 2],
        "older": [3, 4],
        "never_taken": [0, 5],
        "taken_1_to_9": [1, 2],
        "taken_10_to_99": [3],
        "taken_100_to_999": [],
        "taken_1000_and_more": [4],
        "retaken": [6],
        "without_history": [7],
    }


def test_what_lies_at_a_bound_is_in_the_older_and_in_the_more_taken_bucket() -> None:
    hour, day = 3_600.0, 86_400.0
    facts = RowFacts(
        age_seconds_N=np.array([hour, day, 7 * day]),
        from_start_N=np.zeros(3, bool),
        takes_before_N=np.array([99, 100, 1_000]),
        cold_N=np.zeros(3, bool),
        with_history_N=np.ones(3, bool),
        retaken_N=np.zeros(3, bool),
        days_only=False,
    )
    rows = {name: np.flatnonzero(chosen).tolist() for name, chosen in buckets(facts).items()}
    assert (rows["under_1h"], rows["under_24h"], rows["under_7d"], rows["older"]) == ([], [0], [0, 1], [2])
    assert (rows["taken_10_to_99"], rows["taken_100_to_999"], rows["taken_1000_and_more"]) == ([0], [1], [2])
