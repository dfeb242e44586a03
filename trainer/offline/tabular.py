"""Inputs of models without embeddings: the dense features and the target's attributes and category."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from schemas.errors import Misconfigured
from trainer.offline.data import CtrData


def tabular(data: CtrData) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """The features of CiUBM, with similarity columns instead of id tables and vectors, shape (N, F + A)."""
    attributes = data.items.attributes_IA[data.rows.item_N]
    names = (*data.rows.dense_names, *(f"target {name}" for name in data.items.attribute_names))
    return np.concatenate([data.rows.dense_NF, attributes], axis=1), names


def target_category(data: CtrData) -> NDArray[np.int64]:
    """Number of each target's category, 0 unknown."""
    return data.items.category_I[data.rows.item_N]


def column(data: CtrData, name: str) -> NDArray[np.float64]:
    """One feature by name. Raises `Misconfigured` for an unknown name."""
    if name not in data.rows.dense_names:
        raise Misconfigured(f"the impressions have no feature {name!r}; they have {', '.join(data.rows.dense_names)}")
    return data.rows.dense_NF[:, data.rows.dense_names.index(name)].astype(np.float64)
