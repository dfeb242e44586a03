"""CiUBM: a click model over the item ids and the item content of a user's history.

Source: MIM (arXiv 2502.00321), content-interest-aware user behaviour model (Fig. 2c); target attention as in DIN
(arXiv 1706.06978); the histogram of similarities as SimTier in arXiv 2407.19467.

Letters: B rows, L history, U distinct items of the batch, E id width, V stored vector width, C content width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.features.config import FeatureConfig
from trainer.networks.attention import TargetAttention
from trainer.networks.config import CiUBMConfig
from trainer.networks.id_table import IdTable
from trainer.networks.numeric import CrossLayers, NumericEmbedding
from trainer.networks.trees import BoostedTrees


@dataclass(frozen=True)
class CtrBatch:
    """B impressions over U distinct items, each with one row of features. Item 0 of the U is padding."""

    hashes_U2: Tensor
    """int64: two hashes of each item's id."""
    vectors_UV: Tensor
    """float32: stored unit vectors; zero rows where there is none."""
    has_vector_U: Tensor
    """bool."""
    target_B: Tensor
    """int64 index into U."""
    history_BL: Tensor
    """int64 index into U, newest first; 0 pads. A single row is the history of all B, and the user's side is computed
    once."""
    dense_BF: Tensor
    """float32 context features, as many as the model was built for."""
    category_U: Tensor | None = None
    """int64 hash of each item's category, 0 unknown; for models with a table of categories."""

    def to(self, device: torch.device) -> CtrBatch:
        """A copy on another device."""
        columns = {
            one.name: column.to(device, non_blocking=True)
            for one in fields(self)
            if (column := getattr(self, one.name)) is not None
        }
        return CtrBatch(**columns)


DENSE_FEATURES = 1 + len(FeatureConfig().names)
"""The features of the moment under the default settings, and whether the target has a vector."""


