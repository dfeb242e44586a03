"""The image tower computes what the package's own model does, only with less work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet

from encoders.bundle import DEFAULT_BUNDLE, read_bundle
from encoders.calibration import calibration_pictures
from encoders.image import EfficientNetLite0, _declared_size
from schemas.errors import Misconfigured


@pytest.fixture(scope="module")
def weights() -> tuple[Path, str]:
    manifest, _ = read_bundle(DEFAULT_BUNDLE)
    return manifest.image.weights.resolve(DEFAULT_BUNDLE), manifest.image.weights.sha256


@pytest.mark.parametrize("size", [96, 128, 224])
def test_folding_and_padding_change_nothing(weights: tuple[Path, str], size: int) -> None:
    path, sha256 = weights
    pictures = calibration_pictures(10, size=size)  # more than one pass of eight
    plain = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    plain.load_state_dict(torch.load(path, weights_only=True))
    batch = (torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() - 127) / 128
    with torch.no_grad():
        expected = plain.eval().extract_features(batch).mean((2, 3)).numpy()
    found = EfficientNetLite0(path, sha256=sha256, size=size).features(pictures)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_half_precision_stays_near_and_bf16_which_does_not_is_not_used(weights: tuple[Path, str]) -> None:
    path, sha256 = weights
    pictures = calibration_pictures(6, size=96)
    full, half, bf16 = (
        EfficientNetLite0(path, sha256=sha256, size=96, precision=precision).features(pictures)
        for precision in ("fp32", "fp16", "bf16")
    )
    cosines = (full * half).sum(1) / np.linalg.norm(full, axis=1) / np.linalg.norm(half, axis=1)
    assert cosines.min() > 0.999
    assert not np.array_equal(full, half)
    np.testing.assert_array_equal(full, bf16)


def test_weights_with_another_checksum_are_refused_unread(weights: tuple[Path, str], tmp_path: Path) -> None:
    """Bytes that torch.load would choke on: the checksum has to come first."""
    path = tmp_path / "model.pth"
    path.write_bytes(b"not even a zip")
    with pytest.raises(Misconfigured, match="SHA-256"):
        EfficientNetLite0(path, sha256=weights[1], size=96)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}}, 224),
        ({"do_center_crop": False, "crop_size": 224, "size": {"shortest_edge": 256}}, 256),
        ({"size": {"height": 384, "width": 384}}, 384),
        ({}, 224),
    ],
)
def test_pictures_have_the_size_that_the_model_crops_to_or_else_resizes_to(settings: dict[str, Any], size: int) -> None:
    assert _declared_size(settings) == size
