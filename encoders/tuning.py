"""Training of the towers: which weights are trained, which activations are cached, which weights are saved.

With `last_blocks` the activations before the trained blocks are computed once per item and cached in half precision.
Otherwise each step runs the whole tower and recomputes activations for the gradient, so that memory is bounded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encoders.base import Prepared
from encoders.bert import Bert
from encoders.features import ItemFeatures
from encoders.fusion import FusionInput, ItemFusion
from encoders.image import EfficientNetLite0, ImageTower, TransformersVision
from encoders.multimodal import MultiModalEncoder
from encoders.text import TextTower, TransformersText, by_length, mean_pool
from encoders.tuning_config import TuningConfig
from schemas.errors import Misconfigured

# n = items of one call, N = items by number (row 0 is padding), T and I = widths of the tower features

_PICTURES_PER_PASS = 64
_ROWS_PER_CALL = 256
"""Items per pass where no gradient is needed, so that the whole catalogue can be passed at once."""

_ATTENTION = r".*\.(query|value|q_proj|v_proj)"
_POINTWISE = r".*_(expand|project)_conv"

Kept = NDArray[Any]
"""Output of the frozen part of a tower for one item."""


class TunedTower(Protocol):
    """A tower with trainable weights."""

    width: int

    def keep(self, given: Sequence[Any]) -> list[Kept]:
        """Output of the frozen part, per item."""
        ...

    def __call__(self, kept: Sequence[Kept]) -> Tensor:
        """(n, width) features, with gradient where it is enabled."""
        ...

    def changes(self) -> dict[str, Tensor]:
        """The trained weights, under the names of the tower's `load`."""
        ...


class TunedBert(nn.Module):
    """The last layers of a BERT over cached states, or all of it over token ids."""

    def __init__(self, tower: TextTower, tuning: TuningConfig) -> None:
        super().__init__()
        assert isinstance(tower.model, Bert)
        self.width = tower.width
        self._tower = tower
        self._bert = copy.copy(tower.model)
        first = 0 if tuning.layers == "all" else max(0, self._bert.depth - tuning.blocks)
        self._frozen, self._learning = range(first), range(first, self._bert.depth)
        self._whole = tuning.layers == "all"
        self._names = [name for name in sorted(self._bert.weights) if self._learns(name)]
        weights = {name: value.detach().clone() for name, value in self._bert.weights.items()}  # for autograd
        self.trained = nn.ParameterList([nn.Parameter(weights[name]) for name in self._names])
        self._bert.weights = weights | dict(zip(self._names, self.trained, strict=True))

    def _learns(self, name: str) -> bool:
        parts = name.split(".")
        if parts[:2] == ["encoder", "layer"]:
            return int(parts[2]) in self._learning
        return self._whole and parts[0] == "embeddings" and name.endswith(("weight", "bias"))

    @torch.no_grad()
    def keep(self, given: Sequence[tuple[int, ...]]) -> list[Kept]:
        """Token ids, or their (tokens, width) states before the first trained layer."""
        if self._whole:
            return [np.array(tokens, np.int32) for tokens in given]
        kept: list[Kept] = [np.empty(0)] * len(given)
        for rows in by_length([len(tokens) for tokens in given]):
            ids, mask = self._tower.padded([given[row] for row in rows])
            states = self._bert.layers(self._bert.embed(ids), mask, self._frozen).half().cpu().numpy()
            for row, state in zip(rows, states, strict=True):
                kept[row] = state[: len(given[row])].copy()
        return kept

    def forward(self, kept: Sequence[Kept]) -> Tensor:
        """(n, T) features."""
        order, parts = [], []
        for rows in by_length([len(one) for one in kept]):
            parts.append(_recomputed(self._whole, self._pooled, [kept[row] for row in rows]))
            order += rows
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _pooled(self, kept: Sequence[Kept]) -> Tensor:
        if self._whole:
            ids, mask = self._tower.padded([tuple(one.tolist()) for one in kept])
            states = self._bert.embed(ids)
        else:
            longest = max(len(one) for one in kept)
            padded = np.zeros((len(kept), longest, self.width), np.float32)
            lengths = np.array([len(one) for one in kept])
            for row, one in enumerate(kept):
                padded[row, : len(one)] = one
            device = self.trained[0].device
            states = torch.from_numpy(padded).to(device)
            mask = torch.from_numpy((np.arange(longest) < lengths[:, None]).astype(np.int64)).to(device)
        return mean_pool(self._bert.layers(states, mask, self._learning), mask)

    def changes(self) -> dict[str, Tensor]:
        """The trained weights by name."""
        return {name: value.detach().clone() for name, value in zip(self._names, self.trained, strict=True)}


