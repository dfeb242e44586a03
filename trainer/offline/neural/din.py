"""DIN, and DIN with content vectors and with their similarities.

Source: Deep Interest Network (arXiv 1706.06978): target attention without normalisation, over [h, t, h - t, h * t].
Different here: the sum is divided by the root of the history's length, ids are admitted by count (`IdTable`) and added
to their category, and the numeric features of the comparison are embedded (`NumericEmbedding`).

Letters as in `trainer.networks.ciubm`; X width of an item's representation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from trainer.networks.attention import TargetAttention
from trainer.networks.ciubm import (
    CiUBM,
    CtrBatch,
    both_held,
    dropped_ids,
    gathered,
    length_scale,
    stored_cosines,
    summaries,
    weighted_sum,
)
from trainer.networks.config import CiUBMConfig, TreesConfig
from trainer.networks.id_table import IdTable
from trainer.networks.numeric import NumericEmbedding
from trainer.offline.neural.base import CATEGORIES, NUMERIC_WIDTH, SIMILARITIES, TRIALS, NeuralModel

ID_WIDTH, CONTENT_WIDTH, ATTENTION_HIDDEN, CROSS_RANK = 16, 64, 32, 32
HIDDEN = (96, 48)
HALF_LIFE = 8.0
"""Half-life of the weight of an earlier history item, in items."""


class Tower(nn.Module):
    """Normalised input, cross layers, prediction layers, one logit: the choices that CiUBM's head has."""

    def __init__(
        self, width: int, *, hidden: tuple[int, ...] = HIDDEN, dropout: float = 0.0, cross_layers: int = 0
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.crosses = nn.ModuleList(
            nn.Sequential(nn.Linear(width, CROSS_RANK, bias=False), nn.Linear(CROSS_RANK, width))
            for _ in range(cross_layers)
        )
        self.layers = nn.ModuleList()
        for size in hidden:
            self.layers.append(nn.Sequential(nn.Linear(width, size), nn.PReLU(), nn.Dropout(dropout)))
            width = size
        self.last = nn.Linear(width, 1)

    def hidden(self, input_BX: Tensor) -> list[Tensor]:
        """Outputs of the prediction layers, first to last."""
        outputs = []
        first_BX = hidden_BX = self.norm(input_BX)
        for cross in self.crosses:
            hidden_BX = torch.addcmul(hidden_BX, first_BX, cross(hidden_BX))
        for layer in self.layers:
            hidden_BX = layer(hidden_BX)
            outputs.append(hidden_BX)
        return outputs

    def forward(self, input_BX: Tensor) -> Tensor:
        """Logits, shape (B, 1)."""
        logits_B1: Tensor = self.last(self.hidden(input_BX)[-1])
        return logits_B1


@dataclass(frozen=True)
class Shape:
    """What trials choose of a peer's network, under CiUBM's names."""

    dropout: float = 0.0
    id_dropout: float = 0.0
    cross_layers: int = 0


DEFAULT_SHAPE = Shape()


class PeerNetwork(nn.Module):
    """An id model that peers extend: `extras` gives further inputs of the tower."""

    def __init__(self, *, dense_width: int, extra_width: int, shape: Shape) -> None:
        super().__init__()
        self.id_dropout = shape.id_dropout
        self.id_table = IdTable(1 << 15, ID_WIDTH, admit_after=2)
        self.category_table = nn.Embedding(CATEGORIES, ID_WIDTH)
        nn.init.normal_(self.category_table.weight, std=0.05)
        self.numeric = NumericEmbedding(dense_width, width=NUMERIC_WIDTH)
        self.attention = TargetAttention(ID_WIDTH, 0, ATTENTION_HIDDEN)
        width = 2 * ID_WIDTH + self.numeric.width + extra_width
        self.tower = Tower(width, dropout=shape.dropout, cross_layers=shape.cross_layers)

    def members(self, batch: CtrBatch) -> Tensor:
        """Logits, shape (B, 1)."""
        assert batch.category_U is not None
        hashes_U2 = dropped_ids(batch.hashes_U2, self.id_dropout if self.training else 0.0)
        ids_UE = self.id_table(hashes_U2) + self.category_table(batch.category_U % CATEGORIES)
        target_BE = ids_UE.index_select(0, batch.target_B)
        parts = [target_BE, self.numeric(batch.dense_BF), self.interest(batch, ids_UE, target_BE), *self.extras(batch)]
        logits_B1: Tensor = self.tower(torch.cat(parts, dim=1))
        return logits_B1

    def interest(self, batch: CtrBatch, ids_UE: Tensor, target_BE: Tensor) -> Tensor:
        """Target attention over the ids of the history, shape (B, E)."""
        history_BLE = gathered(ids_UE, batch.history_BL)
        weight_BL = self.attention(batch.history_BL, history_BLE, target_BE)
        return weighted_sum(weight_BL, history_BLE) * length_scale(batch.history_BL > 0)

    def extras(self, batch: CtrBatch) -> list[Tensor]:
        """Further inputs of the tower, shape (B, any) each."""
        return []


class VectorAttention(nn.Module):
    """Target attention over projected content vectors: (target, interest), shape (B, C) each."""

    def __init__(self, vector_width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(vector_width, CONTENT_WIDTH)
        nn.init.orthogonal_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        self.attention = TargetAttention(CONTENT_WIDTH, 0, ATTENTION_HIDDEN)

    def forward(self, batch: CtrBatch) -> tuple[Tensor, Tensor]:
        """Target and interest; items without a vector are zero rows."""
        content_UC = F.normalize(self.projection(batch.vectors_UV), dim=-1) * batch.has_vector_U[:, None]
        target_BC = content_UC.index_select(0, batch.target_B)
        history_BLC = gathered(content_UC, batch.history_BL)
        weight_BL = self.attention(batch.history_BL, history_BLC, target_BC)
        return target_BC, weighted_sum(weight_BL, history_BLC) * length_scale(batch.history_BL > 0)


class VectorDin(PeerNetwork):
    """DIN with content vectors as a second, separately attended field of every item; optionally similarities."""

    def __init__(
        self, *, vector_width: int, dense_width: int, similarities: bool = False, shape: Shape = DEFAULT_SHAPE
    ) -> None:
        extra_width = 2 * CONTENT_WIDTH + (4 if similarities else 0)
        super().__init__(dense_width=dense_width, extra_width=extra_width, shape=shape)
        self.vectors = VectorAttention(vector_width)
        self.similarities = similarities

    def extras(self, batch: CtrBatch) -> list[Tensor]:
        """Target content, content interest, and the four summaries of the stored vectors' cosines."""
        found = list(self.vectors(batch))
        if self.similarities:
            found.append(3 * summaries(*cosines(batch), HALF_LIFE))
        return found


def cosines(batch: CtrBatch) -> tuple[Tensor, Tensor]:
    """Cosine of the stored vectors of target and history, 0 where unknown, and where it is known; both (B, L)."""
    mask_BL = both_held(batch, batch.history_BL, batch.target_B)
    return stored_cosines(batch, batch.history_BL, batch.target_B) * mask_BL, mask_BL


class Din(NeuralModel):
    """DIN over ids alone, as the id-only form of CiUBM."""

    name = "din"
    trials: Sequence[Mapping[str, Any]] = TRIALS
    left_out = SIMILARITIES
    content = False

    @override
    def build(self, settings: Mapping[str, Any], *, vector_width: int, dense_width: int, seed: int) -> nn.Module:
        without_trees = {"trees": TreesConfig(count=0)}
        config = CiUBMConfig(**{"cross_layers": 0, "hidden": HIDDEN, **without_trees, **settings}).without_content()
        return CiUBM(config, vector_width=vector_width, dense_width=dense_width, seed=seed)


class DinVectors(NeuralModel):
    """DIN with content vectors."""

    name = "din-vectors"
    trials: Sequence[Mapping[str, Any]] = TRIALS
    left_out: tuple[str, ...] = SIMILARITIES
    similarities = False

    @override
    def build(self, settings: Mapping[str, Any], *, vector_width: int, dense_width: int, seed: int) -> nn.Module:
        shape = Shape(**settings)
        return VectorDin(
            vector_width=vector_width, dense_width=dense_width, similarities=self.similarities, shape=shape
        )


class DinSimilarities(DinVectors):
    """DIN with content vectors and their similarities."""

    name = "din-vectors-similarities"
    left_out = ()
    similarities = True
