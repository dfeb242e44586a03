"""The trained part of an encoder: heads F_V and F_L over tower features, and their fusion into the item embedding.

Source: MIM (arXiv 2502.00321), figure 2b; tensor fusion after Zadeh et al. (arXiv 1707.07250).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from encoders.features import ItemFeatures
from encoders.fusion_config import FusionConfig

# N = items, T and I = widths of the tower features, R = principal components, S = spline columns, D = embedding width


@dataclass(frozen=True, eq=False)
class FusionInput:
    """Features of N items, reduced to their principal components: the input of every pass."""

    text_NR: Tensor
    image_NR: Tensor
    has_text_N: Tensor
    has_image_N: Tensor
    category_N2: Tensor
    spline_NS: Tensor
    """Year and price, interpolated between knots, each with a column for whether it is known."""
    words_NA: Tensor
    """Hashes of the values of further attributes; -1 pads."""

    def __len__(self) -> int:
        return len(self.has_text_N)

    @staticmethod
    def concatenate(parts: Sequence[FusionInput]) -> FusionInput:
        """Several inputs as one."""
        return FusionInput(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(FusionInput)))

    def select(self, rows: Tensor) -> FusionInput:
        """These rows, in this order."""
        return FusionInput(*(getattr(self, f.name)[rows] for f in fields(FusionInput)))


class ItemSource(Protocol):
    """Items by number: a frozen `FusionInput`, or trained towers (`encoders.tuning.TunedItems`)."""

    @property
    def has_text_N(self) -> Tensor:  # noqa: N802
        """Which items have text."""
        ...

    @property
    def has_image_N(self) -> Tensor:  # noqa: N802
        """Which items have a picture."""
        ...

    @property
    def category_N2(self) -> Tensor:  # noqa: N802
        """Two hashes of each category; -1 where there is none."""
        ...

    def __len__(self) -> int: ...

    def select(self, rows: Tensor) -> FusionInput:
        """These rows, in this order."""
        ...


@dataclass(frozen=True, eq=False)
class Views:
    """Unit rows of N items: v from the picture, t from the title, m from everything. A missing one is a zero row."""

    image_ND: Tensor
    title_ND: Tensor
    fused_ND: Tensor


class ItemFusion(nn.Module):
    """Frozen features to item embeddings.

    Text and picture features are scaled to unit length, centred and rotated to their principal components, so that the
    untrained heads keep the geometry of the towers. A missing picture or title has a learned row, trained by hiding
    modalities. Outputs are centred by a running mean, then scaled to unit length; without centring they form a cone.
    """

    text_mean_T: Tensor
    text_basis_TR: Tensor
    image_mean_I: Tensor
    image_basis_IR: Tensor
    year_knots_K: Tensor
    price_knots_K: Tensor
    means_3D: Tensor

    def __init__(self, config: FusionConfig, *, text_width: int, image_width: int) -> None:
        super().__init__()
        self.config = config
        self.text_width, self.image_width = text_width, image_width
        width = config.width
        text_rank, image_rank = min(config.text_rank, text_width), min(config.image_rank, image_width)
        self.register_buffer("text_mean_T", torch.zeros(text_width))
        self.register_buffer("text_basis_TR", torch.eye(text_width, text_rank))
        self.register_buffer("image_mean_I", torch.zeros(image_width))
        self.register_buffer("image_basis_IR", torch.eye(image_width, image_rank))
        self.register_buffer("year_knots_K", torch.linspace(1900.0, 2030.0, config.knots))
        self.register_buffer("price_knots_K", torch.linspace(0.0, 10.0, config.knots))
        self.register_buffer("means_3D", torch.zeros(3, width))
        self.text_head = nn.Linear(text_rank, width)
        self.image_head = nn.Linear(image_rank, width)
        self.no_text_D = nn.Parameter(torch.zeros(width))
        self.no_image_D = nn.Parameter(torch.zeros(width))
        self.text_in = nn.Linear(width, width, bias=False)
        self.image_in = nn.Linear(width, width, bias=False)
        self.category_table = nn.Embedding(config.category_rows, config.category_width)
        attributes = config.category_width + 2 * (config.knots + 1)
        if config.attribute_rows:
            self.word_table = nn.Embedding(config.attribute_rows, config.attribute_width)
            attributes += config.attribute_width
        self.attributes = nn.Linear(attributes, width, bias=False)
        if config.kind == "gated":
            self.gate = nn.Linear(2 * width + attributes, width)
        elif config.kind == "tensor":
            small = config.tensor_width
            self.text_small = nn.Linear(width, small)
            self.image_small = nn.Linear(width, small)
            self.outer = nn.Linear((small + 1) ** 2, width, bias=False)
        if config.hidden:
            self.mix_in = nn.Linear(2 * width + attributes, config.hidden)
            self.mix_out = nn.Linear(config.hidden, width, bias=False)
        self._initialise()

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self.config.width

    @torch.no_grad()
    def _initialise(self) -> None:
        for head in (self.text_head, self.image_head):
            nn.init.eye_(head.weight)
            nn.init.zeros_(head.bias)
        # the leading components of both sides alternate, so that any prefix of the vector contains both
        width = self.config.width
        for start, layer in enumerate((self.text_in, self.image_in)):
            nn.init.zeros_(layer.weight)
            rows = torch.arange(start, width, 2)
            layer.weight[rows, torch.arange(len(rows))] = 1.0
        nn.init.normal_(self.category_table.weight, std=0.3)
        if self.config.attribute_rows:
            nn.init.normal_(self.word_table.weight, std=0.3)
        nn.init.zeros_(self.attributes.weight)
        if self.config.kind == "gated":
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
        elif self.config.kind == "tensor":
            nn.init.zeros_(self.outer.weight)
        if self.config.hidden:
            nn.init.zeros_(self.mix_out.weight)

    @torch.no_grad()
    def fit(self, features: ItemFeatures) -> None:
        """Fit principal components, knots and means on a catalogue, the start of training."""
        for rows, known, mean_buffer, basis in (
            (features.text_NT, features.has_text_N, self.text_mean_T, self.text_basis_TR),
            (features.image_NI, features.has_image_N, self.image_mean_I, self.image_basis_IR),
        ):
            if known.sum() < 2:
                continue
            data = F.normalize(torch.from_numpy(np.ascontiguousarray(rows[known])).double(), dim=1)
            mean = data.mean(0)
            centred = data - mean
            values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
            leading = vectors.flip(1)[:, : basis.shape[1]]  # eigh sorts upwards
            # signs are fixed so that the same catalogue always gives the same basis
            signs = leading.gather(0, leading.abs().argmax(0, keepdim=True)).sign()
            scale = values.clamp_min(0).flip(0)[: basis.shape[1]].sum().clamp_min(1e-12).rsqrt()
            basis.copy_((leading * signs * scale).to(basis))
            mean_buffer.copy_(mean.to(mean_buffer))
        for knots, values_N in (
            (self.year_knots_K, features.year_N),
            (self.price_knots_K, _log_price(features.price_N)),
        ):
            known_values = values_N[np.isfinite(values_N)]
            if len(known_values):
                knots.copy_(torch.from_numpy(_knots(known_values, len(knots))))
        self.centre_on(self.prepare(features))

    @torch.no_grad()
    def prepare(self, features: ItemFeatures) -> FusionInput:
        """The fixed part of the pass, which can be cached: principal components and interpolated attributes."""
        device = self.means_3D.device
        text_NR = self.text_components(torch.from_numpy(features.text_NT).to(device))
        image_NR = self.image_components(torch.from_numpy(features.image_NI).to(device))
        has_text = torch.from_numpy(features.has_text_N).to(device)
        has_image = torch.from_numpy(features.has_image_N).to(device)
        category = torch.from_numpy(features.category_N2).to(device)
        if not self.config.category:
            category = torch.full_like(category, -1)
        splines = [
            _spline(torch.from_numpy(values if used else np.full_like(values, np.nan)).to(device), knots)
            for values, knots, used in (
                (features.year_N, self.year_knots_K, self.config.year),
                (_log_price(features.price_N), self.price_knots_K, self.config.price),
            )
        ]
        return FusionInput(
            text_NR=text_NR * has_text[:, None],
            image_NR=image_NR * has_image[:, None],
            has_text_N=has_text,
            has_image_N=has_image,
            category_N2=category,
            spline_NS=torch.cat(splines, 1),
            words_NA=torch.from_numpy(features.words_NA).to(device),
        )

    def text_components(self, text_NT: Tensor) -> Tensor:
        """(N, R) principal components of features of the text tower."""
        return (F.normalize(text_NT, dim=1) - self.text_mean_T) @ self.text_basis_TR

    def image_components(self, image_NI: Tensor) -> Tensor:
        """(N, R) principal components of features of the image tower."""
        return (F.normalize(image_NI, dim=1) - self.image_mean_I) @ self.image_basis_IR

    def raw(
        self, items: FusionInput, *, drop_text_N: Tensor | None = None, drop_image_N: Tensor | None = None
    ) -> Tensor:
        """(3, N, D) picture, title and fused rows before centring; `drop_*` hides a present modality."""
        has_text = items.has_text_N if drop_text_N is None else items.has_text_N & ~drop_text_N
        has_image = items.has_image_N if drop_image_N is None else items.has_image_N & ~drop_image_N
        title = torch.where(has_text[:, None], self.text_head(items.text_NR), self.no_text_D)
        image = torch.where(has_image[:, None], self.image_head(items.image_NR), self.no_image_D)
        known = [self._categories(items.category_N2), items.spline_NS]
        if self.config.attribute_rows:
            known.append(self._words(items.words_NA))
        attributes = torch.cat(known, 1)
        title_side, image_side = self.text_in(title), self.image_in(image)
        config = self.config
        if config.kind == "mean":
            return torch.stack([image, title, title_side + image_side])
        joined = torch.cat([title, image, attributes], 1)
        if config.kind == "gated":
            gate = torch.sigmoid(self.gate(joined))
            fused = 2 * (gate * title_side + (1 - gate) * image_side)
        else:
            small_t = F.pad(self.text_small(title), (0, 1), value=1.0)
            small_v = F.pad(self.image_small(image), (0, 1), value=1.0)
            fused = title_side + image_side + self.outer((small_t[:, :, None] * small_v[:, None, :]).flatten(1))
        fused = fused + self.attributes(attributes)
        if config.hidden:
            fused = fused + self.mix_out(F.gelu(self.mix_in(joined)))
        return torch.stack([image, title, fused])

    def forward(
        self, items: FusionInput, *, drop_text_N: Tensor | None = None, drop_image_N: Tensor | None = None
    ) -> Views:
        """Centred unit rows of each view; zero rows where the view's modality is missing or hidden."""
        raw = self.raw(items, drop_text_N=drop_text_N, drop_image_N=drop_image_N)
        unit = F.normalize(raw - self.means_3D[:, None], dim=-1, eps=1e-6)
        has_text = items.has_text_N if drop_text_N is None else items.has_text_N & ~drop_text_N
        has_image = items.has_image_N if drop_image_N is None else items.has_image_N & ~drop_image_N
        return Views(unit[0] * has_image[:, None], unit[1] * has_text[:, None], unit[2])

    @torch.no_grad()
    def centre_on(self, items: FusionInput, *, momentum: float = 0.0) -> None:
        """Move the running means to those of these items; `momentum` is the share of the old mean that is kept."""
        raw = self.raw(items)
        weights = torch.stack([items.has_image_N, items.has_text_N, torch.ones_like(items.has_text_N)]).float()
        counts = weights.sum(1, keepdim=True)
        means = (raw * weights[:, :, None]).sum(1) / counts.clamp_min(1)
        self.means_3D.copy_(torch.where(counts > 0, momentum * self.means_3D + (1 - momentum) * means, self.means_3D))

    @torch.no_grad()
    def embed(self, items: ItemSource, *, rows_per_pass: int = 4096) -> Views:
        """Views of all items, without gradient."""
        parts = [
            self(items.select(torch.arange(start, min(start + rows_per_pass, len(items)))))
            for start in range(0, max(1, len(items)), rows_per_pass)
        ]
        return Views(
            torch.cat([part.image_ND for part in parts]),
            torch.cat([part.title_ND for part in parts]),
            torch.cat([part.fused_ND for part in parts]),
        )

    def _categories(self, hashes_N2: Tensor) -> Tensor:
        known = hashes_N2[:, :1] >= 0
        rows = hashes_N2.clamp_min(0) % self.config.category_rows
        summed: Tensor = self.category_table(rows).sum(1) * known
        return summed

    def _words(self, words_NA: Tensor) -> Tensor:
        is_word = words_NA >= 0
        rows_NAW: Tensor = self.word_table(words_NA.clamp_min(0) % self.config.attribute_rows)
        return (rows_NAW * is_word[:, :, None]).sum(1) * is_word.sum(1, keepdim=True).clamp_min(1).float().rsqrt()


