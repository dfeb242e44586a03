"""DMF of Lazada: target attention over ids whose keys and values carry the content similarity.

Source: Decoupled Multimodal Fusion (arXiv 2510.11066). The cosine of target and history item is cut into buckets, each
with an embedding that is added to key and value, so that one attention reads ids and content together
(modality-enriched interest). What depends on the target alone and on the history alone is computed once; only a look-up
remains per pair. Beside it stands what content alone says (modality-centric interest).

Different here: one attention head; the modality-centric interest is the SimTier histogram, and the prediction layers
join both instead of a gate; vectors are those of the encoder under comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from trainer.networks.ciubm import CtrBatch, gathered, weighted_sum
from trainer.offline.neural.base import SIMILARITIES, TRIALS, NeuralModel
from trainer.offline.neural.din import DEFAULT_SHAPE, ID_WIDTH, PeerNetwork, Shape, cosines
from trainer.offline.neural.simtier import TIERS, SimTierFeatures

BUCKETS = 40
"""Buckets of the cosine over [-1, 1]; one more stands for an unknown cosine."""


class DmfNetwork(PeerNetwork):
    """The id model with decoupled target attention and a histogram of similarities."""

    def __init__(self, *, dense_width: int, shape: Shape = DEFAULT_SHAPE) -> None:
        super().__init__(dense_width=dense_width, extra_width=TIERS, shape=shape)
        del self.attention  # replaced by the decoupled one
        self.query = nn.Linear(ID_WIDTH, ID_WIDTH)
        self.key = nn.Linear(ID_WIDTH, ID_WIDTH)
        self.value = nn.Linear(ID_WIDTH, ID_WIDTH)
        self.bucket_key = nn.Embedding(BUCKETS + 1, ID_WIDTH)
        self.bucket_value = nn.Embedding(BUCKETS + 1, ID_WIDTH)
        self.simtier = SimTierFeatures()

    def interest(self, batch: CtrBatch, ids_UE: Tensor, target_BE: Tensor) -> Tensor:
        """Attention over ids and buckets of the history, shape (B, E); zero for an empty history."""
        bucket_BL = buckets(*cosines(batch))
        mask_BL = batch.history_BL > 0
        query_BE = self.query(target_BE)
        by_id_BL = torch.bmm(gathered(self.key(ids_UE), batch.history_BL), query_BE[:, :, None]).squeeze(2)
        by_bucket_BL = (query_BE @ self.bucket_key.weight.T).gather(1, bucket_BL)
        score_BL = (by_id_BL + by_bucket_BL) / math.sqrt(ID_WIDTH)
        weight_BL = torch.softmax(score_BL.masked_fill(~mask_BL, -1e9), dim=1) * mask_BL
        of_bucket_BT = weight_BL.new_zeros(len(weight_BL), BUCKETS + 1).scatter_add(1, bucket_BL, weight_BL)
        of_ids_BE = weighted_sum(weight_BL, gathered(self.value(ids_UE), batch.history_BL))
        return of_ids_BE + of_bucket_BT @ self.bucket_value.weight

    def extras(self, batch: CtrBatch) -> list[Tensor]:
        """The histogram of similarities."""
        return [self.simtier(*cosines(batch))]


def buckets(similarity_BL: Tensor, known_BL: Tensor) -> Tensor:
    """Number of each cosine's bucket, 1 to `BUCKETS`; 0 where it is unknown."""
    bucket_BL = ((similarity_BL.detach() + 1) / 2 * BUCKETS).long().clamp(0, BUCKETS - 1) + 1
    return bucket_BL * known_BL


class Dmf(NeuralModel):
    """DMF."""

    name = "dmf"
    trials: Sequence[Mapping[str, Any]] = TRIALS
    left_out = SIMILARITIES

    @override
    def build(self, settings: Mapping[str, Any], *, vector_width: int, dense_width: int, seed: int) -> nn.Module:
        return DmfNetwork(dense_width=dense_width, shape=Shape(**settings))
