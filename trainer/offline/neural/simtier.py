"""SimTier and MAKE of Taobao display, alone and together.

Source: arXiv 2407.19467. SimTier counts the cosines of target and history per tier; the authors' code uses tier
floor(10 cos) + 10 of 22 and the input log(1 + count) times a learned scalar. MAKE trains a DIN on content vectors alone
for several epochs, then adds its interest, hidden outputs and logit to the id model, which is trained jointly for one.

Different here: padded history is masked (in the authors' code zeros count in a tier), the id model is the one of
`trainer.offline.neural.din`, and vectors are those of the encoder under comparison, without a contrastive phase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from trainer.networks.ciubm import CtrBatch
from trainer.offline.neural.base import SIMILARITIES, TRIALS, NeuralModel
from trainer.offline.neural.columns import ColumnBatches
from trainer.offline.neural.din import CONTENT_WIDTH, HIDDEN, PeerNetwork, Shape, Tower, VectorAttention, cosines
from trainer.offline.neural.fitting import FitReport, FitSettings, fit

TIERS = 22


class SimTierFeatures(nn.Module):
    """log(1 + number of history items in each of 22 tiers of 0.1), times one learned scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, similarity_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Histogram features, shape (B, TIERS), without padding and items without a vector."""
        tier_BL = (torch.floor(10 * similarity_BL.detach()) + 10).long().clamp(0, TIERS - 1)
        counts_BT = similarity_BL.new_zeros(len(similarity_BL), TIERS).scatter_add_(1, tier_BL, mask_BL.float())
        return torch.log1p(counts_BT) * self.scale


class ContentDin(nn.Module):
    """MAKE's first phase: a DIN on content vectors alone."""

    def __init__(self, *, vector_width: int, shape: Shape) -> None:
        super().__init__()
        self.vectors = VectorAttention(vector_width)
        self.tower = Tower(2 * CONTENT_WIDTH, dropout=shape.dropout, cross_layers=shape.cross_layers)
        self.width = CONTENT_WIDTH + sum(HIDDEN) + 1

    def members(self, batch: CtrBatch) -> Tensor:
        """Logits, shape (B, 1)."""
        logits_B1: Tensor = self.tower(torch.cat(self.vectors(batch), dim=1))
        return logits_B1

    def knowledge(self, batch: CtrBatch) -> list[Tensor]:
        """Inputs of the second phase: interest, outputs of each hidden layer, logit; `width` numbers in all."""
        target_BC, interest_BC = self.vectors(batch)
        hidden = self.tower.hidden(torch.cat([target_BC, interest_BC], dim=1))
        return [interest_BC, *hidden, self.tower.last(hidden[-1])]


class TaobaoNetwork(PeerNetwork):
    """The id model with SimTier, MAKE or both."""

    def __init__(self, *, vector_width: int, dense_width: int, simtier: bool, make: bool, shape: Shape) -> None:
        content = ContentDin(vector_width=vector_width, shape=shape) if make else None
        extra_width = (TIERS if simtier else 0) + (content.width if content is not None else 0)
        super().__init__(dense_width=dense_width, extra_width=extra_width, shape=shape)
        self.simtier = SimTierFeatures() if simtier else None
        self.content = content

    def extras(self, batch: CtrBatch) -> list[Tensor]:
        """Histogram, and the outputs of the content model."""
        found = [self.simtier(*cosines(batch))] if self.simtier is not None else []
        return found if self.content is None else [*found, *self.content.knowledge(batch)]


class SimTier(NeuralModel):
    """DIN with the SimTier histogram."""

    name = "simtier"
    trials: Sequence[Mapping[str, Any]] = TRIALS
    left_out = SIMILARITIES
    simtier, make = True, False

    @override
    def build(self, settings: Mapping[str, Any], *, vector_width: int, dense_width: int, seed: int) -> nn.Module:
        return TaobaoNetwork(
            vector_width=vector_width,
            dense_width=dense_width,
            simtier=self.simtier,
            make=self.make,
            shape=Shape(**settings),
        )


class Make(SimTier):
    """DIN with MAKE: the content model first, for more epochs, then both jointly."""

    name = "make"
    simtier, make = False, True
    content_epochs = 4

    @override
    def learn(
        self, train: ColumnBatches, validation: ColumnBatches | None, settings: FitSettings, *, seed: int
    ) -> FitReport:
        assert isinstance(self.network, TaobaoNetwork)
        assert self.network.content is not None
        alone = replace(settings, epochs=self.content_epochs, group_weight=0.0)
        fit(self.network.content, train, None, alone, seed=seed)
        return fit(self.network, train, validation, settings, seed=seed + 1)


class SimTierMake(Make):
    """Both, as in the authors' production."""

    name = "simtier-make"
    simtier, make = True, True
