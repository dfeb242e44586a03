from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
from trainer.networks.losses import fake_negative_weights, info_nce


def unit(rows: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_info_nce_matches_plain_loops() -> None:
    query, positive, candidate = unit(4, 0), unit(4, 1), unit(5, 2)
    allowed = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    lq_p, lq_c = torch.tensor([-1.0, -2, -3, -4]), torch.tensor([-1.0, -1, -2, -5, -3])
    total = 0.0
    for p in range(4):
        own = float(query[p] @ positive[p]) / 0.3 - float(lq_p[p])
        below = math.exp(own)
        for k in range(5):
            if allowed[p, k]:
                below += math.exp(float(query[p] @ candidate[k]) / 0.3 - float(lq_c[k]))
        total -= own - math.log(below)
    loss = info_nce(query, positive, candidate, allowed, temperature=0.3, positive_log_q_P=lq_p, candidate_log_q_K=lq_c)
    assert float(loss) == pytest.approx(total / 4, rel=1e-5)


def test_identical_vectors_give_log_of_all_candidates() -> None:
    same = unit(1, 0)
    loss = info_nce(same, same, same.repeat(7, 1), torch.ones(1, 7, dtype=torch.bool), temperature=0.1)
    assert float(loss) == pytest.approx(math.log(8), rel=1e-5)


def test_masked_candidates_get_no_gradient_and_open_ones_do() -> None:
    query, positive = unit(1, 0).requires_grad_(), unit(1, 1).requires_grad_()
    candidate = unit(2, 2).requires_grad_()
    info_nce(query, positive, candidate, torch.tensor([[True, False]]), temperature=0.2).backward()
    assert query.grad is not None and positive.grad is not None and candidate.grad is not None
    assert query.grad.abs().sum() > 0 and positive.grad.abs().sum() > 0
    assert candidate.grad[0].abs().sum() > 0
    assert candidate.grad[1].abs().sum() == 0


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


@pytest.mark.parametrize("in_time", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("p", [0.02, 0.3, 0.8])
def test_fake_negatives_weighted_have_their_minimum_at_the_true_rate(in_time: float, p: float) -> None:
    # of an impression taken with probability p come p rows taken and 1 - in_time p rows not taken
    logit = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    mass, labels = torch.tensor([p, 1 - in_time * p], dtype=torch.float64), torch.tensor([1.0, 0.0])
    weights = fake_negative_weights(torch.sigmoid(logit).expand(2), labels, in_time)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        logit.expand(2), labels.double(), mass * weights, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(loss, logit)
    assert abs(float(gradient)) < 1e-12
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logit.expand(2), labels.double(), mass)
    if in_time < 1:  # without the weights it lies lower
        assert float(torch.autograd.grad(plain, logit)[0]) > 1e-5
    else:
        assert torch.equal(weights.detach(), torch.ones(2, dtype=torch.float64))
