"""Stage 1: adapts the heads to a platform's items by aligning pictures with titles; needs no behaviours.

Source: MIM (arXiv 2502.00321), figure 2a.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from encoders.fusion import ItemFusion, ItemSource
from trainer.csft.config import PretrainConfig
from trainer.networks.losses import info_nce


@dataclass(frozen=True)
class PretrainRun:
    """Result of a run."""

    steps: int
    items: int
    alignment_loss: float
    """Mean of the last epoch."""


def pretrain(
    config: PretrainConfig,
    fusion: ItemFusion,
    items: ItemSource,
    *,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    towers: nn.Module | None = None,
    tower_learning_rate: float = 1e-4,
) -> PretrainRun:
    """Train the heads (and `towers`, where they compute `items`) on items that have both a picture and a title.

    Row 0 of the items is padding. Ends by centring on all of them.
    """
    both = torch.nonzero(items.has_text_N & items.has_image_N).flatten().numpy()
    rng = np.random.default_rng(config.seed)
    per_epoch = len(both) // config.batch_items or int(len(both) >= 2)
    total = per_epoch * config.epochs
    groups: list[dict[str, Any]] = [{"params": list(fusion.parameters()), "peak": config.learning_rate}]
    if towers is not None:
        learning = [p for p in towers.parameters() if p.requires_grad]
        groups.append({"params": learning, "peak": tower_learning_rate})
    learned = [p for group in groups for p in group["params"]]
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    losses: list[float] = []
    step = 0
    for _ in range(config.epochs):
        losses = []
        order = rng.permutation(both)
        for start in range(per_epoch):
            rows = torch.from_numpy(order[start * config.batch_items : (start + 1) * config.batch_items])
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * 0.5 * (1 + np.cos(np.pi * step / total))
            batch = items.select(rows)
            hide_text = torch.from_numpy(rng.random(len(rows)) < 0.5)
            whole = fusion(batch)
            part = fusion(batch, drop_text_N=hide_text, drop_image_N=~hide_text)
            alignment = _symmetric(whole.image_ND, whole.title_ND, config.temperature)
            again = _symmetric(part.fused_ND, whole.fused_ND, config.temperature)
            loss = alignment + config.missing_weight * again
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learned, 5.0)
            optimiser.step()
            fusion.centre_on(batch, momentum=0.9)
            step += 1
            losses.append(float(alignment.detach()))
            on_step(step, total)
    with torch.no_grad():
        fusion.centre_on(items.select(torch.arange(1, len(items))))
    return PretrainRun(step, len(both), float(np.mean(losses)) if losses else float("nan"))


def _symmetric(left_ND: Tensor, right_ND: Tensor, temperature: float) -> Tensor:
    others = ~torch.eye(len(left_ND), dtype=torch.bool)
    forward = info_nce(left_ND, right_ND, right_ND, others, temperature=temperature)
    backward = info_nce(right_ND, left_ND, left_ND, others, temperature=temperature)
    return 0.5 * (forward + backward)
