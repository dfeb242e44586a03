"""Losses: functions of tensors, nothing else."""

from __future__ import annotations

import torch
from torch import Tensor


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
