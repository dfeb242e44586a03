"""The image towers: pixels to features. EfficientNet-lite0 by default, or any transformers vision model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.arithmetic import computing, sent
from encoders.config import Precision
from encoders.digests import file_sha256, files_sha256
from encoders.text import load_into, model_files
from schemas.errors import Misconfigured

_PICTURES_PER_PASS = {"cpu": 8}
"""On a CPU feature maps should fit the caches, and up to 8 pictures each is bit-identical to a pass of its own (16 use
other kernels); other devices use 64."""


class ImageTower(Protocol):
    """(size, size, 3) RGB bytes to `width` features."""

    size: int
    width: int

    def features(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """(n, width) features in the order given."""
        ...

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load trained weights by name. Raises `ValueError` for an unknown name or shape."""
        ...


class EfficientNetLite0:
    """EfficientNet-lite0, pre-trained on ImageNet; mean over the last feature map, 1280 features.

    Input is (rgb - 127) / 128, as in its training. Batch normalisation is folded into the convolutions.

    With precision bf16 it computes in fp32: with 8 bits the lowest cosine of its features to fp32 is .99 on product
    photos, where the text tower has .9999. With fp16 it has .9999.
    """

    width = 1280

    def __init__(
        self,
        weights: Path,
        *,
        sha256: str,
        size: int,
        device: str = "cpu",
        precision: Precision = "fp32",
        compiled: bool = False,
    ) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        self.size = size
        self._device = torch.device(device)
        self._precision: Precision = "fp32" if precision == "bf16" else precision
        found = file_sha256(weights)
        if found != sha256:
            raise Misconfigured(
                f"image weights {weights} have SHA-256 {found}, the bundle was made with {sha256}; "
                "install the package version that the bundle names"
            )
        # a .pth: verified by its checksum, and read as tensors only
        state = torch.load(weights, map_location="cpu", weights_only=True)
        model = EfficientNet.from_name("efficientnet-lite0", image_size=size)
        model.load_state_dict(state)
        network = _without_copies(_fold_batch_norms(model.eval())).requires_grad_(False)
        self.network: Any = network.to(device=self._device, memory_format=torch.channels_last)
        maps = self.network.extract_features
        self._maps: Any = torch.compile(maps, dynamic=True) if compiled else maps

    @torch.inference_mode()
    def features(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """(n, 1280) features in the order given."""

        def pooled(part: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
            with computing(self._device, self._precision):
                maps: torch.Tensor = self._maps(self.scaled(part))
            return maps.float().mean((2, 3))

        return _in_passes(pictures, pooled, self._device, self.width)

    def scaled(self, pictures: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """(n, 3, size, size) input of the network."""
        return (_to_tensor(pictures, self._device) - 127.0) / 128.0

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load trained weights by name. Raises `ValueError` for an unknown name or shape."""
        load_into(self.network, weights)


def _to_tensor(pictures: Sequence[NDArray[np.uint8]], device: torch.device) -> torch.Tensor:
    """(n, 3, size, size) float32 in 0..255, channels last in memory."""
    return sent(torch.from_numpy(np.stack(pictures)), device).permute(0, 3, 1, 2).float()


def _in_passes(
    pictures: Sequence[NDArray[np.uint8]],
    pooled: Callable[[Sequence[NDArray[np.uint8]]], torch.Tensor],
    device: torch.device,
    width: int,
) -> NDArray[np.float32]:
    """(n, width) features in passes of several pictures, with one wait for a GPU at the end."""
    if not pictures:
        return np.empty((0, width), np.float32)
    step = _PICTURES_PER_PASS.get(device.type, 64)
    parts = [pooled(pictures[start : start + step]) for start in range(0, len(pictures), step)]
    return np.asarray(torch.cat(parts).cpu().numpy(), np.float32)


def _fold_batch_norms(model: Any) -> Any:
    """Fold each batch normalisation into the convolution before it: the same function at a fifth less work."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    identity = torch.nn.Identity()
    model._conv_stem, model._bn0 = fuse_conv_bn_eval(model._conv_stem, model._bn0), identity
    model._conv_head, model._bn1 = fuse_conv_bn_eval(model._conv_head, model._bn1), identity
    for block in model._blocks:
        if hasattr(block, "_expand_conv"):
            block._expand_conv, block._bn0 = fuse_conv_bn_eval(block._expand_conv, block._bn0), identity
        block._depthwise_conv, block._bn1 = fuse_conv_bn_eval(block._depthwise_conv, block._bn1), identity
        block._project_conv, block._bn2 = fuse_conv_bn_eval(block._project_conv, block._bn2), identity
    return model


def _without_copies(model: Any) -> Any:
    """Pad inside the convolutions where all sides are equal, clip in place: the same function with fewer copies."""
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU6):
            module.inplace = True
        padding = getattr(getattr(module, "static_padding", None), "padding", None)
        if padding is not None and len(set(padding)) == 1:
            module.padding, module.static_padding = (padding[0], padding[0]), torch.nn.Identity()
    return model


class TransformersVision:
    """Any transformers vision model in a local folder: its pooled output, else the mean over its last states."""

    def __init__(
        self,
        folder: Path,
        *,
        size: int | None = None,
        device: str = "cpu",
        precision: Precision = "fp32",
        compiled: bool = False,
    ) -> None:
        from transformers import AutoModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a service's log holds lines
        self._device = torch.device(device)
        self._precision = precision
        try:
            model: Any = AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
            settings = json.loads((folder / "preprocessor_config.json").read_text())
        except (OSError, ValueError, KeyError) as error:
            raise Misconfigured(f"image model in {folder} cannot be loaded: {error}") from error
        model = getattr(model, "vision_model", model)
        self.network: Any = model.eval().requires_grad_(False).to(self._device)
        self._run: Any = torch.compile(self.network, dynamic=True) if compiled else self.network
        self.size = size or _declared_size(settings)
        mean, std = settings.get("image_mean", [0.5] * 3), settings.get("image_std", [0.5] * 3)
        self._mean = torch.tensor(mean, device=self._device).view(1, 3, 1, 1) * 255.0
        self._std = torch.tensor(std, device=self._device).view(1, 3, 1, 1) * 255.0
        blank = np.zeros((self.size, self.size, 3), dtype=np.uint8)
        with torch.inference_mode():
            self.width: int = self.pooled(self.scaled([blank])).shape[1]

    def scaled(self, pictures: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """(n, 3, size, size) input of the network."""
        return (_to_tensor(pictures, self._device) - self._mean) / self._std

    def pooled(self, batch: torch.Tensor, network: Any = None) -> torch.Tensor:
        """(n, width) features of scaled pictures; `network` replaces the tower's own in training."""
        result = (network or self.network)(pixel_values=batch)
        pooled = getattr(result, "pooler_output", None)
        if pooled is None:
            states = result.last_hidden_state
            pooled = states.mean(1) if states.ndim == 3 else states.mean((2, 3))
        features: torch.Tensor = pooled.flatten(1).float()
        return features

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load trained weights by name. Raises `ValueError` for an unknown name or shape."""
        load_into(self.network, weights)

    @torch.inference_mode()
    def features(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """(n, width) features in the order given."""

        def pooled(part: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
            with computing(self._device, self._precision):
                return self.pooled(self.scaled(part), self._run)

        return _in_passes(pictures, pooled, self._device, self.width)


def _declared_size(settings: dict[str, Any]) -> int:
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    return int(size or 224)


def vision_model_sha256(folder: Path) -> str:
    """Digest of the files that determine a transformers vision tower's features."""
    return files_sha256(folder, model_files(folder, "preprocessor_config.json"))
