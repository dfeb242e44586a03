"""Trained bundles: the towers of a bundle below heads and a fusion trained on behaviours.

```text
trained.json             towers (location, SHA-256, input), shape of the fusion, version
trained.safetensors      weights of heads and fusion
towers.safetensors       weights of towers that were trained; absent where only heads were
training.json            training data: span, offsets, parent, settings, metrics
SHA256SUMS               of them all; readable by `sha256sum -c SHA256SUMS`
```

The version is a hash over weights, towers and preprocessing: it changes exactly if vectors may change. The training
data is no part of it. Nothing is unpickled.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from encoders.arithmetic import ALIKE_ROWS
from encoders.base import ItemContent, Prepared
from encoders.bundle import (
    SUMS,
    BundleManifest,
    ImageSpec,
    TextSpec,
    check_manifest,
    content_digest,
    parse_manifest,
    verified_sums,
)
from encoders.digests import file_sha256
from encoders.features import ItemFeatures, attribute_columns, word_hashes
from encoders.fusion import ItemFusion, Views
from encoders.fusion_config import FusionConfig
from encoders.multimodal import MultiModalEncoder
from encoders.preprocess import PREPROCESSING
from schemas.errors import EncodingFailed, Misconfigured, Reason

TRAINED = "trained.json"
_WEIGHTS, _TOWERS, _TRAINING = "trained.safetensors", "towers.safetensors", "training.json"


class TrainingManifest(BaseModel):
    """`training.json`: the training data of an encoder, so that no evaluation uses rows of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    stage: Literal["pretrain", "csft"]
    """Alignment of pictures and titles, or C-SFT on behaviours."""
    parent: str
    """Version of the encoder that training started from."""
    data: str
    """The folder's name, or the topics' prefix."""
    first_event_at: datetime | None = None
    """Event time of the first behaviour of the training data."""
    last_event_at: datetime | None = None
    """Event time of the last one: later rows are new to this encoder."""
    offsets: dict[str, dict[int, int]] = Field(default_factory=dict)
    """Per topic and partition, the offset after the last record read; empty for a folder."""
    cluster_id: str | None = None
    """The Kafka cluster that these offsets belong to."""
    items: int = 0
    """Number of items."""
    pairs: int = 0
    """Number of behaviour pairs."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the run."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Health and recall at the end, on the span that settings were chosen on."""
    made_at: datetime | None = None
    """Wall clock at the end of the run."""


class TrainedManifest(BaseModel):
    """`trained.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal[1] = 1
    kind: Literal["trained-fusion"] = "trained-fusion"
    preprocessing: str = PREPROCESSING
    """Version of the preprocessing code that the bundle requires."""
    text: TextSpec
    image: ImageSpec
    text_width: int = Field(ge=1)
    image_width: int = Field(ge=1)
    fusion: FusionConfig
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the weights' file."""
    towers_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Digest of the trained tower weights; None where the towers are those of the packages."""
    version: str = ""
    """The `address` of the fields above."""

    @field_validator("fusion", mode="before")
    @classmethod
    def _earlier_builds_had_no_attributes(cls, fusion: object) -> object:
        return {"attribute_rows": 0, **fusion} if isinstance(fusion, dict) else fusion

    def address(self) -> str:
        """The `EncoderVersion`, without the locations of tower weights."""
        content = self.model_dump(mode="json", exclude={"version": True})
        if self.towers_sha256 is None:
            del content["towers_sha256"]
        if not self.fusion.attribute_rows:  # bundles of earlier builds had no attributes, and keep their versions
            del content["fusion"]["attribute_rows"], content["fusion"]["attribute_width"]
        return f"csft{self.fusion.width}-{content_digest(content)}"


class TrainedEncoder:
    """Towers and a trained fusion as an `Encoder`; `width` keeps a nested prefix of each vector."""

    def __init__(
        self,
        towers: MultiModalEncoder,
        fusion: ItemFusion,
        *,
        version: str,
        width: int | None = None,
        queries_are_views: bool = False,
    ) -> None:
        """`queries_are_views` says that training asked with the view of the query's own modality.

        Raises `Misconfigured` if there are no vectors of this width.
        """
        if towers.tower_widths != (fusion.text_width, fusion.image_width):
            raise ValueError(
                f"towers make {towers.tower_widths} features, the fusion was made for "
                f"{(fusion.text_width, fusion.image_width)}"
            )
        if width is not None and width != fusion.dim and width not in fusion.config.nested_widths:
            raise Misconfigured(
                f"MIM_ENCODER__WIDTH={width}, but this bundle was trained for {fusion.dim} and "
                f"{', '.join(map(str, fusion.config.nested_widths)) or 'nothing else'}"
            )
        self.towers = towers
        self.fusion = fusion.eval().requires_grad_(False)
        self._width = width or fusion.dim
        self._queries_are_views = queries_are_views
        # prefixes of different lengths are vectors of different spaces
        self._version = version if self._width == fusion.dim else f"{version}-w{self._width}"

    @property
    def version(self) -> str:
        """Content-addressed `EncoderVersion`."""
        return self._version

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self._width

    def prepare(self, content: ItemContent) -> Prepared:
        """The towers' input, with the publish-time attributes."""
        prepared = self.towers.prepare(content)
        words = word_hashes(content.attributes) if self.fusion.config.attribute_rows else ()
        return replace(prepared, category=content.category, year=content.year, price=content.price, words=words)

    def features(self, batch: Sequence[Prepared]) -> ItemFeatures:
        """The fusion's input."""
        return features_of(self.towers, batch)

    def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(n, dim) unit rows in the order of `batch`; `EncodingFailed` with `BAD_VECTOR` if one is not finite."""
        if not batch:
            return np.zeros((0, self._width), np.float32)
        return self.vectors(self.features(batch))

    def vectors(self, features: ItemFeatures) -> NDArray[np.float32]:
        """What `encode` makes of items with these tower features, at least one: (n, dim) unit rows."""
        return self._unit_rows(self._views(features).fused_ND, len(features))

    def encode_queries(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(n, dim) unit rows of searches, which lie beside the items that they find; errors as of `encode`.

        C-SFT asks with the view of a photo or of words (`CsftConfig.anchor_view`), and a search by both is their mean.
        """
        return self.query_vectors(self.features(batch)) if batch else self.encode(batch)

    def query_vectors(self, features: ItemFeatures) -> NDArray[np.float32]:
        """What `encode_queries` makes of searches with these tower features, at least one."""
        if not self._queries_are_views:
            return self.vectors(features)
        views = self._views(features)
        return self._unit_rows(views.image_ND + views.title_ND, len(features))

    def _views(self, features: ItemFeatures) -> Views:
        filled = features.select(np.arange(max(len(features), ALIKE_ROWS)) % len(features))
        with torch.inference_mode():
            views: Views = self.fusion(self.fusion.prepare(filled))
        return views

    def _unit_rows(self, rows_ND: torch.Tensor, count: int) -> NDArray[np.float32]:
        rows = rows_ND[:count, : self._width].cpu().numpy()
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or (lengths < 1e-6).any():
            raise EncodingFailed(Reason.BAD_VECTOR, "the fusion made a vector that is zero or not finite")
        return np.asarray(rows / lengths, np.float32)


