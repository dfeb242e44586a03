"""Losses: pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_NEVER = -1e30
"""Logit of a masked candidate; -inf would make the gradient of an all-masked row NaN."""


class NonFiniteLoss(ArithmeticError):
    """The loss of a batch is NaN or infinite; the step that raises it changes no weight."""


def info_nce(
    query_PD: Tensor,
    positive_PD: Tensor,
    candidate_KD: Tensor,
    allowed_PK: Tensor,
    *,
    temperature: float,
    positive_log_q_P: Tensor | None = None,
    candidate_log_q_K: Tensor | None = None,
) -> Tensor:
    """Masked InfoNCE with shared candidates and logQ correction, averaged over the queries.

    L = -mean_p [ s_pp/t - log( exp(s_pp/t) + sum_k M_pk exp(s_pk/t) ) ] with s = q.x - t log q(x). All rows are
    expected to have unit length. With K identical candidates the loss is log(K + 1).

    Source: MIM (arXiv 2502.00321), contrastive loss of C-SFT; logQ as in Yi et al., RecSys 2019.
    """
    positive_P = (query_PD * positive_PD).sum(-1) / temperature
    candidate_PK = query_PD @ candidate_KD.T / temperature
    if positive_log_q_P is not None:
        positive_P = positive_P - positive_log_q_P
    if candidate_log_q_K is not None:
        candidate_PK = candidate_PK - candidate_log_q_K
    candidate_PK = candidate_PK.masked_fill(~allowed_PK, -torch.inf)
    all_logits = torch.cat([positive_P[:, None], candidate_PK], dim=1)
    return (torch.logsumexp(all_logits, dim=1) - positive_P).mean()


def chunked_info_nce(
    query_PD: Tensor,
    positive_PD: Tensor,
    candidate_KD: Tensor,
    allowed_PK: Tensor,
    *,
    temperature: Tensor | float,
    positive_log_q_P: Tensor | None = None,
    candidate_log_q_K: Tensor | None = None,
    hard_PD: Tensor | None = None,
    hard_allowed_P: Tensor | None = None,
    hard_log_q_P: Tensor | None = None,
    max_logits: int = 1 << 22,
) -> Tensor:
    """`info_nce` per query (P,), with one hard negative of its own each, at most `max_logits` logits at a time.

    Chunks of candidates are folded into a running log-sum-exp and recomputed for the gradient, so memory does not grow
    with K and time grows linearly. A single chunk is not recomputed.
    """
    positive_P = (query_PD * positive_PD).sum(-1) / temperature
    if positive_log_q_P is not None:
        positive_P = positive_P - positive_log_q_P
    total_P = positive_P
    if hard_PD is not None and hard_allowed_P is not None:
        hard_P = (query_PD * hard_PD).sum(-1) / temperature
        if hard_log_q_P is not None:
            hard_P = hard_P - hard_log_q_P
        total_P = torch.logaddexp(total_P, hard_P.masked_fill(~hard_allowed_P, _NEVER))
    chunk = max(1, max_logits // max(1, len(query_PD)))
    whole = len(candidate_KD) <= chunk
    for start in range(0, len(candidate_KD), chunk):
        part = slice(start, start + chunk)
        log_q_K = None if candidate_log_q_K is None else candidate_log_q_K[part]
        given = (query_PD, candidate_KD[part], allowed_PK[:, part], temperature, log_q_K)
        summed_P = _log_sum(*given) if whole else checkpoint(_log_sum, *given, use_reentrant=False)
        total_P = torch.logaddexp(total_P, summed_P)
    loss_P: Tensor = total_P - positive_P
    return loss_P


def _log_sum(
    query_PD: Tensor, candidate_KD: Tensor, allowed_PK: Tensor, temperature: Tensor | float, log_q_K: Tensor | None
) -> Tensor:
    logits_PK = query_PD @ candidate_KD.T / temperature
    if log_q_K is not None:
        logits_PK = logits_PK - log_q_K
    summed: Tensor = torch.logsumexp(logits_PK.masked_fill(~allowed_PK, _NEVER), dim=1)
    return summed


def triplet(query_PD: Tensor, positive_PD: Tensor, negative_PD: Tensor, allowed_P: Tensor, *, margin: float) -> Tensor:
    """Hinge on the cosines, max(0, margin - q.p + q.n) per query (P,); zero where there is no negative.

    Source: the clicked-not-bought term of Taobao display's pre-training (arXiv 2407.19467).
    """
    gap_P = (query_PD * (negative_PD - positive_PD)).sum(-1)
    hinge: Tensor = torch.relu(margin + gap_P) * allowed_P
    return hinge


def fake_negative_weights(probability_B: Tensor, label_B: Tensor, in_time: float | Tensor) -> Tensor:
    """Weights of rows whose takes may be late: a row not taken counts (1 - p) / (1 - in_time p), a take counts 1.

    The share `in_time` of takes arrives while its impression waits; the others make a row not taken first and a row
    taken later. So an impression of probability p gives p rows taken and 1 - in_time p rows not taken; with these
    weights the latter count 1 - p, and the loss has its minimum at p again. Where every take arrives in time all
    weights are 1. `probability_B` is the model's own estimate of p, without gradient.

    Source: fake negative weighted loss (Ktena et al., RecSys 2019, arXiv 1907.06558), which is the case in_time = 0 up
    to a factor.
    """
    p_B = probability_B.detach()
    return torch.where(label_B > 0, torch.ones_like(p_B), (1 - p_B) / (1 - in_time * p_B).clamp_min(1e-6))


def log_reached(logits_B: Tensor, steps_BK: Tensor) -> Tensor:
    """log p_k of further outcomes, shape (B, K): p_k = p_(k-1) sigmoid(step_k), where p_0 is that of `logits_B`.

    All are probabilities over impressions, so that none is learned from takes alone, and none exceeds the one before.
    Each is a function of its own step: p_(k-1) gets no gradient from it, so a rare outcome never moves a frequent one.

    Source: ESMM (Ma et al., SIGIR 2018, arXiv 1804.07931), equation 1, with pCTR held fixed.
    """
    log_steps_BK = F.logsigmoid(steps_BK)
    before_BK = torch.cat([F.logsigmoid(logits_B)[:, None], log_steps_BK[:, :-1]], dim=1).cumsum(1)
    return before_BK.detach() + log_steps_BK


def outcome_loss(log_p_BK: Tensor, labels_BK: Tensor, weights_BK: Tensor) -> Tensor:
    """Weighted binary cross-entropy of probabilities given as logarithms: summed over K, the mean over rows."""
    not_BK = torch.log(-torch.expm1(log_p_BK.clamp(max=-1e-6)))
    loss_BK = -(labels_BK * log_p_BK + (1 - labels_BK) * not_BK)
    total: Tensor = (loss_BK * weights_BK).mean(0).sum()
    return total