class CiUBM(nn.Module):
    """The forward pass: a batch to logits. `Learner` adds loss and optimiser."""

    def __init__(self, config: CiUBMConfig, *, vector_width: int, seed: int, dense_width: int = DENSE_FEATURES) -> None:
        super().__init__()
        self.config = config
        self.dense_width = dense_width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(vector_width, dense_width)

    def _build(self, vector_width: int, dense_width: int) -> None:
        config = self.config
        self.id_table = IdTable(config.id_rows, config.id_width, admit_after=config.id_admit_after)
        if config.categories:
            self.category_table = nn.Embedding(config.categories, config.id_width)
            nn.init.normal_(self.category_table.weight, std=0.05)
        if config.uses_content:
            self.projection = nn.Linear(vector_width, config.content_width)
            # near-isometric at the start: similarities are meaningful before training
            nn.init.orthogonal_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
            self.projection.requires_grad_(config.refresh_projection)
        width = config.id_width if config.target_id else 0
        if config.numeric_width:
            self.numeric = NumericEmbedding(dense_width, width=config.numeric_width)
            width += self.numeric.width
        else:
            width += dense_width
        extra = config.content_in_attention * (1 + config.raw_similarities)
        if config.id_interest:
            self.attention = TargetAttention(config.id_width, extra, config.attention_hidden)
            width += config.id_width
        if config.fusion_interest:
            width += config.id_width
        if config.content_interest:
            self.content_attention = TargetAttention(config.content_width, extra, config.attention_hidden)
            width += config.content_width
        if config.similarity_features:
            width += (1 + config.raw_similarities) * (config.similarity_bins + 4)
        if config.bilinear_interest:
            self.bilinear = nn.Linear(config.content_width, config.content_width, bias=False)
            nn.init.eye_(self.bilinear.weight)
            width += 4
        if config.target_content:
            width += config.content_width
        self.head = Head(config, width)
        self.numbers_width = dense_width + 4 * self._counts_cosines
        if config.trees.count:
            self.trees = BoostedTrees(config.trees.count, config.trees.depth)

    @property
    def _counts_cosines(self) -> bool:
        return self.config.uses_content and self.config.raw_similarities

    def content(self, vectors_UV: Tensor, has_vector_U: Tensor) -> Tensor:
        """Projected content of items, unit length, shape (U, C); zero rows for items without a vector."""
        projected_UC = F.normalize(self.projection(vectors_UV), dim=-1)
        return projected_UC * has_vector_U[:, None]

    def forward(self, batch: CtrBatch, content_UC: Tensor | None = None) -> Tensor:
        """Logits as they are served, shape (B,): the network's, averaged with those of the trees once there are any."""
        return self.served(*self.network(batch, content_UC))

    def served(self, logits_B: Tensor, numbers_BX: Tensor) -> Tensor:
        """`forward`, from the output of `network`."""
        return self.trees.mixed(logits_B, numbers_BX) if self.config.trees.count else logits_B

    def network(self, batch: CtrBatch, content_UC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The network's own logits, shape (B,), and what the trees read, shape (B, X): the dense features and summaries
        of the stored vectors' cosines. `content_UC` is the output of `content`, where the caller has it already.
        """
        config = self.config
        ids_UE = self.id_table(dropped_ids(batch.hashes_U2, config.id_dropout if self.training else 0.0))
        if config.categories and batch.category_U is not None:
            # an item without a row of its own still has its category's
            ids_UE = ids_UE + self.category_table(batch.category_U % config.categories)
        mask_BL = batch.history_BL > 0
        target_BE = ids_UE.index_select(0, batch.target_B)
        history_BLE = gathered(ids_UE, batch.history_BL)
        dense_BX = self.numeric(batch.dense_BF) if config.numeric_width else batch.dense_BF
        parts = [target_BE, dense_BX] if config.target_id else [dense_BX]
        numbers = [batch.dense_BF]
        similarity_BL = raw_BL = None
        if config.uses_content:
            if content_UC is None:
                content_UC = self.content(batch.vectors_UV, batch.has_vector_U)
            history_BLC = gathered(content_UC, batch.history_BL)
            target_BC = content_UC.index_select(0, batch.target_B)
            mask_content_BL = (
                mask_BL & batch.has_vector_U[batch.history_BL] & batch.has_vector_U[batch.target_B][:, None]
            )
            similarity_BL = dots(history_BLC, target_BC) * mask_content_BL
            if config.raw_similarities:
                raw_BL = dots(gathered(batch.vectors_UV, batch.history_BL), batch.vectors_UV[batch.target_B])
                raw_BL = raw_BL * mask_content_BL
                numbers.append(summaries(raw_BL, mask_content_BL, config.recency_half_life_items))
        extra = [each for each in (similarity_BL, raw_BL) if each is not None and config.content_in_attention]
        if config.id_interest:
            weight_BL = self.attention(batch.history_BL, history_BLE, target_BE, extra)
            parts.append(weighted_sum(weight_BL, history_BLE) * length_scale(mask_BL))
        if similarity_BL is not None:
            scale_B1 = length_scale(mask_content_BL)
            if config.fusion_interest:
                parts.append(weighted_sum(similarity_BL, history_BLE) * scale_B1)
            if config.content_interest:
                # items without a vector have a row of zeros
                weight_BL = self.content_attention(batch.history_BL, history_BLC, target_BC, extra)
                parts.append(weighted_sum(weight_BL, history_BLC) * length_scale(mask_BL))
            if config.similarity_features:
                parts.append(tiers(similarity_BL, mask_content_BL, config.similarity_bins))
                parts.append(3 * summaries(similarity_BL, mask_content_BL, config.recency_half_life_items))
                if raw_BL is not None:
                    parts += [tiers(raw_BL, mask_content_BL, config.similarity_bins), 3 * numbers[-1]]
            if config.bilinear_interest:
                learned_BL = dots(history_BLC, self.bilinear(target_BC)) * mask_content_BL
                parts.append(3 * summaries(learned_BL, mask_content_BL, config.recency_half_life_items))
            if config.target_content:
                parts.append(target_BC)
        logits_B: Tensor = self.head(torch.cat(parts, dim=1))
        return logits_B, torch.cat(numbers, dim=1).detach()

    def members(self, batch: CtrBatch) -> Tensor:
        """Logits of the only member, shape (B, 1), as models of the comparison have several: the network's own ones in
        training, for the trees learn by themselves.
        """
        logits_B: Tensor = self.network(batch)[0] if self.training else self(batch)
        return logits_B[:, None]

    def anchor(self, content_UC: Tensor, history_BL: Tensor) -> Tensor:
        """A user's interest without a target: recency-weighted mean of their content, unit length (B, C)."""
        weight_BL = _recency(history_BL, self.config.recency_half_life_items) * (history_BL > 0)
        return F.normalize(weighted_sum(weight_BL, gathered(content_UC, history_BL)), dim=-1)


class Head(nn.Module):
    """From the concatenated interests to logits. Without the input LayerNorm the network does not train."""

    def __init__(self, config: CiUBMConfig, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        layers: list[nn.Module] = [CrossLayers(width, layers=config.cross_layers, rank=config.cross_rank)]
        for size in config.hidden:
            layers += [nn.Linear(width, size), nn.PReLU(), nn.Dropout(config.dropout)]
            width = size
        self.network = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, input_BX: Tensor) -> Tensor:
        """Logits, shape (B,)."""
        logits_B: Tensor = self.network(self.norm(input_BX)).squeeze(1)
        return logits_B


def dots(history_BLX: Tensor, target_BX: Tensor) -> Tensor:
    """Inner product of each history row with its target, shape (B, L); a single history is shared by all targets."""
    if len(history_BLX) == 1:
        return target_BX @ history_BLX[0].T
    return torch.bmm(history_BLX, target_BX[:, :, None]).squeeze(2)


def dropped_ids(hashes_U2: Tensor, share: float) -> Tensor:
    """The hashes with this share of the items treated as new: no id has zero hashes, so they read the shared row.

    Source: DropoutNet (Volkovs et al., NeurIPS 2017).
    """
    if not share:
        return hashes_U2
    dropped_U = torch.rand(len(hashes_U2), device=hashes_U2.device) < share
    return hashes_U2.masked_fill(dropped_U[:, None], 0)


def weighted_sum(weight_BL: Tensor, history_BLX: Tensor) -> Tensor:
    """Weighted sum over the history, shape (B, X); a single history is shared by all rows."""
    if len(history_BLX) == 1:
        return weight_BL @ history_BLX[0]
    return torch.bmm(weight_BL[:, None], history_BLX).squeeze(1)


def tiers(similarity_BL: Tensor, mask_BL: Tensor, bins: int) -> Tensor:
    """SimTier: log(1 + n) of the similarities in each of `bins` equal bins over [-1, 1], shape (B, bins).

    Padding is masked; it would be counted in a bin otherwise. Source: arXiv 2407.19467.
    """
    tier_BL = ((similarity_BL.detach() + 1) / 2 * bins).long().clamp(0, bins - 1)
    counts_BT = torch.zeros(len(tier_BL), bins, device=tier_BL.device)
    return torch.log1p(counts_BT.scatter_add_(1, tier_BL, mask_BL.float()))


def summaries(similarity_BL: Tensor, mask_BL: Tensor, half_life: float) -> Tensor:
    """Maximum, mean, recent mean and newest, shape (B, 4), without padding. `half_life` is in items."""
    highest_B = similarity_BL.masked_fill(~mask_BL, -1.0).amax(1) * mask_BL.any(1)
    mean_B = similarity_BL.sum(1) / mask_BL.sum(1).clamp(min=1)
    weight_BL = _recency(similarity_BL, half_life) * mask_BL
    recent_B = (similarity_BL * weight_BL).sum(1) / weight_BL.sum(1).clamp(min=1e-6)
    return torch.stack([highest_B, mean_B, recent_B, similarity_BL[:, 0]], dim=1)


def _recency(like_BL: Tensor, half_life: float) -> Tensor:
    """Weights of history items by age in items, shape (L,)."""
    steps_L = torch.arange(like_BL.shape[1], dtype=torch.float32, device=like_BL.device)
    return torch.exp2(-steps_L / half_life)


def length_scale(mask_BL: Tensor) -> Tensor:
    """One over the root of the history's length, so that sums of few and of many items are comparable."""
    return mask_BL.sum(1, keepdim=True).clamp(min=1).float().rsqrt()


def gathered(table_UX: Tensor, places_BL: Tensor) -> Tensor:
    """Rows of a table, shape (B, L, X). On a CPU the gradient of index_select costs half of that of indexing."""
    return table_UX.index_select(0, places_BL.reshape(-1)).reshape(*places_BL.shape, -1)
