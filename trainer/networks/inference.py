"""CiUBM as a server runs it: one history for all candidates, nothing kept for a gradient, no interpreter.

The same function of the same weights as `trainer.networks.ciubm`, in the order that costs least where a request has one
user: what a mask does to every pair there is done here to items once, the pieces of a numeric feature are two rows of a
table, and histograms are counted in one go. The whole is traced into one call that does not hold the interpreter, so
that requests of several users overlap.

Letters as in `trainer.networks.ciubm`; K features times pieces, H width of the attention's hidden layer.
"""

from __future__ import annotations

import warnings
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.networks.attention import TargetAttention
from trainer.networks.ciubm import CiUBM, CtrBatch, reached
from trainer.networks.numeric import KNOTS, NumericEmbedding

# deprecated without a successor that runs where there is neither an interpreter to hold nor a compiler
warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)


class CompiledCiUBM:
    """A trained CiUBM for inference: probabilities of B candidates for one user. Thread-safe; shares the weights."""

    def __init__(self, model: CiUBM) -> None:
        with torch.no_grad():
            network, example = _OneUser(model).eval(), _example(model)
            traced = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
            self._call = torch.jit.freeze(traced)
        for _ in range(2):  # the first calls look at what they are called with, and cost more
            with torch.inference_mode():
                self._call(*example)

    def probabilities(self, batch: CtrBatch) -> Tensor:
        """As `CiUBM.probabilities`, shape (B, 1 + K). Raises `ValueError` unless all rows share one history."""
        if len(batch.history_BL) != 1:
            raise ValueError(f"the batch has {len(batch.history_BL)} histories, expected one that all rows share")
        with torch.inference_mode():
            return cast("Tensor", self._call(*_arguments(batch)))


class _OneUser(nn.Module):
    """The forward pass over the arguments of `_arguments`; no shape of the example may stay in what is traced."""

    def __init__(self, model: CiUBM) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        if self.config.numeric_width:
            self.numeric = _NumericTable(model.numeric)
        if self.config.attends:
            self.attention = _Attention(model.attention)
        # a constant of what is traced, as all sizes are
        self.trees = model.trees.trimmed() if self.config.trees.count and model.trees.share else None

    def forward(
        self,
        hashes_U2: Tensor,
        vectors_UV: Tensor,
        has_vector_U: Tensor,
        target_B: Tensor,
        history_L: Tensor,
        dense_BF: Tensor,
        category_U: Tensor,
    ) -> Tensor:
        """Probabilities, shape (B, 1 + K), float64."""
        config, model = self.config, self.model
        ids_UE = model.id_table(hashes_U2)
        if config.categories:
            ids_UE = ids_UE + model.category_table(category_U % config.categories)
        known_L = history_L > 0
        target_BE, history_LE = ids_UE.index_select(0, target_B), ids_UE.index_select(0, history_L)
        dense_BX = self.numeric(dense_BF) if config.numeric_width else dense_BF
        parts = [target_BE, dense_BX] if config.target_id else [dense_BX]
        similarities: list[Tensor] = []
        numbers = [dense_BF]
        if config.uses_content:
            has_U1 = has_vector_U[:, None]
            content_UC = model.content(vectors_UV, has_vector_U)
            target_BC, history_LC = content_UC.index_select(0, target_B), content_UC.index_select(0, history_L)
            held_L = (known_L & has_vector_U.index_select(0, history_L)).float()
            held_B1 = has_U1.index_select(0, target_B).float()
            # items without a vector have a row of zeros, so what is masked is zero already
            similarities.append(target_BC @ (history_LC * held_L[:, None]).T)
            if config.raw_similarities:
                raw_UV = vectors_UV * has_U1
                raw_LV = raw_UV.index_select(0, history_L) * held_L[:, None]
                similarities.append(raw_UV.index_select(0, target_B) @ raw_LV.T)
        if config.attends:
            extra = similarities if config.content_in_attention else []
            attended = (history_LE, target_BE) if config.id_interest else (history_LC, target_BC)
            weight_BL = self.attention(*attended, extra) * (known_L * known_L.sum().clamp(min=1).float().rsqrt())
            if config.id_interest:
                parts.append(weight_BL @ history_LE)
            if config.content_interest:
                parts.append(weight_BL @ history_LC)
        if similarities:
            similarity_BL = similarities[0]
            scale_B1 = torch.where(held_B1 > 0, held_L.sum().clamp(min=1).rsqrt(), 1.0)
            if config.fusion_interest:
                parts.append(similarity_BL @ history_LE * scale_B1)
            weights_L2 = _mean_weights(held_L, config.recency_half_life_items)
            summed = [_summaries(each_BL, held_L, held_B1, weights_L2) for each_BL in similarities]
            numbers += summed[1:]
            if config.similarity_features:
                for each_BL, summed_B4 in zip(similarities, summed, strict=True):
                    parts += [_tiers(each_BL, held_L, held_B1, config.similarity_bins), 3 * summed_B4]
            if config.bilinear_interest:
                learned_BL = model.bilinear(target_BC) @ (history_LC * held_L[:, None]).T
                parts.append(3 * _summaries(learned_BL, held_L, held_B1, weights_L2))
            if config.target_content:
                parts.append(target_BC)
        logits_B, steps_BK = model.head(torch.cat(parts, dim=1))
        if self.trees is not None:
            logits_B = torch.lerp(logits_B, self.trees(torch.cat(numbers, dim=1)), self.trees.share)
        return reached(logits_B, steps_BK)


