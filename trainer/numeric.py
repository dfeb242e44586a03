"""Numbers as a network likes them: piecewise-linear features between quantiles, and layers shared by several heads.

Trees split where the data lies and ignore scale; a plain linear layer does neither. Bins at quantiles give a network
the same sight. Sources: piecewise-linear encoding (arXiv 2203.05556), cross layers of DCN-V2 (arXiv 2008.13535),
weight-sharing ensemble of TabM (arXiv 2410.24210).

Letters: B rows, F features, T bins, D width per feature, X input width, K heads, H hidden width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class NumericEmbedding(nn.Module):
    """Each feature of (B, F) as D numbers: (B, F D). Linear in the feature within a bin, constant beyond the outermost.

    Before `fit_bins` every feature has one bin from -1 to 1. Bins are buffers, so they travel with the weights.
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
        """Put the bins between quantiles of these rows; a feature with few values gets a bin between each two."""
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


class CrossNetwork(nn.Module):
    """Explicit feature crosses: x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, with W_l of low rank."""

    def __init__(self, width: int, *, layers: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, width) for _ in range(layers))

    def forward(self, first_BX: Tensor) -> Tensor:
        """Crossed features, shape (B, X)."""
        crossed_BX = first_BX
        for down, up in zip(self.down, self.up, strict=True):
            crossed_BX = first_BX * up(down(crossed_BX)) + crossed_BX
        return crossed_BX


class SharedHeads(nn.Module):
    """K prediction networks that share their matrices; each scales inputs and outputs of every layer its own way.

    Trained on the mean of their losses and averaged as probabilities, they are an ensemble at the price of one wider
    network.
    """

    def __init__(self, width: int, hidden: tuple[int, ...], *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.input_scale_KX = nn.Parameter(torch.randint(0, 2, (heads, width)).float() * 2 - 1)
        self.shared = nn.ModuleList()
        self.scales = nn.ParameterList()
        self.biases = nn.ParameterList()
        for size in hidden:
            self.shared.append(nn.Linear(width, size, bias=False))
            self.scales.append(nn.Parameter(torch.ones(heads, 1, size)))
            self.biases.append(nn.Parameter(torch.empty(heads, 1, size).uniform_(-1, 1) / math.sqrt(width)))
            width = size
        self.dropout = nn.Dropout(dropout)
        self.out_KH = nn.Parameter(torch.empty(heads, width).uniform_(-1, 1) / math.sqrt(width))
        self.out_K = nn.Parameter(torch.zeros(heads))

    def forward(self, input_BX: Tensor) -> Tensor:
        """Logits of each head, shape (B, K)."""
        hidden_KBX = input_BX * self.input_scale_KX[:, None]
        for layer, scale, bias in zip(self.shared, self.scales, self.biases, strict=True):
            hidden_KBX = self.dropout(torch.relu(torch.addcmul(bias, layer(hidden_KBX), scale)))
        return torch.einsum("kbh,kh->bk", hidden_KBX, self.out_KH) + self.out_K
