"""Peers that learn nothing: one feature of the moment is the score. Tuning chooses which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.offline.data import CtrData
from trainer.offline.tabular import column


class OneFeature:
    """Scores by one feature."""

    calibrated = False

    def __init__(self, name: str, features: Sequence[str]) -> None:
        self.name = name
        self.trials: Sequence[Mapping[str, Any]] = [{"feature": feature} for feature in features]
        self._feature = features[0]

    def fit(self, train: CtrData, validation: CtrData | None, *, seed: int, trial: Mapping[str, Any]) -> None:
        """Remember which feature to use."""
        self._feature = str(trial["feature"])

    def predict(self, data: CtrData) -> NDArray[np.float64]:
        """Its values."""
        return column(data, self._feature)


def popularity() -> OneFeature:
    """Takes of the item by anyone: so far, or lately."""
    return OneFeature("popularity", ["takes", "takes 1d", "takes 7d", "takes 30d"])


def category_affinity() -> OneFeature:
    """How much of the user's history is of the target's category."""
    return OneFeature("category-affinity", ["category lift", "category share", "category recent", "category takes"])


def content_knn() -> OneFeature:
    """Cosine of the target with the history."""
    return OneFeature("content-knn", ["cosine mean", "cosine recent", "cosine largest", "cosine newest"])