class TunedEfficientNet(nn.Module):
    """The last blocks of an EfficientNet-lite over cached maps. Batch norms are folded into convolutions."""

    def __init__(self, tower: EfficientNetLite0, tuning: TuningConfig) -> None:
        super().__init__()
        self.width = tower.width
        self._tower = tower
        network = copy.deepcopy(tower.network)
        blocks = network._blocks
        self._first = max(0, len(blocks) - tuning.blocks)
        self.trained = nn.ModuleList([*blocks[self._first :], network._conv_head]).requires_grad_(True)
        self._network = [network]  # in a list, so that the frozen part is not in this module's state

    @torch.no_grad()
    def keep(self, given: Sequence[NDArray[np.uint8]]) -> list[Kept]:
        """(channels, height, width) maps before the first trained block."""
        network = self._network[0]
        kept: list[Kept] = []
        for start in range(0, len(given), _PICTURES_PER_PASS):
            maps = network._swish(
                network._bn0(network._conv_stem(self._tower.scaled(given[start:][:_PICTURES_PER_PASS])))
            )
            for block in network._blocks[: self._first]:
                maps = block(maps)
            kept += list(maps.half().cpu().numpy())
        return kept

    def forward(self, kept: Sequence[Kept]) -> Tensor:
        """(n, 1280) features."""
        network = self._network[0]
        device = next(self.trained.parameters()).device
        maps = torch.from_numpy(np.stack(kept)).to(device).float()
        *blocks, head = self.trained
        for block in blocks:
            maps = block(maps)
        features: Tensor = network._swish(network._bn1(head(maps))).mean((2, 3))
        return features

    def changes(self) -> dict[str, Tensor]:
        """The trained weights by name."""
        learning = (
            "_conv_head.",
            *(f"_blocks.{number}." for number in range(self._first, len(self._network[0]._blocks))),
        )
        state = self._network[0].state_dict()
        return {name: value.detach().clone() for name, value in state.items() if name.startswith(learning)}


