"""What `pretrain` and `csft` share: folders, towers, features, the start of a fusion, and how bundles are written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import structlog
import torch
from torch import Tensor

from encoders.base import ItemContent
from encoders.bundle import DEFAULT_BUNDLE, BundleManifest, read_bundle
from encoders.config import EncoderConfig
from encoders.feature_cache import FeatureCache, prepared
from encoders.features import ItemFeatures
from encoders.fusion import ItemFusion, ItemSource
from encoders.fusion_config import FusionConfig
from encoders.loading import load_towers, towers_of
from encoders.multimodal import MultiModalEncoder
from encoders.trained import (
    TrainedManifest,
    TrainingManifest,
    is_trained,
    read_tower_weights,
    read_trained,
    write_trained,
)
from encoders.tuning import TunedItems, TunedTowers
from encoders.tuning_config import TuningConfig
from schemas.errors import Misconfigured
from streams.encoder_training.config import EncoderTrainingConfig
from streams.runtime.progress import progress_bar
from trainer.csft.run import padded, with_padding
from trainer.datasets.folder import DataSet

log = structlog.get_logger()


class BundleBuilder:
    """Towers and parent of an encoder that is to be trained, with a cache of features.

    Raises `Misconfigured` if the bundle cannot be used.
    """

    def __init__(self, encoder: EncoderConfig, training: EncoderTrainingConfig) -> None:
        bundle = DEFAULT_BUNDLE if encoder.bundle == "default" else Path(encoder.bundle)
        self.towers: MultiModalEncoder
        self.specs: BundleManifest | TrainedManifest
        self._parent_fusion: ItemFusion | None = None
        self._tower_weights: dict[str, Tensor] = {}
        if encoder.text_model is not None or encoder.image_model is not None:
            raise Misconfigured(
                "MIM_ENCODER__TEXT_MODEL and MIM_ENCODER__IMAGE_MODEL last only while a process runs; make a bundle of "
                "these towers ('mimstream bundle make --text PATH --image PATH'), name it in MIM_ENCODER__BUNDLE and "
                "unset the two"
            )
        if is_trained(bundle):
            manifest, _, self._parent_fusion = read_trained(bundle)
            self.specs, self.towers = manifest, towers_of(manifest, bundle, encoder)
            further = read_tower_weights(bundle, manifest)
            self._tower_weights = {f"{side}.{name}": value for side in further for name, value in further[side].items()}
        else:
            self.specs, self.towers = read_bundle(bundle)[0], load_towers(encoder)
        self.parent = self.specs.version
        self.cache: FeatureCache = FeatureCache(
            training.cache_folder, self.towers, towers_digest(self.specs, encoder.precision), warn=log.warning
        )
        self._folder = training.folder

    def features(self, contents: Sequence[ItemContent]) -> ItemFeatures:
        """Features of items, with a progress bar."""
        with progress_bar("features", len(contents)) as bar:
            return self.cache.features(contents, on_progress=bar.advance)

    def fusion(self, shape: FusionConfig, features: ItemFeatures, *, seed: int) -> ItemFusion:
        """The parent's heads and fusion, or new ones that start from the principal components of these features.

        Raises `Misconfigured` if a field of `shape` was set that the parent has otherwise.
        """
        if self._parent_fusion is not None:
            check_shape(shape, self._parent_fusion.config)
            return self._parent_fusion
        torch.manual_seed(seed)
        text_width, image_width = self.towers.tower_widths
        fusion = ItemFusion(shape, text_width=text_width, image_width=image_width)
        fusion.fit(features)
        return fusion

    def items(
        self, fusion: ItemFusion, features: ItemFeatures, contents: Sequence[ItemContent], tuning: TuningConfig
    ) -> tuple[ItemSource, TunedTowers | None]:
        """Items by number for training: from frozen features, or through the towers where these learn too."""
        if tuning.layers == "heads":
            return padded(fusion, features), None
        towers = TunedTowers(self.towers, tuning)
        with progress_bar("towers", len(contents)) as bar:
            parts = prepared(self.towers, contents, on_progress=bar.advance, warn=log.warning)
            return TunedItems(fusion, with_padding(features), parts, towers), towers

    def write(
        self, fusion: ItemFusion, training: TrainingManifest, out: Path | None, *, towers: TunedTowers | None = None
    ) -> tuple[Path, str]:
        """Write the bundle to `out`, or below the folder of encoders under its version; returns place and version.

        Raises `Misconfigured` if `out` is in use.
        """
        place = out or self._folder / f"new-{hashlib.sha256(training.model_dump_json().encode()).hexdigest()[:12]}"
        try:
            # what an earlier training changed and this one did not touch goes on
            weights = self._tower_weights | ({} if towers is None else towers.changes())
            manifest = write_trained(place, towers=self.specs, fusion=fusion, training=training, tower_weights=weights)
        except FileExistsError as error:
            raise Misconfigured(f"--out: {error}") from None
        if out is None:
            named = self._folder / manifest.version
            if not named.exists():
                place = place.rename(named)
        return place, manifest.version


def check_shape(wanted: FusionConfig, parent: FusionConfig) -> None:
    """Raise `Misconfigured` if a field of `wanted` was set that the parent, whose shape is kept, has otherwise."""
    others = {name for name in wanted.model_fields_set if getattr(wanted, name) != getattr(parent, name)}
    if others:
        given = ", ".join(f"MIM_FUSION__{name.upper()}={getattr(parent, name)}" for name in sorted(others))
        raise Misconfigured(
            f"training goes on from a bundle with {given}, and keeps its shape (--scl asks for KIND=mean); leave the "
            "settings out, or start from a bundle that was not trained (MIM_ENCODER__BUNDLE=default)"
        )


def towers_digest(specs: BundleManifest | TrainedManifest, precision: str = "fp32") -> str:
    """Names everything that decides tower features: weights, input sizes, preprocessing, precision."""
    parts = [
        specs.preprocessing,
        specs.text.weights.sha256,
        specs.text.max_tokens,
        specs.image.kind,
        specs.image.weights.sha256,
        specs.image.size,
    ]
    further = getattr(specs, "towers_sha256", None)
    if further is not None:
        parts.append(further)
    if precision != "fp32":
        parts.append(precision)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def contents_of(data: DataSet, *, outcomes: Container[str] = (), rows_per_read: int = 256) -> Iterator[ItemContent]:
    """The items of a folder in its own order, each with its picture, without attributes that are `outcomes`."""
    for start in range(0, len(data.item_ids), rows_per_read):
        records = data.records(start, start + rows_per_read)
        for record, picture in zip(records, data.pictures.of(records), strict=True):
            yield record.content(picture, outcomes)
