"""Bundles: a folder that fixes an encoder to the last bit, and can prove it.

```text
bundle.json          towers (where, which SHA-256, how fed), fusion, version
fusion.safetensors   means and matrices
SHA256SUMS           of the two; `sha256sum -c SHA256SUMS` checks it too
```

The version is an address of the content: a hash over matrices, weights, tokenizer and preprocessing. Where the weights
lie is not part of it. Nothing in a bundle is ever unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from encoders.digests import file_sha256
from encoders.fixed_fusion import FixedFusion, from_tensors, to_tensors
from encoders.preprocess import PREPROCESSING
from schemas.errors import Misconfigured

DEFAULT_BUNDLE = Path(__file__).parent / "bundles" / "default"
_MANIFEST, _FUSION, _SUMS = "bundle.json", "fusion.safetensors", "SHA256SUMS"
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class WeightsPlace(BaseModel):
    """Where a tower's weights lie and how they are recognised."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    package: str | None = None
    """Installed Python package that carries them; `path` is then inside it."""
    path: str
    """Path in the package, or absolute, or relative to the bundle folder."""
    sha256: _Sha256
    """Digest of what decides the features."""

    def resolve(self, bundle: Path | None) -> Path:
        """The path on this machine; `Misconfigured` if there is nothing."""
        if self.package is not None:
            spec = importlib.util.find_spec(self.package)
            if spec is None or not spec.submodule_search_locations:
                raise Misconfigured(
                    f"the encoder needs the Python package {self.package!r}; install mimstream with its dependencies"
                )
            place = Path(next(iter(spec.submodule_search_locations))) / self.path
        else:
            place = (bundle or Path()) / self.path
        if not place.exists():
            raise Misconfigured(f"encoder weights are missing: {place}")
        return place


class TextSpec(BaseModel):
    """The text tower: a transformers encoder, mean pooling."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["transformers"] = "transformers"
    weights: WeightsPlace
    max_tokens: int = Field(ge=8, le=8192)
    """Longest text, specials included; the rest is cut."""


class ImageSpec(BaseModel):
    """The image tower."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["efficientnet-lite0", "transformers"]
    weights: WeightsPlace
    size: int = Field(ge=16, le=1024)
    """Height and width of the input."""


class FusionSpec(BaseModel):
    """How features become vectors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    image_share: float = Field(gt=0.0, lt=1.0)
    """Part of the squared length that the picture has where both modalities are there."""
    sha256: _Sha256 | None = None
    """Digest of the matrices' file; None where they were drawn from `recipe` and not stored."""
    recipe: str
    """How the matrices were made."""


class BundleManifest(BaseModel):
    """`bundle.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal[1] = 1
    preprocessing: str = PREPROCESSING
    """Version of the preprocessing code that the bundle goes with."""
    dim: int = Field(ge=2, le=8192)
    text: TextSpec
    image: ImageSpec
    fusion: FusionSpec
    version: str = ""
    """The address that the fields above come to."""

    def address(self) -> str:
        """The `EncoderVersion`: changes with weights, tokenizer, matrices and preprocessing, not with places."""
        content = self.model_dump(mode="json", exclude={"version": True})
        for part in ("text", "image"):
            content[part]["weights"] = content[part]["weights"]["sha256"]
        packed = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return f"mm{self.dim}-{hashlib.sha256(packed.encode()).hexdigest()[:16]}"


def read_bundle(folder: Path) -> tuple[BundleManifest, FixedFusion]:
    """Read and verify a bundle folder.

    Raises `Misconfigured` that names the file at fault, if one is missing, damaged or made for other code.
    """
    sums = _read_sums(folder)
    for name in (_MANIFEST, _FUSION):
        if name not in sums:
            raise Misconfigured(f"encoder bundle {folder}: {_SUMS} does not list {name}")
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            raise Misconfigured(f"encoder bundle {folder}: cannot read {name}: {error.strerror}") from None
        if found != sums[name]:
            raise Misconfigured(
                f"encoder bundle {folder}: {name} is damaged (its SHA-256 is not the one in {_SUMS}); "
                "restore it from a copy, or make it again"
            )
    try:
        manifest = BundleManifest.model_validate_json((folder / _MANIFEST).read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Misconfigured(f"encoder bundle {folder}: {_MANIFEST} does not fit: {where}: {first['msg']}") from None
    if manifest.preprocessing != PREPROCESSING:
        raise Misconfigured(
            f"encoder bundle {folder} was made for preprocessing {manifest.preprocessing}, this is {PREPROCESSING}; "
            "make it again, or run the release that made it"
        )
    if manifest.version != manifest.address() or manifest.fusion.sha256 != sums[_FUSION]:
        raise Misconfigured(
            f"encoder bundle {folder}: its content does not come to its version {manifest.version!r}; it was edited "
            "after it was made"
        )
    return manifest, _read_fusion(folder, manifest)


def _read_sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / _SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise Misconfigured(
            f"{folder} is no encoder bundle: it has no readable {_SUMS} (MIM_ENCODER__BUNDLE names a folder made by "
            "mimstream, or `default`)"
        ) from None
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _read_fusion(folder: Path, manifest: BundleManifest) -> FixedFusion:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        fusion = from_tensors(load_file(folder / _FUSION), manifest.fusion.image_share)
    except (SafetensorError, ValueError) as error:
        raise Misconfigured(f"encoder bundle {folder}: {_FUSION}: {error}") from None
    if fusion.dim != manifest.dim:
        raise Misconfigured(f"encoder bundle {folder}: matrices make {fusion.dim} dimensions, not {manifest.dim}")
    return fusion


def write_bundle(folder: Path, *, text: TextSpec, image: ImageSpec, fusion: FixedFusion, recipe: str) -> BundleManifest:
    """Write a bundle into a new or empty folder. Raises `FileExistsError` if it is in use, else `OSError`."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; bundles are never changed, make a new one")
    save_file({name: np.ascontiguousarray(array) for name, array in to_tensors(fusion).items()}, folder / _FUSION)
    manifest = BundleManifest(
        dim=fusion.dim,
        text=text,
        image=image,
        fusion=FusionSpec(image_share=fusion.image_share, sha256=file_sha256(folder / _FUSION), recipe=recipe),
    )
    manifest = manifest.model_copy(update={"version": manifest.address()})
    (folder / _FUSION).chmod(0o644)  # safetensors writes for the owner alone, and installers keep modes
    (folder / _MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    sums = [f"{file_sha256(folder / name)}  {name}\n" for name in (_MANIFEST, _FUSION)]
    (folder / _SUMS).write_text("".join(sums))
    return manifest