class TunedNetwork(nn.Module):
    """Any network with trained blocks, adapters or weights; only its input is cached."""

    def __init__(self, network: Any, features: Callable[[Any, Sequence[Kept]], Tensor], width: int, *,
                 tuning: TuningConfig, adapters: str, per_pass: int) -> None:  # fmt: skip
        super().__init__()
        self.width = width
        self.network = copy.deepcopy(network).requires_grad_(tuning.layers == "all")
        self._features = features
        self._adapted = tuning.layers == "lora"
        self._per_pass = per_pass
        if tuning.layers == "last_blocks":
            lists = [module for module in self.network.modules() if isinstance(module, nn.ModuleList)]
            if not lists:
                raise Misconfigured(
                    f"MIM_TUNING__LAYERS=last_blocks: {type(network).__name__} has no list of blocks; use lora or all"
                )
            max(lists, key=len)[-tuning.blocks :].requires_grad_(True)
        elif self._adapted:
            _add_adapters(self.network, adapters, tuning.lora_rank)

    def keep(self, given: Sequence[Any]) -> list[Kept]:
        """The input as arrays."""
        return [np.asarray(one) for one in given]

    def forward(self, kept: Sequence[Kept]) -> Tensor:
        """(n, width) features."""
        parts = [
            _recomputed(True, lambda part: self._features(self.network, part), kept[start : start + self._per_pass])
            for start in range(0, len(kept), self._per_pass)
        ]
        return torch.cat(parts)

    def changes(self) -> dict[str, Tensor]:
        """The trained weights by name, with adapters merged into their layers."""
        network = self.network
        if not self._adapted:
            return {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
        merged = copy.deepcopy(network)
        found: dict[str, Tensor] = {}
        for name, module in merged.named_modules():
            if hasattr(module, "merge") and hasattr(module, "base_layer"):
                module.merge()
                found[f"{name}.weight"] = module.base_layer.weight.detach().clone()
        return found


def _add_adapters(network: Any, pattern: str, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise Misconfigured("MIM_TUNING__LAYERS=lora needs peft: pip install peft") from None
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            module.__class__ = (
                nn.Conv2d
            )  # peft makes adapters of the layer's class, and a subclass may need more arguments
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=pattern)
    try:
        inject_adapter_in_model(config, network)
    except ValueError as error:
        raise Misconfigured(f"MIM_TUNING__LAYERS=lora: no layer of this tower can be adapted: {error}") from None


def tuned_text(tower: TextTower, tuning: TuningConfig) -> TunedTower:
    """A trainable text tower."""
    if isinstance(tower.model, Bert) and tuning.layers != "lora":
        return TunedBert(tower, tuning)
    model = tower.model
    if isinstance(model, Bert):
        current, model = model.weights, TransformersText(tower.folder, tower.device)
        known = dict(model.network.named_parameters())
        model.load({name: value for name, value in current.items() if name in known})

    def features(network: Any, kept: Sequence[Kept]) -> Tensor:
        ids, mask = tower.padded([tuple(one.tolist()) for one in kept])
        return mean_pool(network(input_ids=ids, attention_mask=mask).last_hidden_state, mask)

    return TunedNetwork(model.network, features, tower.width, tuning=tuning, adapters=_ATTENTION, per_pass=32)


def tuned_image(tower: ImageTower, tuning: TuningConfig) -> TunedTower:
    """A trainable image tower."""
    if isinstance(tower, EfficientNetLite0):
        if tuning.layers == "last_blocks":
            return TunedEfficientNet(tower, tuning)
        lite = tower
        return TunedNetwork(
            tower.network, lambda network, kept: network.extract_features(lite.scaled(kept)).mean((2, 3)), tower.width,
            tuning=tuning, adapters=_POINTWISE, per_pass=_PICTURES_PER_PASS,
        )  # fmt: skip
    assert isinstance(tower, TransformersVision)
    vision = tower

    def features(network: Any, kept: Sequence[Kept]) -> Tensor:
        return vision.pooled(vision.scaled(kept), network)

    return TunedNetwork(tower.network, features, tower.width, tuning=tuning, adapters=_ATTENTION, per_pass=16)


class TunedTowers(nn.Module):
    """Both towers; one that is not trained is None."""

    def __init__(self, towers: MultiModalEncoder, tuning: TuningConfig) -> None:
        super().__init__()
        self.text = tuned_text(towers.text, tuning) if tuning.text else None
        self.image = tuned_image(towers.image, tuning) if tuning.image else None

    def changes(self) -> dict[str, Tensor]:
        """Trained weights of both, with the tower as a prefix: `text.…`, `image.…`."""
        return {
            f"{side}.{name}": value
            for side, tower in (("text", self.text), ("image", self.image))
            if tower is not None
            for name, value in tower.changes().items()
        }


class TunedItems:
    """Items by number with features of trained towers, in place of a `FusionInput` of frozen features.

    `features` are the frozen ones, with the modalities and attributes of each item, and the features of a tower that is
    not trained. Row 0 is padding.
    """

    def __init__(
        self,
        fusion: ItemFusion,
        features: ItemFeatures,
        prepared: Iterator[Sequence[Prepared | None]],
        towers: TunedTowers,
    ) -> None:
        """`prepared` yields the items in parts, in the order of their numbers from 1; None for missing content."""
        self._fusion = fusion
        self._fixed = fusion.prepare(features)
        self.towers = towers
        self._text: list[Kept | None] = [None]
        self._image: list[Kept | None] = [None]
        for part in prepared:
            self._text += _kept(towers.text, [None if one is None else one.tokens for one in part])
            self._image += _kept(towers.image, [None if one is None else one.pixels for one in part])
        if len(self._text) != len(features):
            raise ValueError(f"{len(self._text) - 1} items were prepared, {len(features) - 1} have features")

    def __len__(self) -> int:
        return len(self._fixed)

    @property
    def has_text_N(self) -> Tensor:  # noqa: N802
        """Which items have text."""
        return self._fixed.has_text_N

    @property
    def has_image_N(self) -> Tensor:  # noqa: N802
        """Which items have a picture."""
        return self._fixed.has_image_N

    @property
    def category_N2(self) -> Tensor:  # noqa: N802
        """Hashes of their categories."""
        return self._fixed.category_N2

    def select(self, rows: Tensor) -> FusionInput:
        """These rows, with gradients to the towers where enabled."""
        if not torch.is_grad_enabled() and len(rows) > _ROWS_PER_CALL:
            return FusionInput.concatenate([self.select(part) for part in torch.split(rows, _ROWS_PER_CALL)])
        found = self._fixed.select(rows)
        text = self._components(rows, self._text, self.towers.text, self._fusion.text_components, found.text_NR)
        image = self._components(rows, self._image, self.towers.image, self._fusion.image_components, found.image_NR)
        return replace(found, text_NR=text, image_NR=image)

    def _components(
        self,
        rows: Tensor,
        kept: list[Kept | None],
        tower: TunedTower | None,
        components: Callable[[Tensor], Tensor],
        frozen_NR: Tensor,
    ) -> Tensor:
        if tower is None:
            return frozen_NR
        given = [(place, one) for place, row in enumerate(rows.tolist()) if (one := kept[row]) is not None]
        if not given:
            return torch.zeros_like(frozen_NR)
        places = torch.tensor([place for place, _ in given])
        made = components(tower([one for _, one in given]))
        return torch.zeros_like(frozen_NR).index_copy(0, places, made)


def _kept(tower: TunedTower | None, given: Sequence[Any]) -> list[Kept | None]:
    there = [row for row, one in enumerate(given) if one is not None]
    found: list[Kept | None] = [None] * len(given)
    if tower is not None and there:
        for row, one in zip(there, tower.keep([given[row] for row in there]), strict=True):
            found[row] = one
    return found


def _recomputed(again: bool, function: Callable[[Any], Tensor], given: Any) -> Tensor:
    if again and torch.is_grad_enabled():
        result: Tensor = checkpoint(function, given, use_reentrant=False)
        return result
    return function(given)
