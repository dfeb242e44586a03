"""Pairs to arrays: the anchor of each pair of a batch, and its hard negative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.csft.config import CsftConfig
from trainer.csft.pairs import HardNegatives, Pair
from trainer.negatives.sampler import ContrastivePlan

# P = pairs of a batch, A = items of an anchor


@dataclass(frozen=True)
class PairBatch:
    """The pairs of a batch that a plan uses; ids only, no tensor."""

    plan: ContrastivePlan
    anchors_PA: NDArray[np.int64]
    """Newest first, 0-padded."""
    anchor_weights_PA: NDArray[np.float32]
    anchor_views_P: NDArray[np.int64]
    """The view of its anchor that is a pair's query."""
    hard_P: NDArray[np.int64]
    """The pair's hard negative; 0 where there is none."""
    weights_P: NDArray[np.float32]
    """Weight of the pair, by the kind of its take."""


def pair_batch(
    used: Sequence[Pair],
    plan: ContrastivePlan,
    config: CsftConfig,
    hard_negatives: HardNegatives,
    rng: np.random.Generator,
) -> PairBatch:
    """Arrays of the pairs that the plan uses, in its order; some anchors are shortened to one of their items."""
    short = rng.random(len(used)) < config.anchor_drop
    anchors = np.zeros((len(used), config.anchor_items), np.int64)
    weights = np.zeros((len(used), config.anchor_items), np.float32)
    for p, pair in enumerate(used):
        newest_first = pair.anchor[-config.anchor_items :][::-1]
        if short[p]:
            newest_first = (newest_first[int(rng.integers(len(newest_first)))],)
        anchors[p, : len(newest_first)] = newest_first
        weights[p, : len(newest_first)] = config.anchor_decay ** np.arange(len(newest_first))
    hard = np.zeros(len(used), np.int64)
    if config.hard_negatives:
        for p, pair in enumerate(used):
            hard[p] = hard_negatives.choose(pair, rng)
    return PairBatch(
        plan=plan,
        anchors_PA=anchors,
        anchor_weights_PA=weights,
        anchor_views_P=np.array([pair.view for pair in used], np.int64),
        hard_P=hard,
        weights_P=np.array([config.weight_of(pair.kind) for pair in used], np.float32),
    )
