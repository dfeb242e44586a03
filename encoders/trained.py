"""Trained bundles: the towers of a bundle below heads and a fusion that learned from behaviours.

```text
trained.json             towers (where, which SHA-256, how fed), shape of the fusion, version
trained.safetensors      weights of heads and fusion
towers.safetensors       weights of the towers that learned too; absent where only heads did
training.json            what it learned from: span, offsets, parent, settings, metrics
SHA256SUMS               of them all; `sha256sum -c SHA256SUMS` checks it too
```

The version is a hash over weights, towers and preprocessing: it changes exactly if vectors may change. What it was
trained on describes it and is no part of its address. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from encoders.arithmetic import ALIKE_ROWS
from encoders.base import ItemContent, Prepared
from encoders.bundle import BundleManifest, ImageSpec, TextSpec
from encoders.digests import file_sha256
from encoders.features import ItemFeatures, attribute_columns
from encoders.fusion import ItemFusion
from encoders.fusion_config import FusionConfig
from encoders.multimodal import MultiModalEncoder
from encoders.preprocess import PREPROCESSING
from schemas.errors import EncodingFailed, Misconfigured, Reason

TRAINED = "trained.json"
M = TypeVar("M", bound=BaseModel)
_WEIGHTS, _TOWERS, _TRAINING, _SUMS = "trained.safetensors", "towers.safetensors", "training.json", "SHA256SUMS"


class TrainingManifest(BaseModel):
    """`training.json`: what taught an encoder, so that nothing evaluates it on rows that it has seen."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    stage: Literal["pretrain", "csft"]
    """Alignment of pictures and titles, or C-SFT on behaviours."""
    parent: str
    """Version of the encoder that it started from."""
    data: str
    """The folder's name, or the topics' prefix."""
    first_event_at: datetime | None = None
    """Event time of the first behaviour that was learned from."""
    last_event_at: datetime | None = None
    """Event time of the last one: rows after it are new to this encoder."""
    offsets: dict[str, dict[int, int]] = Field(default_factory=dict)
    """Per topic and partition, the next offset after what was read; empty for a folder."""
    cluster_id: str | None = None
    """The Kafka cluster that these offsets belong to."""
    items: int = 0
    """Items whose content was seen."""
    pairs: int = 0
    """Behaviour pairs that were learned from."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the run."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Health and recall at the end, on the span that settings were chosen by."""
    made_at: datetime | None = None
    """Wall clock at the end of the run."""


class TrainedManifest(BaseModel):
    """`trained.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal[1] = 1
    kind: Literal["trained-fusion"] = "trained-fusion"
    preprocessing: str = PREPROCESSING
    """Version of the preprocessing code that the bundle goes with."""
    text: TextSpec
    image: ImageSpec
    text_width: int = Field(ge=1)
    image_width: int = Field(ge=1)
    fusion: FusionConfig
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the weights' file."""
    towers_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Digest of the tower weights that were trained further; None where the towers are those of the packages."""
    version: str = ""
    """The address that the fields above come to."""

    def address(self) -> str:
        """The `EncoderVersion`; places where tower weights lie are no part of it."""
        content = self.model_dump(mode="json", exclude={"version": True})
        for part in ("text", "image"):
            content[part]["weights"] = content[part]["weights"]["sha256"]
        if self.towers_sha256 is None:
            del content["towers_sha256"]
        packed = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return f"csft{self.fusion.width}-{hashlib.sha256(packed.encode()).hexdigest()[:16]}"


class TrainedEncoder:
    """Towers and a trained fusion behind the `Encoder` protocol; `width` keeps a nested prefix of each vector."""

    def __init__(
        self, towers: MultiModalEncoder, fusion: ItemFusion, *, version: str, width: int | None = None
    ) -> None:
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
        """As the towers do it, with the publish-time attributes beside it."""
        prepared = self.towers.prepare(content)
        return replace(prepared, category=content.category, year=content.year, price=content.price)

    def features(self, batch: Sequence[Prepared]) -> ItemFeatures:
        """What the fusion is fed with."""
        return features_of(self.towers, batch)

    def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(n, dim) unit rows in the order of `batch`; `EncodingFailed` with `BAD_VECTOR` if one is not finite."""
        if not batch:
            return np.zeros((0, self._width), np.float32)
        filled = self.features(batch).take(np.arange(max(len(batch), ALIKE_ROWS)) % len(batch))
        with torch.inference_mode():
            views = self.fusion(self.fusion.prepare(filled))
        rows = views.fused_ND[: len(batch), : self._width].cpu().numpy()
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or (lengths < 1e-6).any():
            raise EncodingFailed(Reason.BAD_VECTOR, "the fusion made a vector that is zero or not finite")
        return np.asarray(rows / lengths, np.float32)


