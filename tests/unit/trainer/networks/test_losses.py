"""The losses against plain loops and closed forms, and where their gradients go."""

import math

import numpy as np
import pytest
import torch

from trainer.networks.losses import chunked_info_nce, fake_negative_weights, info_nce, triplet


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=1)


def looped(query, positive, candidates, allowed, tau, lq_p, lq_k, hard=None, hard_ok=None, lq_h=None):
    losses = []
    for p in range(len(query)):
        own = math.exp(float(query[p] @ positive[p]) / tau - float(lq_p[p]))
        total = own
        for k in range(len(candidates)):
            if allowed[p, k]:
                total += math.exp(float(query[p] @ candidates[k]) / tau - float(lq_k[k]))
        if hard is not None and hard_ok[p]:
            total += math.exp(float(query[p] @ hard[p]) / tau - float(lq_h[p]))
        losses.append(math.log(total) - math.log(own))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("max_logits", [1, 21, 10_000])
def test_chunked_loss_matches_loops_whatever_the_chunk(max_logits):
    query, positive, candidates, hard = unit(7, 5, 0), unit(7, 5, 1), unit(23, 5, 2), unit(7, 5, 3)
    rng = np.random.default_rng(0)
    allowed = torch.from_numpy(rng.random((7, 23)) < 0.7)
    hard_ok = torch.from_numpy(rng.random(7) < 0.6)
    lq_p, lq_k, lq_h = (torch.from_numpy(np.log(rng.random(n))) for n in (7, 23, 7))
    found = chunked_info_nce(
        query, positive, candidates, allowed, temperature=0.3, positive_log_q_P=lq_p, candidate_log_q_K=lq_k,
        hard_PD=hard, hard_allowed_P=hard_ok, hard_log_q_P=lq_h, max_logits=max_logits,
    )  # fmt: skip
    expected = looped(query, positive, candidates, allowed, 0.3, lq_p, lq_k, hard, hard_ok, lq_h)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_info_nce_matches_plain_loops():
    query, positive, candidates = unit(4, 6, 0), unit(4, 6, 1), unit(5, 6, 2)
    allowed = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    lq_p, lq_k = torch.tensor([-1.0, -2, -3, -4]), torch.tensor([-1.0, -1, -2, -5, -3])
    log_q = {"positive_log_q_P": lq_p, "candidate_log_q_K": lq_k}
    found = info_nce(query, positive, candidates, allowed, temperature=0.3, **log_q)
    torch.testing.assert_close(found, looped(query, positive, candidates, allowed, 0.3, lq_p, lq_k).mean())


def test_identical_vectors_give_log_of_all_candidates():
    same = unit(1, 6, 0)
    loss = info_nce(same, same, same.repeat(7, 1), torch.ones(1, 7, dtype=torch.bool), temperature=0.1)
    assert float(loss) == pytest.approx(math.log(8), rel=1e-5)


def test_masked_candidates_get_no_gradient_and_open_ones_do():
    query, positive, candidate = (unit(rows, 6, seed).requires_grad_() for rows, seed in ((1, 0), (1, 1), (2, 2)))
    info_nce(query, positive, candidate, torch.tensor([[True, False]]), temperature=0.2).backward()
    assert query.grad.abs().sum() > 0 and positive.grad.abs().sum() > 0
    assert candidate.grad[0].abs().sum() > 0 and candidate.grad[1].abs().sum() == 0


def test_the_live_trainers_loss_is_the_mean_of_the_chunked_one():
    query, positive, candidates = unit(6, 4, 0), unit(6, 4, 1), unit(9, 4, 2)
    allowed = torch.ones(6, 9, dtype=torch.bool)
    one = info_nce(query, positive, candidates, allowed, temperature=0.2)
    other = chunked_info_nce(query, positive, candidates, allowed, temperature=0.2, max_logits=12).mean()
    torch.testing.assert_close(one, other)


def test_k_identical_candidates_cost_log_k_plus_one():
    same, allowed = unit(1, 8, 0), torch.ones(3, 31, dtype=torch.bool)
    vectors = (same.expand(3, 8), same.expand(3, 8), same.expand(31, 8))
    loss = chunked_info_nce(*vectors, allowed, temperature=torch.tensor(0.1), max_logits=30)
    torch.testing.assert_close(loss, torch.full((3,), math.log(32), dtype=torch.float64))


def test_where_everything_is_masked_the_loss_is_zero_and_so_is_its_gradient():
    query = unit(2, 4, 0).requires_grad_()
    loss = chunked_info_nce(query, unit(2, 4, 1), unit(5, 4, 2), torch.zeros(2, 5, dtype=torch.bool), temperature=0.1)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert torch.isfinite(query.grad).all() and query.grad.abs().max() < 1e-12


def test_chunked_gradients_equal_whole_ones():
    grads = []
    for max_logits in (8, 10_000):
        query, positive, candidates = (unit(n, 6, s).requires_grad_() for n, s in ((4, 0), (4, 1), (15, 2)))
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        allowed = torch.ones(4, 15, dtype=torch.bool)
        inputs = (query, positive, candidates, allowed)
        chunked_info_nce(*inputs, temperature=temperature, max_logits=max_logits).sum().backward()
        grads.append([query.grad, positive.grad, candidates.grad, temperature.grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_triplet_is_a_hinge_on_cosines_and_silent_without_a_negative():
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    positive = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    negative = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    allowed = torch.tensor([True, True, False])
    assert triplet(query, positive, negative, allowed, margin=0.1).tolist() == pytest.approx([0.0, 1.1, 0.0])


@pytest.mark.parametrize("in_time", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("p", [0.02, 0.3, 0.8])
def test_fake_negatives_weighted_have_their_minimum_at_the_true_rate(in_time, p):
    # of an impression taken with probability p come p rows taken and 1 - in_time p rows not taken
    logit = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    mass, labels = torch.tensor([p, 1 - in_time * p], dtype=torch.float64), torch.tensor([1.0, 0.0])
    weights = fake_negative_weights(torch.sigmoid(logit).expand(2), labels, in_time)

    def gradient(weights):
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        loss = entropy(logit.expand(2), labels.double(), weights, reduction="sum")
        return float(torch.autograd.grad(loss, logit)[0])

    assert abs(gradient(mass * weights)) < 1e-12
    if in_time < 1:  # without the weights it lies lower
        assert gradient(mass) > 2e-5
    else:
        assert torch.equal(weights.detach(), torch.ones(2, dtype=torch.float64))


def test_a_row_that_is_surely_taken_weighs_nothing_where_all_takes_come_in_time() -> None:
    weights = fake_negative_weights(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), 1.0)
    assert weights.tolist() == [0, 1]
