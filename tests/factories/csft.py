"""Small synthetic worlds for C-SFT: items in groups, users who stay inside a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from encoders.base import ItemContent
from encoders.features import ItemFeatures, attribute_columns, word_hashes
from encoders.fusion import FusionInput, ItemFusion, ItemSource
from encoders.fusion_config import FusionConfig
from tests.factories.samples import DAY0, behaviour
from trainer.csft.config import CsftConfig
from trainer.csft.pairs import HardNegatives, Pair, PairMiner, join_all
from trainer.csft.trainer import CsftTrainer, take_counts
from trainer.samples.numbering import FeatureNumbers
from trainer.samples.window import Observed

SMALL = FusionConfig(width=16, nested_widths=(8,), hidden=16, text_rank=12, image_rank=12, category_rows=64)


def make_features(items: int = 60, groups: int = 6, seed: int = 0, noise: float = 1.0) -> ItemFeatures:
    """Items whose text and picture lean towards their group; every seventh has no picture, every eleventh no text."""
    rng = np.random.default_rng(seed)
    group = np.arange(items) % groups
    text = rng.standard_normal((groups, 20))[group] + noise * rng.standard_normal((items, 20))
    image = rng.standard_normal((groups, 30))[group] + noise * rng.standard_normal((items, 30))
    has_image, has_text = np.arange(items) % 7 != 3, np.arange(items) % 11 != 5
    columns = attribute_columns(
        [f"c{g % 3}" for g in group],
        [2000.0 + g for g in group],
        [None if g == 0 else 5.0 + g for g in group],
        [() if g == 1 else word_hashes({"colour": f"k{g % 4}", "tags": ["a", f"t{g}"]}) for g in group],
    )
    text, image = (text * has_text[:, None]).astype(np.float32), (image * has_image[:, None]).astype(np.float32)
    return ItemFeatures(text, image, has_text, has_image, **columns)


def features_of(contents: Sequence[ItemContent]) -> ItemFeatures:
    """Features that any same words and any same picture share; a picture of one byte is unreadable."""
    has_text = np.array([bool(content.title) for content in contents])
    has_image = np.array([content.image is not None and len(content.image) > 1 for content in contents])
    text, image = np.zeros((len(contents), 20)), np.zeros((len(contents), 30))
    for n, content in enumerate(contents):
        if has_text[n]:
            text[n] = np.random.default_rng(list(content.title.encode())).standard_normal(20)
        if has_image[n]:
            image[n] = np.random.default_rng(list(content.image or b"")).standard_normal(30)
    nothing = [None] * len(contents)
    columns = attribute_columns(nothing, nothing, nothing, [()] * len(contents))
    return ItemFeatures(text.astype(np.float32), image.astype(np.float32), has_text, has_image, **columns)


def make_fusion(features: ItemFeatures, config: FusionConfig = SMALL) -> ItemFusion:
    torch.manual_seed(0)
    fusion = ItemFusion(config, text_width=features.text_NT.shape[1], image_width=features.image_NI.shape[1])
    fusion.fit(features)
    return fusion


def make_numbers(items: int = 60) -> FeatureNumbers:
    return FeatureNumbers([f"i{n}" for n in range(1, items + 1)], [f"content{n}" for n in range(1, items + 1)])


def make_csft_trainer(
    config: CsftConfig, fusion: ItemFusion, items: ItemSource, numbers: FeatureNumbers, pairs: list[Pair], **more: Any
) -> CsftTrainer:
    """A trainer of ten steps whose hard negatives may be any item."""
    hard = HardNegatives(np.zeros(len(items), np.int64), usable=np.arange(len(items)) > 0)
    counts = take_counts([pair.take for pair in pairs])
    return CsftTrainer(
        config, fusion, items, numbers, **{"total_steps": 10, "counts": counts, "hard_negatives": hard} | more
    )


def event(name: str, second: int, user: str, item: str, kind: str = "exposure", **more: str | None) -> Observed:
    return Observed(0, second, DAY0 + second, behaviour(name, kind, user=user, item=item, second=second, **more))


def make_pairs(numbers: FeatureNumbers, users: int = 40, takes: int = 6, groups: int = 6, seed: int = 0) -> list[Pair]:
    """Each user takes things of one group and passes over one of another before each take."""
    rng = np.random.default_rng(seed)
    seconds: list[list[Observed]] = []
    at = 0
    for step in range(takes):
        for user in range(users):
            group = user % groups
            mine = int(rng.integers(numbers.known // groups)) * groups + group + 1
            other = int(rng.integers(numbers.known // groups)) * groups + (group + 1) % groups + 1
            at += 1
            shown = f"x{step}-{user}"
            passed_over = event(f"{shown}-other", at, f"u{user}", f"i{other}")
            exposure = event(shown, at, f"u{user}", f"i{mine}")
            take = event(f"t{shown}", at, f"u{user}", f"i{mine}", "purchase", exposure_id=shown)
            seconds.append([passed_over, exposure, take])
    impressions = join_all(seconds, numbers, history_length=20, attribution_seconds=0.0)
    return list(PairMiner(numbers).pairs(impressions))


class Gain(nn.Module):
    """Towers of one weight that is learned and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.still = nn.Parameter(torch.ones(()), requires_grad=False)


class Computed:
    """Items whose texts the towers compute."""

    def __init__(self, kept: FusionInput, towers: Gain) -> None:
        self._kept, self._towers = kept, towers
        self.has_text_N, self.has_image_N, self.category_N2 = kept.has_text_N, kept.has_image_N, kept.category_N2
        self.words_NA = kept.words_NA

    def __len__(self) -> int:
        return len(self._kept)

    def select(self, rows: Tensor) -> FusionInput:
        found = self._kept.select(rows)
        return replace(found, text_NR=found.text_NR * self._towers.gain + 0.1 * self._towers.gain)