class _NumericTable(nn.Module):
    """`NumericEmbedding` by looking up the line of the piece that a number lies in."""

    piece_G: Tensor
    first_F: Tensor
    table_KD: Tensor

    def __init__(self, numeric: NumericEmbedding) -> None:
        super().__init__()
        knots = torch.tensor(KNOTS, dtype=torch.float64)
        rise_FTD = numeric.weight_FTD.double()
        begin_FTD = rise_FTD.cumsum(1) - rise_FTD + numeric.bias_FD.double()[:, None]
        slope_FTD = rise_FTD / knots.diff()[:, None]
        at_zero_FTD = begin_FTD - slope_FTD * knots[:-1, None]
        self._width = rise_FTD.shape[2]
        self._ends = float(knots[0]), float(knots[-1])
        self._grid = 1 / float(knots.diff().min())  # every knot is a multiple of the smallest piece
        begins = torch.arange(float(knots[0]), float(knots[-1]) + 1 / self._grid, 1 / self._grid, dtype=torch.float64)
        self._last = len(begins) - 1
        self.register_buffer("piece_G", (torch.searchsorted(knots, begins, right=True) - 1).clamp(max=len(knots) - 2))
        self.register_buffer("first_F", torch.arange(0, rise_FTD.shape[0] * rise_FTD.shape[1], rise_FTD.shape[1]))
        self.register_buffer("table_KD", torch.cat([at_zero_FTD, slope_FTD], dim=2).flatten(0, 1).float())

    def forward(self, dense_BF: Tensor) -> Tensor:
        inside_BF = dense_BF.clamp(*self._ends)
        # what is NaN has a place too, and stays NaN
        place_BF = ((inside_BF - self._ends[0]) * self._grid).long().clamp(0, self._last)
        line_BFD = F.embedding(self.piece_G.take(place_BF) + self.first_F, self.table_KD)
        at_zero_BFD, slope_BFD = torch.split(line_BFD, self._width, dim=2)
        return torch.addcmul(at_zero_BFD, inside_BF[:, :, None], slope_BFD).flatten(1)