def features_of(towers: MultiModalEncoder, batch: Sequence[Prepared]) -> ItemFeatures:
    """Tower features and attributes of prepared items."""
    text, image = towers.tower_features(batch)
    return ItemFeatures(
        text_NT=text,
        image_NI=image,
        has_text_N=np.array([item.has_title for item in batch], bool),
        has_image_N=np.array([item.has_image for item in batch], bool),
        **attribute_columns(
            [item.category for item in batch],
            [item.year for item in batch],
            [item.price for item in batch],
            [item.words for item in batch],
        ),
    )


def write_trained(
    folder: Path,
    *,
    towers: BundleManifest | TrainedManifest,
    fusion: ItemFusion,
    training: TrainingManifest,
    tower_weights: Mapping[str, torch.Tensor] | None = None,
) -> TrainedManifest:
    """Write a trained bundle as `folder`, atomically. Raises `FileExistsError` if the folder is not empty.

    `tower_weights` are those that differ from the packages', named `text.…` and `image.…`.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; bundles are never changed, make a new one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    unfinished.mkdir()
    try:
        _save(fusion.state_dict(), unfinished / _WEIGHTS)
        if tower_weights:
            _save(tower_weights, unfinished / _TOWERS)
        manifest = TrainedManifest(
            text=towers.text,
            image=towers.image,
            text_width=fusion.text_width,
            image_width=fusion.image_width,
            fusion=fusion.config,
            weights_sha256=file_sha256(unfinished / _WEIGHTS),
            towers_sha256=file_sha256(unfinished / _TOWERS) if tower_weights else None,
        )
        manifest = manifest.model_copy(update={"version": manifest.address()})
        (unfinished / TRAINED).write_text(manifest.model_dump_json(indent=2) + "\n")
        (unfinished / _TRAINING).write_text(training.model_dump_json(indent=2) + "\n")
        names = [TRAINED, _WEIGHTS, *([_TOWERS] if tower_weights else []), _TRAINING]
        sums = [f"{file_sha256(unfinished / name)}  {name}\n" for name in names]
        (unfinished / SUMS).write_text("".join(sums))
        if folder.exists():
            folder.rmdir()
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return manifest


def _save(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in sorted(weights.items())}, path)
    path.chmod(0o644)  # safetensors makes files private, and installers keep modes


def read_tower_weights(folder: Path, manifest: TrainedManifest) -> dict[str, dict[str, torch.Tensor]]:
    """Trained tower weights by tower (`text`, `image`) and name; empty where none were trained.

    Raises `Misconfigured` if they are damaged.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    if manifest.towers_sha256 is None:
        return found
    try:
        if file_sha256(folder / _TOWERS) != manifest.towers_sha256:
            raise Misconfigured(
                f"encoder bundle {folder}: {_TOWERS} is damaged (its SHA-256 is not the manifest's); "
                "restore it from a copy, or train it again"
            )
        for name, value in load_file(folder / _TOWERS).items():
            tower, _, rest = name.partition(".")
            found.setdefault(tower, {})[rest] = value
    except (OSError, SafetensorError) as error:
        raise Misconfigured(f"encoder bundle {folder}: cannot read {_TOWERS}: {error}") from None
    return found


def is_trained(folder: Path) -> bool:
    """Whether a folder is a trained bundle."""
    return (folder / TRAINED).is_file()


def read_trained(folder: Path) -> tuple[TrainedManifest, TrainingManifest, ItemFusion]:
    """Read and verify a trained bundle. Raises `Misconfigured` naming the file."""
    sums = verified_sums(folder, (TRAINED, _WEIGHTS, _TRAINING), remake="train")
    manifest = parse_manifest(TrainedManifest, folder, TRAINED)
    training = parse_manifest(TrainingManifest, folder, _TRAINING)
    check_manifest(folder, manifest, same=manifest.weights_sha256 == sums[_WEIGHTS], remake="train")
    fusion = ItemFusion(manifest.fusion, text_width=manifest.text_width, image_width=manifest.image_width)
    try:
        fusion.load_state_dict(load_file(folder / _WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        raise Misconfigured(f"encoder bundle {folder}: {_WEIGHTS} does not fit the fusion: {error}") from None
    return manifest, training, fusion
