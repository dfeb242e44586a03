"""Numeric features: piecewise-linear encoding between fixed knots, and layers that cross them.

Trees split at quantiles of the data and ignore scale; a linear layer does neither. Knots that stand close to zero and
ever farther apart give a network both, for numbers that are logarithms, shares or ratios, and need no data. Sources:
piecewise-linear encoding (arXiv 2203.05556), cross layers of DCN-V2 (arXiv 2008.13535).

Letters: B rows, F features, T bins, D width per feature, X input width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_POSITIVE = (0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2, 3, 4, 6, 8, 12, 16)
KNOTS = (*(-knot for knot in reversed(_POSITIVE[1:])), *_POSITIVE)
"""Where the pieces meet, the same for every feature."""


class NumericEmbedding(nn.Module):
    """Each feature of (B, F) as D numbers: (B, F D). Linear in the feature between two knots, constant beyond the last.

    Nothing is fitted: what training saw, a server and a later stream see alike.
    """

    left_T: Tensor
    scale_T: Tensor

    def __init__(self, features: int, *, width: int) -> None:
        super().__init__()
        self.width = features * width
        knots = torch.tensor(KNOTS)
        self.register_buffer("left_T", knots[:-1].clone(), persistent=False)
        self.register_buffer("scale_T", 1 / knots.diff(), persistent=False)
        bound = 1 / math.sqrt(len(self.left_T))
        self.weight_FTD = nn.Parameter(torch.empty(features, len(self.left_T), width).uniform_(-bound, bound))
        self.bias_FD = nn.Parameter(torch.empty(features, width).uniform_(-bound, bound))

    def forward(self, dense_BF: Tensor) -> Tensor:
        """Embedded features, side by side."""
        place_FBT = ((dense_BF.T[:, :, None] - self.left_T) * self.scale_T).clamp_(0, 1)
        return torch.baddbmm(self.bias_FD[:, None], place_FBT, self.weight_FTD).transpose(0, 1).flatten(1)


class CrossLayers(nn.Module):
    """Explicit feature crosses, (B, X) to (B, X): x_{l+1} = x_0 * (W_l x_l + b_l) + x_l with W_l of low rank."""

    def __init__(self, width: int, *, layers: int, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width)) for _ in range(layers)
        )

    def forward(self, first_BX: Tensor) -> Tensor:
        """The input with its crosses, as wide as it."""
        hidden_BX = first_BX
        for layer in self.layers:
            hidden_BX = torch.addcmul(hidden_BX, first_BX, layer(hidden_BX))
        return hidden_BX