class _Attention(nn.Module):
    """`TargetAttention` for one history."""

    item_EH: Tensor
    target_HE: Tensor
    product_EH: Tensor
    extra_XH: Tensor
    bias_H: Tensor
    slope_1: Tensor
    weight_H: Tensor
    last_1: Tensor

    def __init__(self, attention: TargetAttention) -> None:
        super().__init__()
        width = attention.width
        parts = torch.tensor_split(attention.first.weight, [n * width for n in (1, 2, 3, 4)], dim=1)
        of_item_HE, of_target_HE, of_difference_HE, of_product_HE, of_extra_HX = parts
        self.register_buffer("item_EH", (of_item_HE + of_difference_HE).T.contiguous())
        self.register_buffer("target_HE", of_target_HE - of_difference_HE)
        self.register_buffer("product_EH", of_product_HE.T.contiguous())
        self.register_buffer("extra_XH", of_extra_HX.T.contiguous())
        self.register_buffer("bias_H", attention.first.bias)
        self.register_buffer("slope_1", attention.activation.weight)
        self.register_buffer("weight_H", attention.second.weight[0])
        self.register_buffer("last_1", attention.second.bias)

    def forward(self, history_LE: Tensor, target_BE: Tensor, extra: list[Tensor]) -> Tensor:
        matrix_BEH = torch.addcmul(self.item_EH, target_BE[:, :, None], self.product_EH)
        offset_BH = F.linear(target_BE, self.target_HE, self.bias_H)
        hidden_BLH = torch.baddbmm(offset_BH[:, None], history_LE.expand(target_BE.shape[0], -1, -1), matrix_BEH)
        linear_BL = torch.addmm((offset_BH @ self.weight_H)[:, None], matrix_BEH @ self.weight_H, history_LE.T)
        for number, each_BL in enumerate(extra):
            hidden_BLH.addcmul_(each_BL[:, :, None], self.extra_XH[number])
            linear_BL.addcmul_(each_BL, self.extra_XH[number] @ self.weight_H)
        rectified_BL = hidden_BLH.relu_() @ self.weight_H
        return rectified_BL.lerp(linear_BL, self.slope_1) + self.last_1


def _mean_weights(held_L: Tensor, half_life: float) -> Tensor:
    """Columns whose products with similarities are their mean and their recent mean, shape (L, 2)."""
    recent_L = torch.exp2((1 - torch.ones_like(held_L).cumsum(0)) / half_life) * held_L
    return torch.stack([held_L / held_L.sum().clamp(min=1), recent_L / recent_L.sum().clamp(min=1e-6)], dim=1)


def _summaries(each_BL: Tensor, held_L: Tensor, held_B1: Tensor, weights_L2: Tensor) -> Tensor:
    """`trainer.networks.ciubm.summaries`."""
    highest_B1 = (each_BL + (held_L - 1) * 4).amax(1, keepdim=True) * (held_B1 * held_L.amax())
    return torch.cat([highest_B1, each_BL @ weights_L2, each_BL[:, :1]], dim=1)


def _tiers(each_BL: Tensor, held_L: Tensor, held_B1: Tensor, bins: int) -> Tensor:
    """`trainer.networks.ciubm.tiers`."""
    tier_BL = ((each_BL + 1) * (bins / 2)).long().clamp(0, bins - 1)
    rows = each_BL.shape[0]
    first_B1 = torch.arange(0, rows * bins, bins)[:, None]
    counts = torch.bincount((tier_BL + first_B1).flatten(), held_L.expand_as(each_BL).flatten(), minlength=rows * bins)
    return torch.log1p(counts.float().reshape(-1, bins)) * held_B1


def _arguments(batch: CtrBatch) -> tuple[Tensor, ...]:
    category_U = batch.category_U
    if category_U is None:
        category_U = torch.zeros(len(batch.hashes_U2), dtype=torch.int64)
    return (
        batch.hashes_U2,
        batch.vectors_UV,
        batch.has_vector_U,
        batch.target_B,
        batch.history_BL[0],
        batch.dense_BF,
        category_U,
    )


def _example(model: CiUBM) -> tuple[Tensor, ...]:
    """Two candidates and a history of two."""
    width = model.projection.in_features if model.config.uses_content else 1
    return _arguments(
        CtrBatch(
            hashes_U2=torch.ones(5, 2, dtype=torch.int64),
            vectors_UV=torch.ones(5, width),
            has_vector_U=torch.ones(5, dtype=torch.bool),
            target_B=torch.arange(1, 3),
            history_BL=torch.arange(3, 5)[None],
            dense_BF=torch.ones(2, model.dense_width),
        )
    )
