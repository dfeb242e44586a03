"""CiUBM: a click model that fuses what a user's item ids say with what their content says.

Source: MIM (arXiv 2502.00321), content-interest-aware user behaviour model (Fig. 2c); target attention as in DIN
(arXiv 1706.06978); the histogram of similarities as SimTier in arXiv 2407.19467.

Letters: B rows, L history, U distinct items of the batch, E id width, V stored vector width, C content width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import CiUBMConfig


@dataclass(frozen=True)
class CtrBatch:
    """B impressions over U distinct items, whose features stand once each. Item 0 of the U is padding."""

    hashes_U2: Tensor
    """int64: two hashes of each item's id."""
    vectors_UV: Tensor
    """float32: stored unit vectors; zero rows where there is none."""
    has_vector_U: Tensor
    """bool."""
    target_B: Tensor
    """int64 index into U."""
    history_BL: Tensor
    """int64 index into U, newest first; 0 pads."""
    dense_BF: Tensor
    """float32 context features."""


DENSE_FEATURES = 3
"""log of the history's length, whether there is one, whether the target has a vector."""


class CiUBM(nn.Module):
    """Forward only: batch in, logits out. Loss, optimiser and storage are somebody else's."""

    def __init__(self, config: CiUBMConfig, *, vector_width: int, seed: int) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(vector_width)

    def _build(self, vector_width: int) -> None:
        config = self.config
        self.id_table = nn.Embedding(config.id_rows, config.id_width, sparse=True)
        nn.init.normal_(self.id_table.weight, std=0.05)
        if config.uses_content:
            self.projection = nn.Linear(vector_width, config.content_width)
            # near-isometric at the start: similarities mean something before anything was learned
            nn.init.orthogonal_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
            self.projection.requires_grad_(config.refresh_projection)
        width = config.id_width + DENSE_FEATURES
        if config.id_interest:
            extra = 2 if config.content_in_attention else 0
            self.attention = nn.Sequential(
                nn.Linear(4 * config.id_width + extra, config.attention_hidden),
                nn.PReLU(),
                nn.Linear(config.attention_hidden, 1),
            )
            width += config.id_width
        if config.fusion_interest:
            width += config.id_width
        if config.content_interest:
            width += config.content_width
        if config.similarity_features:
            width += 2 * (config.similarity_bins + 4)
        if config.target_content:
            width += config.content_width
        layers: list[nn.Module] = [nn.LayerNorm(width)]
        for size in config.hidden:
            layers += [nn.Linear(width, size), nn.PReLU()]
            width = size
        self.head = nn.Sequential(*layers, nn.Linear(width, 1))

    def content(self, vectors_UV: Tensor, has_vector_U: Tensor) -> Tensor:
        """Projected content of items, unit length, shape (U, C); zero rows for items without a vector."""
        projected_UC = F.normalize(self.projection(vectors_UV), dim=-1)
        return projected_UC * has_vector_U[:, None]

    def forward(self, batch: CtrBatch, content_UC: Tensor | None = None) -> Tensor:
        """Logits, shape (B,). `content_UC` saves a second projection where the caller already has it."""
        config = self.config
        ids_UE = self.id_table(batch.hashes_U2 % config.id_rows).sum(dim=1)
        mask_BL = batch.history_BL > 0
        target_BE = ids_UE.index_select(0, batch.target_B)
        history_BLE = _rows(ids_UE, batch.history_BL)
        parts = [target_BE, batch.dense_BF]
        similarity_BL = raw_BL = None
        if config.uses_content:
            if content_UC is None:
                content_UC = self.content(batch.vectors_UV, batch.has_vector_U)
            history_BLC = _rows(content_UC, batch.history_BL)
            target_BC = content_UC.index_select(0, batch.target_B)
            mask_content_BL = (
                mask_BL & batch.has_vector_U[batch.history_BL] & batch.has_vector_U[batch.target_B][:, None]
            )
            similarity_BL = torch.einsum("blc,bc->bl", history_BLC, target_BC) * mask_content_BL
            raw_BL = (
                torch.einsum("blv,bv->bl", _rows(batch.vectors_UV, batch.history_BL), batch.vectors_UV[batch.target_B])
                * mask_content_BL
            )
        if config.id_interest:
            parts.append(self._id_interest(history_BLE, target_BE, mask_BL, similarity_BL, raw_BL))
        if similarity_BL is not None and raw_BL is not None:
            length_B1 = mask_content_BL.sum(1, keepdim=True).clamp(min=1).float()
            scale_B1 = length_B1.rsqrt()
            if config.fusion_interest:
                parts.append(torch.einsum("bl,ble->be", similarity_BL, history_BLE) * scale_B1)
            if config.content_interest:
                parts.append(torch.einsum("bl,blc->bc", similarity_BL, history_BLC) * scale_B1)
            if config.similarity_features:
                parts.append(self._similarity_features(similarity_BL, mask_content_BL))
                parts.append(self._similarity_features(raw_BL, mask_content_BL))
            if config.target_content:
                parts.append(target_BC)
        logits_B: Tensor = self.head(torch.cat(parts, dim=1)).squeeze(1)
        return logits_B

    def anchor(self, content_UC: Tensor, history_BL: Tensor) -> Tensor:
        """What a user is interested in, target unseen: recency-weighted mean of his content, unit length (B, C)."""
        weight_BL = self._recency(history_BL)
        return F.normalize(torch.einsum("bl,blc->bc", weight_BL, _rows(content_UC, history_BL)), dim=-1)

    def _recency(self, history_BL: Tensor) -> Tensor:
        steps_L = torch.arange(history_BL.shape[1], dtype=torch.float32, device=history_BL.device)
        decay_L = torch.exp2(-steps_L / self.config.recency_half_life_items)
        return decay_L * (history_BL > 0)

    def _id_interest(
        self,
        history_BLE: Tensor,
        target_BE: Tensor,
        mask_BL: Tensor,
        similarity_BL: Tensor | None,
        raw_BL: Tensor | None,
    ) -> Tensor:
        target_BLE = target_BE[:, None, :].expand_as(history_BLE)
        seen = [history_BLE, target_BLE, history_BLE - target_BLE, history_BLE * target_BLE]
        if self.config.content_in_attention and similarity_BL is not None and raw_BL is not None:
            seen += [similarity_BL[..., None], raw_BL[..., None]]
        weight_BL = self.attention(torch.cat(seen, dim=-1)).squeeze(-1) * mask_BL
        scale_B1 = mask_BL.sum(1, keepdim=True).clamp(min=1).float().rsqrt()
        return torch.einsum("bl,ble->be", weight_BL, history_BLE) * scale_B1

    def _similarity_features(self, similarity_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """SimTier counts as log(1 + n), then maximum, mean, recent mean and newest; padding counts nowhere."""
        bins = self.config.similarity_bins
        tier_BL = ((similarity_BL.detach() + 1) / 2 * bins).long().clamp(0, bins - 1)
        counts_BT = torch.zeros(len(tier_BL), bins, device=tier_BL.device)
        counts_BT.scatter_add_(1, tier_BL, mask_BL.float())
        known_B = mask_BL.any(1)
        highest_B = similarity_BL.masked_fill(~mask_BL, -1.0).amax(1) * known_B
        mean_B = similarity_BL.sum(1) / mask_BL.sum(1).clamp(min=1)
        steps_L = torch.arange(similarity_BL.shape[1], dtype=torch.float32, device=similarity_BL.device)
        weight_BL = torch.exp2(-steps_L / self.config.recency_half_life_items) * mask_BL
        recent_B = (similarity_BL * weight_BL).sum(1) / weight_BL.sum(1).clamp(min=1e-6)
        summaries_B4 = torch.stack([highest_B, mean_B, recent_B, similarity_BL[:, 0]], dim=1)
        return torch.cat([torch.log1p(counts_BT), 3 * summaries_B4], dim=1)


def _rows(table_UX: Tensor, places_BL: Tensor) -> Tensor:
    """Rows of a table, shape (B, L, X): on a CPU the gradient of index_select costs half of that of plain indexing."""
    return table_UX.index_select(0, places_BL.reshape(-1)).reshape(*places_BL.shape, -1)
