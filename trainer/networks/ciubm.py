"""CiUBM: a click model over the item ids and the item content of a user's history.

Source: MIM (arXiv 2502.00321), content-interest-aware user behaviour model (Fig. 2c); target attention as in DIN
(arXiv 1706.06978); the histogram of similarities as SimTier in arXiv 2407.19467.

Letters: B rows, L history, U distinct items of the batch, E id width, V stored vector width, C content width.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        if config.attends:
            extra = config.content_in_attention * (1 + config.raw_similarities)
            attended = config.id_width if config.id_interest else config.content_width
            self.attention = TargetAttention(attended, extra, config.attention_hidden)
            width += config.id_width * config.id_interest + config.content_width * config.content_interest
        if config.fusion_interest:
            width += config.id_width
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
        if config.uses_content:  # last: what the other parts are drawn as does not depend on it
            self.interest = nn.Linear(vector_width, config.content_width)
            nn.init.orthogonal_(self.interest.weight)
            nn.init.zeros_(self.interest.bias)

    @property
    def _counts_cosines(self) -> bool:
        return self.config.uses_content and self.config.raw_similarities

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """`load_state_dict`; weights of an earlier build had no space of interest, and keep this one's."""
        own = {name: one for name, one in self.state_dict().items() if name.startswith("interest.")}
        self.load_state_dict({**own, **weights})

    def content(self, vectors_UV: Tensor, has_vector_U: Tensor) -> Tensor:
        """Projected content of items, unit length, shape (U, C); zero rows for items without a vector."""
        projected_UC = F.normalize(self.projection(vectors_UV), dim=-1)
        return projected_UC * has_vector_U[:, None]

    def forward(self, batch: CtrBatch, content_UC: Tensor | None = None) -> Tensor:
        """Logits as they are served, shape (B,): the network's, averaged with those of the trees once there are any."""
        logits_B, numbers_BX, _ = self.network(batch, content_UC)
        return self.served(logits_B, numbers_BX)

    def probabilities(self, batch: CtrBatch) -> Tensor:
        """What is served, float64, shape (B, 1 + K): whether it is taken, and the further outputs of `kinds`."""
        logits_B, numbers_BX, steps_BK = self.network(batch)
        return reached(self.served(logits_B, numbers_BX), steps_BK)

    def served(self, logits_B: Tensor, numbers_BX: Tensor) -> Tensor:
        """`forward`, from the output of `network`."""
        return self.trees.mixed(logits_B, numbers_BX) if self.config.trees.count else logits_B

    def network(self, batch: CtrBatch, content_UC: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The network's own logits, shape (B,); what the trees read, shape (B, X): the dense features and summaries of
        the stored vectors' cosines; and the logits from each of the `kinds` to the next, shape (B, K). `content_UC` is
        the output of `content`, where the caller has it already.
        """
        config = self.config
        ids_UE = self.id_table(dropped_ids(batch.hashes_U2, config.id_dropout if self.training else 0.0))
        if config.categories and batch.category_U is not None:
            # an item without a row of its own still has its category's
            ids_UE = ids_UE + self.category_table(batch.category_U % config.categories)
        if config.uses_content and content_UC is None:
            content_UC = self.content(batch.vectors_UV, batch.has_vector_U)
        dense_BX = self.numeric(batch.dense_BF) if config.numeric_width else batch.dense_BF
        interests_BX, cosines_BX = _together(
            [
                (rows, self._interests(batch, ids_UE, content_UC, history_BL, target_B))
                for rows, history_BL, target_B in by_length(batch.history_BL, batch.target_B)
            ]
        )
        parts = [dense_BX, interests_BX]
        if config.target_id:
            parts.insert(0, ids_UE.index_select(0, batch.target_B))
        if config.target_content and content_UC is not None:
            parts.append(content_UC.index_select(0, batch.target_B))
        logits_B, steps_BK = self.head(torch.cat(parts, dim=1))
        return logits_B, torch.cat([batch.dense_BF, cosines_BX], dim=1).detach(), steps_BK

    def numbers(self, batch: CtrBatch) -> Tensor:
        """What the trees read, as `network` returns it, without a network."""
        if not self._counts_cosines:
            return batch.dense_BF
        mask_BL = both_held(batch, batch.history_BL, batch.target_B)
        cosine_BL = stored_cosines(batch, batch.history_BL, batch.target_B) * mask_BL
        summed_B4 = summaries(cosine_BL, mask_BL, self.config.recency_half_life_items)
        return torch.cat([batch.dense_BF, summed_B4], dim=1)

    def _interests(
        self, batch: CtrBatch, ids_UE: Tensor, content_UC: Tensor | None, history_BL: Tensor, target_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the head reads of the histories, shape (B, any), and the summaries of cosines, (B, 4) or (B, 0)."""
        config = self.config
        mask_BL = history_BL > 0
        history_BLE = gathered(ids_UE, history_BL)
        target_BE = ids_UE.index_select(0, target_B)
        parts: list[Tensor] = []
        nothing_BX = batch.dense_BF.new_empty(len(target_B), 0)
        if content_UC is None:
            if config.id_interest:
                weight_BL = self.attention(history_BL, history_BLE, target_BE)
                parts.append(weighted_sum(weight_BL, history_BLE) * length_scale(mask_BL))
            return torch.cat([*parts, nothing_BX], dim=1), nothing_BX
        history_BLC = gathered(content_UC, history_BL)
        target_BC = content_UC.index_select(0, target_B)
        mask_content_BL = both_held(batch, history_BL, target_B)
        similarities = [dots(history_BLC, target_BC) * mask_content_BL]
        if config.raw_similarities:
            similarities.append(stored_cosines(batch, history_BL, target_B) * mask_content_BL)
        summed = [summaries(each_BL, mask_content_BL, config.recency_half_life_items) for each_BL in similarities]
        if config.attends:
            extra = similarities if config.content_in_attention else ()
            attended = (history_BLE, target_BE) if config.id_interest else (history_BLC, target_BC)
            weight_BL = self.attention(history_BL, *attended, extra)
            # items without a vector have a row of zeros
            wanted = ((config.id_interest, history_BLE), (config.content_interest, history_BLC))
            scale_B1 = length_scale(mask_BL)
            parts += [weighted_sum(weight_BL, each) * scale_B1 for want, each in wanted if want]
        if config.fusion_interest:
            parts.append(weighted_sum(similarities[0], history_BLE) * length_scale(mask_content_BL))
        if config.similarity_features:
            for each_BL, summed_B4 in zip(similarities, summed, strict=True):
                parts += [tiers(each_BL, mask_content_BL, config.similarity_bins), 3 * summed_B4]
        if config.bilinear_interest:
            learned_BL = dots(history_BLC, self.bilinear(target_BC)) * mask_content_BL
            parts.append(3 * summaries(learned_BL, mask_content_BL, config.recency_half_life_items))
        return torch.cat([*parts, nothing_BX], dim=1), torch.cat([nothing_BX, *summed[1:]], dim=1)

    def members(self, batch: CtrBatch) -> Tensor:
        """Logits of the only member, shape (B, 1), as models of the comparison have several: the network's own ones in
        training, for the trees learn by themselves.
        """
        logits_B: Tensor = self.network(batch)[0] if self.training else self(batch)
        return logits_B[:, None]

    def interest_space(self, vectors_XV: Tensor, has_vector_X: Tensor) -> Tensor:
        """Items where the contrastive term compares them, unit length, shape (..., C); zero rows without a vector.

        A space of its own: in the one that the click loss projects into the term costs GAUC.
        """
        return F.normalize(self.interest(vectors_XV), dim=-1) * has_vector_X[..., None]

    def anchor(self, batch: CtrBatch, rows_P: Tensor) -> Tensor:
        """Interests of users without a target, unit length (P, C): the recency-weighted mean of the stored vectors of a
        history, placed in that space.
        """
        history_PL = batch.history_BL[rows_P]
        # the mean before the projection: one row to project per user, where a history has fifty
        mean_PV = F.embedding_bag(
            history_PL,
            batch.vectors_UV,
            per_sample_weights=_recency(history_PL, self.config.recency_half_life_items).expand_as(history_PL),
            mode="sum",
            padding_idx=0,
        )
        return self.interest_space(F.normalize(mean_PV, dim=-1), mean_PV.any(1))


class Head(nn.Module):
    """From the concatenated interests to logits. Without the input LayerNorm the network does not train."""

    def __init__(self, config: CiUBMConfig, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.kinds = len(config.kinds)
        layers: list[nn.Module] = [CrossLayers(width, layers=config.cross_layers, rank=config.cross_rank)]
        for size in config.hidden:
            layers += [nn.Linear(width, size), nn.PReLU(), nn.Dropout(config.dropout)]
            width = size
        self.network = nn.Sequential(*layers, nn.Linear(width, 1 + self.kinds))

    def forward(self, input_BX: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of a take, shape (B,), and of each further kind given the one before, shape (B, K)."""
        logits_BO = self.network(self.norm(input_BX))
        return logits_BO[:, 0], logits_BO[:, 1:]


def reached(logits_B: Tensor, steps_BK: Tensor) -> Tensor:
    """Probabilities as `trainer.networks.losses.log_reached` has them, and that of `logits_B` first, (B, 1 + K)."""
    return torch.sigmoid(torch.cat([logits_B[:, None], steps_BK], dim=1).double()).cumprod(1)


_PIECES = 3
_WORTH = 0.75
"""Share of the padded histories that the pieces may have at most; each costs the overhead of its operations."""


def by_length(history_BL: Tensor, target_B: Tensor) -> list[tuple[Tensor | None, Tensor, Tensor]]:
    """Rows in pieces of similar length of history, each as wide as its longest: (row numbers, histories, targets).

    A batch of a stream has the longest history and many short ones, and what a pair costs is paid for padding too. All
    rows are one piece, without numbers, where pieces save little.
    """
    whole: list[tuple[Tensor | None, Tensor, Tensor]] = [(None, history_BL, target_B)]
    if len(history_BL) != len(target_B) or len(history_BL) < 2 * _PIECES:
        return whole
    length_B = (history_BL > 0).sum(1)
    pieces = length_B.argsort(stable=True).tensor_split(_PIECES)
    widths = [max(1, int(length_B[rows[-1]])) for rows in pieces]
    if sum(len(rows) * width for rows, width in zip(pieces, widths, strict=True)) > _WORTH * history_BL.numel():
        return whole
    return [(rows, history_BL[rows, :width], target_B[rows]) for rows, width in zip(pieces, widths, strict=True)]


def _together(pieces: list[tuple[Tensor | None, tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """The columns of all pieces in the order of the batch."""
    if len(pieces) == 1:
        return pieces[0][1]
    place_B = torch.cat([rows for rows, _ in pieces if rows is not None]).argsort()
    first, second = (
        torch.cat(columns).index_select(0, place_B) for columns in zip(*(found for _, found in pieces), strict=True)
    )
    return first, second


def both_held(batch: CtrBatch, history_BL: Tensor, target_B: Tensor) -> Tensor:
    """Whether history item and target have a vector, shape (B, L); False at padding."""
    return (history_BL > 0) & batch.has_vector_U[history_BL] & batch.has_vector_U[target_B][:, None]


def stored_cosines(batch: CtrBatch, history_BL: Tensor, target_B: Tensor) -> Tensor:
    """Cosines of the stored vectors of history items and target, shape (B, L)."""
    return dots(gathered(batch.vectors_UV, history_BL), batch.vectors_UV.index_select(0, target_B))


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
