"""The training loop that all neural click models share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.metrics import log_loss, user_auc
from trainer.networks.id_table import IdTable
from trainer.networks.learner import forget_rows
from trainer.networks.losses import NonFiniteLoss
from trainer.networks.row_adam import RowAdam
from trainer.offline.neural.columns import ColumnBatches


@dataclass(frozen=True)
class FitSettings:
    """Length, step sizes and losses of a training run."""

    epochs: int = 2
    batch_rows: int = 256
    learning_rate: float = 2e-3
    id_learning_rate: float = 5e-3
    weight_decay: float = 1e-4
    group_weight: float = 0.2
    """Weight of the ranking term among items shown to one user at one time (JRC, arXiv 2208.06164)."""
    warm_up: float = 0.1
    """Share of the steps over which the learning rate rises; a cosine decay to zero follows."""
    max_gradient_norm: float = 5.0


@dataclass(frozen=True)
class FitReport:
    """Result of a training run."""

    losses: list[float]
    """Mean training loss of each epoch."""
    validation_losses: list[float]
    """Log-loss on the validation rows after each epoch; empty without any."""
    validation_gauc: list[float]
    """GAUC on the same rows."""


def fit(
    network: nn.Module, train: ColumnBatches, validation: ColumnBatches | None, settings: FitSettings, *, seed: int
) -> FitReport:
    """Train in place for all epochs of the settings; validation rows are reported on, and change nothing.

    The step size decays to zero at the end, so an early stop is not the run of fewer epochs. The number of epochs is
    therefore tuned like any other setting, and a refit on more rows uses the tuned one.
    """
    rng = np.random.default_rng(seed)
    tables = [module for module in network.modules() if isinstance(module, IdTable)]
    table_weights = {id(table.embedding.weight) for table in tables}
    dense = [p for p in network.parameters() if p.requires_grad and id(p) not in table_weights]
    optimiser = torch.optim.AdamW(dense, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    sparse = RowAdam([t.embedding.weight for t in tables], lr=settings.id_learning_rate) if tables else None
    steps = settings.epochs * -(-len(train) // settings.batch_rows)
    optimisers = [optimiser, sparse] if sparse is not None else [optimiser]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: _rate(step / max(1, steps), settings.warm_up))
        for each in optimisers
    ]
    report = FitReport([], [], [])
    for epoch in range(settings.epochs):
        network.train()
        total = 0.0
        for rows in train.epoch(settings.batch_rows, rng):
            batch, labels_B = train.batch(rows), train.labels(rows)
            with _precision(labels_B):
                logits_BK = network.members(batch)  # type: ignore[operator]
            logits_BK = logits_BK.float()
            loss = F.binary_cross_entropy_with_logits(logits_BK, labels_B[:, None].expand_as(logits_BK))
            total += float(loss.detach()) * len(rows)
            if settings.group_weight:
                loss = loss + settings.group_weight * ranking_loss(logits_BK, labels_B, train.groups(rows))
            if not torch.isfinite(loss):
                raise NonFiniteLoss(f"loss is {loss.item()} in epoch {epoch + 1}")
            for each in optimisers:
                each.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(dense, settings.max_gradient_norm)
            for each, schedule in zip(optimisers, schedules, strict=True):
                each.step()
                schedule.step()
            if sparse is not None:
                for table in tables:
                    forget_rows(sparse, table.admit(batch.hashes_U2))
        report.losses.append(total / max(1, len(train)))
        if validation is not None:
            scores, seen = predict(network, validation), validation.data.rows
            labels = seen.label_N.astype(np.int64)
            report.validation_losses.append(log_loss(labels, scores))
            report.validation_gauc.append(user_auc(seen.user_N, labels, scores).weighted)
    return report


@torch.inference_mode()
def predict(network: nn.Module, data: ColumnBatches, *, batch_rows: int = 2048) -> NDArray[np.float64]:
    """Probabilities in the order of the rows, shape (N,): the mean over the heads."""
    network.eval()
    scores_N = np.empty(len(data), np.float64)
    for rows in data.in_order(batch_rows):
        logits_BK: Tensor = network.members(data.batch(rows))  # type: ignore[operator]
        scores_N[rows] = torch.sigmoid(logits_BK.double()).mean(1).cpu().numpy()
    return scores_N


def ranking_loss(logits_BK: Tensor, labels_B: Tensor, group_B: Tensor) -> Tensor:
    """Softmax cross-entropy of each positive among the rows of its group, mean over positives; 0 without positives.

    Log-loss calibrates across users, ranking compares within one. Source: the discriminative half of JRC
    (arXiv 2208.06164), here over one user's rows of one second.
    """
    groups = int(group_B.max()) + 1
    index_BK = group_B[:, None].expand_as(logits_BK)
    highest_GK = logits_BK.new_full((groups, logits_BK.shape[1]), -torch.inf)
    highest_GK = highest_GK.scatter_reduce(0, index_BK, logits_BK.detach(), "amax")
    mass_GK = torch.zeros_like(highest_GK).index_add(0, group_B, (logits_BK - highest_GK[group_B]).exp())
    log_share_BK = logits_BK - highest_GK[group_B] - mass_GK[group_B].log()
    return -(log_share_BK * labels_B[:, None]).sum() / (labels_B.sum().clamp(min=1) * logits_BK.shape[1])


def _rate(done: float, warm_up: float) -> float:
    if done < warm_up:
        return done / warm_up + 1e-3
    return 0.5 * (1 + float(np.cos(np.pi * min(1.0, (done - warm_up) / (1 - warm_up)))))


def _precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Mixed precision on CUDA, none elsewhere."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if tensor.is_cuda else nullcontext()
