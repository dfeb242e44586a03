"""Untrained baselines whose score is one feature. Tuning chooses which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.offline.data import CtrData
from trainer.offline.tabular import column


class OneFeature:
    """A baseline that scores by one feature."""

    calibrated = False

    def __init__(self, name: str, features: Sequence[str]) -> None:
        self.name = name
        self.trials: Sequence[Mapping[str, Any]] = [{"feature": feature} for feature in features]
        self._feature = features[0]

    def fit(self, train: CtrData, validation: CtrData | None, *, seed: int, trial: Mapping[str, Any]) -> None:
        """Store which feature to use."""
        self._feature = str(trial["feature"])

    def predict(self, data: CtrData) -> NDArray[np.float64]:
        """Values of the feature."""
        return column(data, self._feature)


def popularity() -> OneFeature:
    """Takes of the item by all users: so far, or recent."""
    return OneFeature("popularity", ["takes", "takes 1d", "takes 7d"])


def category_affinity() -> OneFeature:
    """Share of the target's category in the user's history."""
    return OneFeature("category-affinity", ["category lift", "category share", "category recent", "category takes"])


def content_knn() -> OneFeature:
    """Cosine of the target with the history."""
    return OneFeature("content-knn", ["cosine mean", "cosine recent", "cosine largest", "cosine newest"])
