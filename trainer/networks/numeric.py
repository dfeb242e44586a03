"""Numeric features: piecewise-linear encoding between quantiles, and an ensemble of heads that cross them.

Trees split at quantiles of the data and ignore scale; a linear layer does neither. Bins at quantiles give a network
both. Sources: piecewise-linear encoding (arXiv 2203.05556), cross layers of DCN-V2 (arXiv 2008.13535).

Letters: B rows, F features, T bins, D width per feature, X input width, K heads, H hidden width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class NumericEmbedding(nn.Module):
    """Each feature of (B, F) as D numbers: (B, F D). Linear in the feature within a bin, constant beyond the outermost.

    Before `fit_bins` every feature has one bin from -1 to 1. Bins are buffers, saved with the weights.
    """

    left_FT: Tensor
    scale_FT: Tensor

    def __init__(self, features: int, *, bins: int, width: int) -> None:
        super().__init__()
        self.bins, self.width = bins, features * width
        left_FT, scale_FT = torch.zeros(features, bins), torch.zeros(features, bins)
        left_FT[:, 0], scale_FT[:, 0] = -1.0, 0.5
        self.register_buffer("left_FT", left_FT)
        self.register_buffer("scale_FT", scale_FT)
        bound = 1 / math.sqrt(bins)
        self.weight_FTD = nn.Parameter(torch.empty(features, bins, width).uniform_(-bound, bound))
        self.bias_FD = nn.Parameter(torch.empty(features, width).uniform_(-bound, bound))

    @torch.no_grad()
    def fit_bins(self, dense_NF: Tensor) -> None:
        """Set the bins between quantiles of these rows; a feature with few values gets a bin between each two."""
        levels = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64)
        self.left_FT.zero_()
        self.scale_FT.zero_()
        for feature, values_N in enumerate(dense_NF.double().T):
            distinct = values_N.unique()
            if len(distinct) > self.bins + 1:
                ordered = values_N.sort().values
                distinct = ordered[(levels * (len(ordered) - 1)).long()].unique()
            edges = distinct.float()
            steps = edges.diff()
            used = steps > 0
            count = int(used.sum())
            self.left_FT[feature, :count] = edges[:-1][used]
            self.scale_FT[feature, :count] = 1 / steps[used]

    def forward(self, dense_BF: Tensor) -> Tensor:
        """Embedded features, side by side."""
        place_BFT = ((dense_BF[:, :, None] - self.left_FT) * self.scale_FT).clamp_(0, 1)
        return (
            torch.baddbmm(self.bias_FD[:, None], place_BFT.transpose(0, 1), self.weight_FTD).transpose(0, 1).flatten(1)
        )


class CrossedHeads(nn.Module):
    """K prediction networks over one input without shared weights: cross layers, then hidden layers.

    A cross layer is x_{l+1} = x_0 * (W_l x_l + b_l) + x_l with W_l of low rank. Trained on the mean of their losses and
    averaged as probabilities, the heads are an ensemble over interests that are computed once.
    """

    def __init__(
        self, width: int, hidden: tuple[int, ...], *, heads: int, cross_layers: int, cross_rank: int, dropout: float
    ) -> None:
        super().__init__()
        self.heads = heads
        self.down = nn.ParameterList(_uniform(width, heads, width, cross_rank) for _ in range(cross_layers))
        self.up = nn.ParameterList(_uniform(cross_rank, heads, cross_rank, width) for _ in range(cross_layers))
        self.up_bias = nn.ParameterList(_uniform(cross_rank, heads, 1, width) for _ in range(cross_layers))
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for size in (*hidden, 1):
            self.weights.append(_uniform(width, heads, width, size))
            self.biases.append(_uniform(width, heads, 1, size))
            width = size
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_BX: Tensor) -> Tensor:
        """Logits of each head, shape (B, K)."""
        first_KBX = input_BX.expand(self.heads, *input_BX.shape)
        hidden_KBX = first_KBX
        for down, up, bias in zip(self.down, self.up, self.up_bias, strict=True):
            hidden_KBX = torch.addcmul(hidden_KBX, first_KBX, torch.baddbmm(bias, torch.bmm(hidden_KBX, down), up))
        last = len(self.weights) - 1
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden_KBX = torch.baddbmm(bias, hidden_KBX, weight)
            if depth < last:
                hidden_KBX = self.dropout(torch.relu(hidden_KBX))
        return hidden_KBX.squeeze(2).T


def _uniform(fan_in: int, *shape: int) -> nn.Parameter:
    """A parameter with the initial distribution of `nn.Linear`."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))
