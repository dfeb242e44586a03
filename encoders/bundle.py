"""Bundles: folders that fix an encoder bit by bit, verified by checksums.

```text
bundle.json          towers (location, SHA-256, input), fusion, version
fusion.safetensors   means and matrices
SHA256SUMS           of both; readable by `sha256sum -c SHA256SUMS`
```

The version is content-addressed: a hash over matrices, weights, tokenizer and preprocessing, without the location of
the weights. Nothing in a bundle is unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from encoders.digests import file_sha256
from encoders.fixed_fusion import FixedFusion, from_tensors, to_tensors
from encoders.preprocess import PREPROCESSING
from schemas.errors import Misconfigured

DEFAULT_BUNDLE = Path(__file__).parent / "bundles" / "default"
SUMS = "SHA256SUMS"
M = TypeVar("M", bound=BaseModel)
_MANIFEST, _FUSION = "bundle.json", "fusion.safetensors"
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class WeightsPlace(BaseModel):
    """Location and digest of a tower's weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    package: str | None = None
    """Installed Python package that contains them; `path` is then inside it."""
    path: str
    """Path in the package, or absolute, or relative to the bundle folder."""
    sha256: _Sha256
    """Digest of the files that determine the features."""

    def resolve(self, bundle: Path | None) -> Path:
        """The path on this machine. Raises `Misconfigured` if it does not exist."""
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
    """Longest text, specials included; longer ones are truncated."""


class ImageSpec(BaseModel):
    """The image tower."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["efficientnet-lite0", "transformers"]
    weights: WeightsPlace
    size: int = Field(ge=16, le=1024)
    """Height and width of the input."""


class FusionSpec(BaseModel):
    """The fusion of features to vectors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    image_share: float = Field(gt=0.0, lt=1.0)
    """Share of the squared length of the picture's part where both modalities are present."""
    sha256: _Sha256 | None = None
    """Digest of the matrices' file; None where they were drawn by `recipe` and not stored."""
    recipe: str
    """Description of how the matrices were made."""


class BundleManifest(BaseModel):
    """`bundle.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal[1] = 1
    preprocessing: str = PREPROCESSING
    """Version of the preprocessing code that the bundle requires."""
    dim: int = Field(ge=2, le=8192)
    text: TextSpec
    image: ImageSpec
    fusion: FusionSpec
    version: str = ""
    """The `address` of the fields above."""

    def address(self) -> str:
        """The `EncoderVersion`: a hash over weights, tokenizer, matrices and preprocessing, without locations."""
        return f"mm{self.dim}-{content_digest(self.model_dump(mode='json', exclude={'version': True}))}"


def content_digest(content: dict[str, Any]) -> str:
    """16 hex digits over the fields of a manifest, without the locations of tower weights."""
    for part in ("text", "image"):
        content[part]["weights"] = content[part]["weights"]["sha256"]
    packed = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(packed.encode()).hexdigest()[:16]


def read_bundle(folder: Path) -> tuple[BundleManifest, FixedFusion]:
    """Read and verify a bundle folder.

    Raises `Misconfigured` naming the file, if one is missing, damaged or made for other code.
    """
    sums = verified_sums(folder, (_MANIFEST, _FUSION), remake="make")
    manifest = parse_manifest(BundleManifest, folder, _MANIFEST)
    check_manifest(folder, manifest, same=manifest.fusion.sha256 == sums[_FUSION], remake="make")
    return manifest, _read_fusion(folder, manifest)


def verified_sums(folder: Path, names: Sequence[str], *, remake: Literal["make", "train"]) -> dict[str, str]:
    """The digests of `SHA256SUMS` by file name, after a check of `names`. Raises `Misconfigured` naming the file."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise Misconfigured(
            f"{folder} is no encoder bundle: it has no readable {SUMS} (MIM_ENCODER__BUNDLE names a folder made by "
            "mimstream, or `default`)"
        ) from None
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in names:
        if name not in sums:
            raise Misconfigured(f"encoder bundle {folder}: {SUMS} does not list {name}")
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            raise Misconfigured(f"encoder bundle {folder}: cannot read {name}: {error.strerror}") from None
        if found != sums[name]:
            raise Misconfigured(
                f"encoder bundle {folder}: {name} is damaged (its SHA-256 is not the one in {SUMS}); "
                f"restore it from a copy, or {remake} it again"
            )
    return sums


def parse_manifest(model: type[M], folder: Path, name: str) -> M:
    """Read a JSON file of a bundle. Raises `Misconfigured` naming the file and the field."""
    try:
        return model.model_validate_json((folder / name).read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Misconfigured(f"encoder bundle {folder}: {name} does not fit: {where}: {first['msg']}") from None


class _Versioned(Protocol):
    preprocessing: str
    version: str

    def address(self) -> str: ...


def check_manifest(folder: Path, manifest: _Versioned, *, same: bool, remake: Literal["make", "train"]) -> None:
    """Raise `Misconfigured` if a bundle needs other code, or its version or weights (`same`) were changed."""
    if manifest.preprocessing != PREPROCESSING:
        raise Misconfigured(
            f"encoder bundle {folder} was made for preprocessing {manifest.preprocessing}, this is {PREPROCESSING}; "
            f"{remake} it again, or run the release that made it"
        )
    if manifest.version != manifest.address() or not same:
        raise Misconfigured(
            f"encoder bundle {folder}: its content does not come to its version {manifest.version!r}; it was edited "
            "after it was made"
        )


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
    """Write a bundle into a new or empty folder. Raises `FileExistsError` if the folder is not empty."""
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
    (folder / _FUSION).chmod(0o644)  # safetensors makes files private, and installers keep modes
    (folder / _MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    sums = [f"{file_sha256(folder / name)}  {name}\n" for name in (_MANIFEST, _FUSION)]
    (folder / SUMS).write_text("".join(sums))
    return manifest