def features_of(towers: MultiModalEncoder, batch: Sequence[Prepared]) -> ItemFeatures:
    """Tower features and attributes of prepared items."""
    text, image = towers.tower_features(batch)
    columns = attribute_columns(
        [item.category for item in batch], [item.year for item in batch], [item.price for item in batch]
    )
    return ItemFeatures(
        text_NT=text,
        image_NI=image,
        has_text_N=np.array([item.has_title for item in batch], bool),
        has_image_N=np.array([item.has_image for item in batch], bool),
        category_N2=np.asarray(columns["category_N2"], np.int64),
        year_N=np.asarray(columns["year_N"], np.float32),
        price_N=np.asarray(columns["price_N"], np.float32),
    )


def write_trained(
    folder: Path,
    *,
    towers: BundleManifest | TrainedManifest,
    fusion: ItemFusion,
    training: TrainingManifest,
    tower_weights: Mapping[str, torch.Tensor] | None = None,
) -> TrainedManifest:
    """Write a trained bundle as `folder`, all of it or nothing. Raises `FileExistsError` if the folder is there.

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
        (unfinished / _SUMS).write_text("".join(sums))
        if folder.exists():
            folder.rmdir()
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return manifest


def _save(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in sorted(weights.items())}, path)
    path.chmod(0o644)  # safetensors writes for the owner alone, and installers keep modes


def read_tower_weights(folder: Path, manifest: TrainedManifest) -> dict[str, dict[str, torch.Tensor]]:
    """Tower weights that were trained further, by tower (`text`, `image`) and name; empty where none were.

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
    """Read and verify a trained bundle. Raises `Misconfigured` naming the file at fault."""
    sums = _sums(folder)
    for name in (TRAINED, _WEIGHTS, _TRAINING):
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            raise Misconfigured(f"encoder bundle {folder}: cannot read {name}: {error.strerror}") from None
        if found != sums.get(name):
            raise Misconfigured(
                f"encoder bundle {folder}: {name} is damaged (its SHA-256 is not the one in {_SUMS}); "
                "restore it from a copy, or train it again"
            )
    manifest = _parse(TrainedManifest, folder, TRAINED)
    training = _parse(TrainingManifest, folder, _TRAINING)
    if manifest.preprocessing != PREPROCESSING:
        raise Misconfigured(
            f"encoder bundle {folder} was made for preprocessing {manifest.preprocessing}, this is {PREPROCESSING}; "
            "train it again, or run the release that made it"
        )
    if manifest.version != manifest.address() or manifest.weights_sha256 != sums[_WEIGHTS]:
        raise Misconfigured(
            f"encoder bundle {folder}: its content does not come to its version {manifest.version!r}; it was edited "
            "after it was made"
        )
    fusion = ItemFusion(manifest.fusion, text_width=manifest.text_width, image_width=manifest.image_width)
    try:
        fusion.load_state_dict(load_file(folder / _WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        raise Misconfigured(f"encoder bundle {folder}: {_WEIGHTS} does not fit the fusion: {error}") from None
    return manifest, training, fusion


def _sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / _SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise Misconfigured(f"{folder} is no encoder bundle: it has no readable {_SUMS}") from None
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _parse(model: type[M], folder: Path, name: str) -> M:
    try:
        return model.model_validate_json((folder / name).read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Misconfigured(f"encoder bundle {folder}: {name} does not fit: {where}: {first['msg']}") from None
