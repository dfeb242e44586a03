"""The fixed fusion: features of two towers to one unit vector, and the fit of its matrices.

For each modality x with features f: z = unit((prepared f - mean) @ matrix). The item is
unit([sqrt(1 - share) z_text ; sqrt(share) z_image]), so the cosine of two items is a weighted mean of the cosines of
their texts and of their pictures. An item without one modality is the other one alone, scaled to length 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.errors import EncodingFailed, Reason

_SMALLEST_LENGTH = 1e-6
"""A projected vector shorter than this is rounding noise without a meaningful direction."""


@dataclass(frozen=True, eq=False)
class Projection:
    """The projection of one modality to its part of the vector."""

    mean: NDArray[np.float32]
    """(width,) mean of ordinary content, after scaling the features to length 1."""
    matrix: NDArray[np.float32]
    """(width, d) fixed directions."""

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, width) features to (n, d) unit rows; `EncodingFailed` with `BAD_VECTOR` if one has no direction."""
        # a product per row: in one for all, the rounding of a row depends on their number
        return _unit(((_unit(features) - self.mean)[:, None] @ self.matrix)[:, 0])


@dataclass(frozen=True, eq=False)
class FixedFusion:
    """Text and picture features to unit vectors of `dim` numbers."""

    text: Projection
    image: Projection
    image_share: float
    """Share of the squared length of the picture's part where both are present; between 0 and 1, both excluded."""

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self.text.matrix.shape[1] + self.image.matrix.shape[1])

    def __call__(
        self,
        count: int,
        text_rows: NDArray[np.intp],
        text_features: NDArray[np.float32],
        image_rows: NDArray[np.intp],
        image_features: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """(count, dim) unit rows; `..._rows` are the items of the features, each item in at least one."""
        missing = np.ones(count, dtype=bool)
        missing[text_rows] = missing[image_rows] = False
        if missing.any():
            raise EncodingFailed(Reason.NO_CONTENT, f"{int(missing.sum())} of {count} items have no features at all")
        split = self.text.matrix.shape[1]
        fused = np.zeros((count, self.dim), dtype=np.float32)
        fused[text_rows, :split] = np.sqrt(1.0 - self.image_share) * self.text(text_features)
        fused[image_rows, split:] = np.sqrt(self.image_share) * self.image(image_features)
        return _unit(fused)  # with one modality missing, the other one is the whole vector


def _unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not ((lengths > _SMALLEST_LENGTH) & np.isfinite(lengths)).all():
        raise EncodingFailed(Reason.BAD_VECTOR, "features are not finite or have no direction; look at the weights")
    return np.asarray(rows / lengths, dtype=np.float32)


def fit_projection(features: NDArray[np.float32], dim: int, *, drop: int) -> Projection:
    """Centre on the mean of calibration features (n, width) and keep `dim` principal directions after the first `drop`.

    The first directions only separate kinds of catalogues (goods from films, photos from drawings): inside one shop
    they are a constant of all items. The rest are scaled by the inverse root of their deviation, half way to whitening,
    because the synthetic content is a poor estimate of a direction's strength in a real shop.
    """
    rows = _unit(features).astype(np.float64)
    mean = rows.mean(0)
    centred = rows - mean
    variances, directions = np.linalg.eigh(centred.T @ centred / len(rows))
    chosen = slice(-1 - drop, -1 - drop - dim, -1)  # eigh sorts upwards
    matrix = directions[:, chosen]
    matrix = matrix * np.sign(
        matrix[np.abs(matrix).argmax(0), np.arange(dim)]
    )  # eigenvectors have no sign of their own
    deviations = np.sqrt(np.maximum(variances[chosen], 1e-12))
    return Projection(mean.astype(np.float32), (matrix / np.sqrt(deviations)).astype(np.float32))


def draw_projection(features: NDArray[np.float32], dim: int, *, seed: int) -> Projection:
    """Centre on the mean of calibration features (n, width) and draw `dim` orthonormal directions from `seed`.

    Keeps cosines up to about 1 / sqrt(dim). Unlike principal directions, it is the same on every machine.
    """
    mean = _unit(features).astype(np.float64).mean(0)
    drawn = np.random.default_rng(seed).standard_normal((features.shape[1], dim))
    matrix, triangle = np.linalg.qr(drawn)
    return Projection(mean.astype(np.float32), (matrix * np.sign(np.diag(triangle))).astype(np.float32))


def to_tensors(fusion: FixedFusion) -> dict[str, NDArray[np.float32]]:
    """Named arrays of a bundle."""
    return {
        "image.matrix": fusion.image.matrix,
        "image.mean": fusion.image.mean,
        "text.matrix": fusion.text.matrix,
        "text.mean": fusion.text.mean,
    }


def from_tensors(arrays: Mapping[str, NDArray[np.float32]], image_share: float) -> FixedFusion:
    """Inverse of `to_tensors`. Raises `ValueError` if arrays are missing, of the wrong shape or not finite."""
    expected = {"image.matrix", "image.mean", "text.matrix", "text.mean"}
    if set(arrays) != expected:
        raise ValueError(f"expected the arrays {sorted(expected)}, found {sorted(arrays)}")
    for name, array in arrays.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite float32")
    for part in ("image", "text"):
        mean, matrix = arrays[f"{part}.mean"], arrays[f"{part}.matrix"]
        if mean.ndim != 1 or matrix.ndim != 2 or matrix.shape[0] != mean.shape[0] or matrix.shape[1] == 0:
            raise ValueError(f"{part}: mean {mean.shape} and matrix {matrix.shape} do not fit together")
    return FixedFusion(
        text=Projection(arrays["text.mean"], arrays["text.matrix"]),
        image=Projection(arrays["image.mean"], arrays["image.matrix"]),
        image_share=image_share,
    )
