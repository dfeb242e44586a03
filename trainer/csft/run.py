"""A whole C-SFT run over mined pairs: epochs, progress, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from encoders.features import ItemFeatures
from encoders.fusion import FusionInput, ItemFusion, ItemSource
from trainer.csft.config import CsftConfig
from trainer.csft.pairs import HardNegatives, Pair, batches
from trainer.csft.trainer import CsftReport, CsftTrainer, take_counts
from trainer.csft.workers import Workers
from trainer.samples.numbering import ItemNumbers


@dataclass(frozen=True)
class CsftRun:
    """Result of a run."""

    steps: int
    pairs: int
    last: CsftReport | None
    loss_share: float | None
    """Mean of the last epoch's fused losses over ln(candidates + 1)."""


def padded(fusion: ItemFusion, features: ItemFeatures) -> FusionInput:
    """The heads' input by item number; row 0 is padding."""
    return fusion.prepare(with_padding(features))


def with_padding(features: ItemFeatures) -> ItemFeatures:
    """Features by item number; row 0 is an item without content."""
    template = features.select(np.zeros(1, np.int64))
    empty = ItemFeatures(
        text_NT=np.zeros_like(template.text_NT),
        image_NI=np.zeros_like(template.image_NI),
        has_text_N=np.zeros(1, bool),
        has_image_N=np.zeros(1, bool),
        category_N2=np.full((1, 2), -1, np.int64),
        year_N=np.full(1, np.nan, np.float32),
        price_N=np.full(1, np.nan, np.float32),
        words_NA=np.full_like(template.words_NA, -1),
    )
    return ItemFeatures.concatenate([empty, features])


def learn(
    config: CsftConfig,
    fusion: ItemFusion,
    items: ItemSource,
    numbers: ItemNumbers,
    pairs: Sequence[Pair],
    *,
    usable: NDArray[np.bool_],
    on_step: Callable[[CsftReport, int], None] = lambda report, total: None,
    checkpoint: Callable[[dict[str, Any]], None] | None = None,
    resume_from: dict[str, Any] | None = None,
    workers: Workers | None = None,
    towers: nn.Module | None = None,
    tower_learning_rate: float = 1e-4,
) -> CsftRun:
    """Train the fusion (and `towers`, where they compute `items`) on the pairs.

    `usable` marks the item numbers that may be drawn as negatives and are centred on. `checkpoint` receives a snapshot
    after every epoch; `resume_from` continues from one, with bit-identical results.
    """
    per_epoch = -(-len(pairs) // config.batch_pairs)
    total = max(1, per_epoch * config.epochs)
    hard = HardNegatives(_category_numbers(items), usable=usable)
    trainer = CsftTrainer(
        config,
        fusion,
        items,
        numbers,
        total_steps=total,
        counts=take_counts([pair.take for pair in pairs]),
        hard_negatives=hard,
        catalogue=np.flatnonzero(usable),
        workers=workers,
        towers=towers,
        tower_learning_rate=tower_learning_rate,
    )
    order = np.random.default_rng([config.seed, 1])
    first = 0
    if resume_from is not None:
        trainer.restore(resume_from["trainer"])
        order.bit_generator.state = resume_from["order"]
        first = int(resume_from["epochs"])
    last: CsftReport | None = None
    shares: list[float] = []
    for epoch in range(first, config.epochs):
        shares = []
        for batch in batches(pairs, size=config.batch_pairs, rng=order, shuffle_seconds=config.shuffle_seconds):
            report = trainer.step(batch)
            if report is not None:
                last = report
                shares.append(report.loss_share)
                on_step(report, total)
        if checkpoint is not None:
            checkpoint({"trainer": trainer.snapshot(), "order": order.bit_generator.state, "epochs": epoch + 1})
    trainer.finish()
    return CsftRun(trainer.steps, len(pairs), last, float(np.mean(shares)) if shares else None)


def _category_numbers(items: ItemSource) -> NDArray[np.int64]:
    hashes = items.category_N2.numpy()
    _, numbers = np.unique(hashes[:, 0], return_inverse=True)
    return np.where(hashes[:, 0] >= 0, numbers.reshape(-1), -1)
