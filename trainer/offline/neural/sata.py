"""SA-TA of MUSE: target attention weighted by content similarity and id affinity.

Source: MUSE (arXiv 2512.07216) and its code: a general search unit keeps the history items nearest in content; over
them the exact unit runs SimTier and semantic-aware target attention, softmax(g1 a + g2 r + g3 a r), where a is the
scaled product of projected id embeddings, r = cos / 0.1, and g start at 1.

Different here: histories have at most 50 items, so the search unit keeps them all unless `kept` is smaller; GAUC is
never computed inside a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from trainer.networks.ciubm import CtrBatch, gathered, weighted_sum
from trainer.offline.neural.base import HISTORY_LENGTH, SIMILARITIES, TRIALS, NeuralModel
from trainer.offline.neural.din import DEFAULT_SHAPE, ID_WIDTH, PeerNetwork, Shape, cosines
from trainer.offline.neural.simtier import TIERS, SimTierFeatures

TEMPERATURE = 0.1


class SataNetwork(PeerNetwork):
    """The id model with SimTier, whose target attention is SA-TA."""

    def __init__(self, *, dense_width: int, kept: int = HISTORY_LENGTH, shape: Shape = DEFAULT_SHAPE) -> None:
        super().__init__(dense_width=dense_width, extra_width=TIERS, shape=shape)
        del self.attention  # replaced by SA-TA
        self.query = nn.Linear(ID_WIDTH, ID_WIDTH)
        self.key = nn.Linear(ID_WIDTH, ID_WIDTH)
        self.value = nn.Linear(ID_WIDTH, ID_WIDTH)
        self.balance_3 = nn.Parameter(torch.ones(3))
        self.simtier = SimTierFeatures()
        self.kept = kept

    def interest(self, batch: CtrBatch, ids_UE: Tensor, target_BE: Tensor) -> Tensor:
        """Semantic-aware attention over the ids of the history, shape (B, E); zero for an empty history."""
        similarity_BL, known_BL = cosines(batch)
        mask_BL = nearest(similarity_BL, known_BL, batch.history_BL > 0, self.kept)
        key_BLE = gathered(self.key(ids_UE), batch.history_BL)
        affinity_BL = torch.bmm(key_BLE, self.query(target_BE)[:, :, None]).squeeze(2) / math.sqrt(ID_WIDTH)
        relevance_BL = similarity_BL / TEMPERATURE
        by_id, by_content, by_both = self.balance_3
        score_BL = by_id * affinity_BL + by_content * relevance_BL + by_both * affinity_BL * relevance_BL
        weight_BL = torch.softmax(score_BL.masked_fill(~mask_BL, -1e9), dim=1) * mask_BL
        return weighted_sum(weight_BL, gathered(self.value(ids_UE), batch.history_BL))

    def extras(self, batch: CtrBatch) -> list[Tensor]:
        """The histogram of similarities over the items kept by the search unit."""
        similarity_BL, known_BL = cosines(batch)
        kept_BL = nearest(similarity_BL, known_BL, batch.history_BL > 0, self.kept)
        return [self.simtier(similarity_BL, known_BL & kept_BL)]


def nearest(similarity_BL: Tensor, known_BL: Tensor, mask_BL: Tensor, kept: int) -> Tensor:
    """The search unit: the `kept` nearest history items, bool (B, L); those without a vector come last."""
    if similarity_BL.shape[1] <= kept:
        return mask_BL
    order_BL = similarity_BL.masked_fill(~known_BL, -2.0).masked_fill(~mask_BL, -3.0)
    chosen_BK = order_BL.topk(kept, dim=1).indices
    return torch.zeros_like(mask_BL).scatter_(1, chosen_BK, True) & mask_BL


class Sata(NeuralModel):
    """SimTier and SA-TA."""

    name = "sa-ta"
    trials: Sequence[Mapping[str, Any]] = TRIALS
    left_out = SIMILARITIES

    @override
    def build(self, settings: Mapping[str, Any], *, vector_width: int, dense_width: int, seed: int) -> nn.Module:
        return SataNetwork(dense_width=dense_width, shape=Shape(**settings))