def nested_unit(rows_ND: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Prefixes of unit rows, each scaled to unit length again (Matryoshka, arXiv 2205.13147)."""
    return [F.normalize(rows_ND[:, :width], dim=-1, eps=1e-6) for width in widths]


def _log_price(price_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logarithm of prices, so that their unit does not matter; a price of 0 is below all others."""
    with np.errstate(invalid="ignore"):
        logged = np.log(np.maximum(price_N, 1e-6))
    return np.where(np.isfinite(price_N), logged, np.nan).astype(np.float32)


def _knots(values: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Quantiles, moved apart where many values are the same so that they increase."""
    knots = np.quantile(values.astype(np.float64), np.linspace(0, 1, count))
    least = 2 * float(np.spacing(np.abs(values).max()))  # less is nothing in float32, as 1e-5 of a year is
    gap = max(float(values.max() - values.min()) * 1e-3, 1e-5, least)
    for i in range(1, count):
        knots[i] = max(knots[i], knots[i - 1] + gap)
    return knots.astype(np.float32)


def _spline(values_N: Tensor, knots_K: Tensor) -> Tensor:
    """(N, K + 1): each known value as weights of its two neighbouring knots, and a column of ones; zeros if unknown."""
    known = torch.isfinite(values_N)
    inside = torch.where(known, values_N, knots_K[0]).clamp(knots_K[0], knots_K[-1])
    right = torch.searchsorted(knots_K, inside).clamp(1, len(knots_K) - 1)
    left_knot, right_knot = knots_K[right - 1], knots_K[right]
    share = (inside - left_knot) / (right_knot - left_knot)
    weights = torch.zeros(len(values_N), len(knots_K) + 1, device=values_N.device)
    weights.scatter_(1, right[:, None], share[:, None])
    weights.scatter_(1, (right - 1)[:, None], 1 - share[:, None])
    weights[:, -1] = 1.0
    return weights * known[:, None]
