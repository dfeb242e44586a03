"""Cosine and nearest neighbours in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def unit_rows(vectors: ArrayLike) -> NDArray[np.float32]:
    """(n, d) rows scaled to length 1. Raises `ValueError` for a row that is zero or not finite."""
    rows = np.asarray(vectors, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise ValueError("a vector is zero or not finite, so it has no direction")
    return np.asarray(rows / lengths, dtype=np.float32)


def unit_or_zero_rows(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """(n, d) rows scaled to length 1; zero rows (padding, missing content) stay zero."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9), np.float32)


def cosine(left: ArrayLike, right: ArrayLike) -> NDArray[np.float32]:
    """(n, m) cosines of all rows of `left` (n, d) with all rows of `right` (m, d), in [-1, 1]."""
    similarities: NDArray[np.float32] = np.clip(unit_rows(left) @ unit_rows(right).T, -1.0, 1.0)
    return similarities


def top_k(queries: ArrayLike, vectors: ArrayLike, k: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Row numbers and cosines of the `k` nearest of `vectors` (m, d) to each of `queries` (n, d), nearest first.

    Both results are (n, min(k, m)). Of equally near rows the earlier one comes first.
    """
    if np.shape(vectors)[0] == 0 or k <= 0:
        return np.empty((np.shape(queries)[0], 0), dtype=np.intp), np.empty((np.shape(queries)[0], 0), np.float32)
    similarities = cosine(queries, vectors)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(similarities, order, axis=1)
