"""CiUBM on recorded impressions: the class that the stream trains and the server scores with, and its ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.ciubm import CiUBM
from trainer.config import CiUBMConfig
from trainer.offline.neural.base import CATEGORIES, NeuralModel

FULL: Mapping[str, Any] = {
    "categories": CATEGORIES,
    "numeric_bins": 24,
    "numeric_width": 8,
    "heads": 8,
    "dropout": 0.1,
    "bilinear_interest": True,
}
"""What the offline form adds to the defaults: features as of the moment are many, so numbers get bins and heads."""


class Ciubm(NeuralModel):
    """CiUBM. `switches` go over the defaults; an ablation is a subclass that turns one off."""

    name = "ciubm"
    trials: Sequence[Mapping[str, Any]] = (
        {},
        {"group_weight": 0.5},
        {"learning_rate": 1e-3, "epochs": 3},
        {"dropout": 0.25},
    )
    switches: Mapping[str, Any] = {}

    def build(self, settings: Mapping[str, Any], *, vector_width: int, dense_width: int, seed: int) -> CiUBM:
        """The network with these settings of `CiUBMConfig`."""
        config = CiUBMConfig(**{**FULL, **settings, **self.switches})
        return CiUBM(config, vector_width=vector_width, dense_width=dense_width, seed=seed)
