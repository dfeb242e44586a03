"""The base of all neural models of the comparison: columns, one training loop, probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trainer.offline.data import CtrData
from trainer.offline.neural.columns import ColumnBatches
from trainer.offline.neural.fitting import FitReport, FitSettings, fit, predict

HISTORY_LENGTH = 50
CATEGORIES = 1024
NUMERIC_WIDTH = 8
"""Width of the embedding of each numeric feature in every peer, as CiUBM has it."""
_PLAIN: Mapping[str, Any] = {"cross_layers": 0}
_CROSSED: Mapping[str, Any] = {"cross_layers": 2}
_DROPPED: Mapping[str, Any] = {"dropout": 0.1, "id_dropout": 0.5}
TRIALS: tuple[Mapping[str, Any], ...] = (
    _PLAIN,
    _CROSSED,
    {**_PLAIN, **_DROPPED},
    {**_CROSSED, **_DROPPED},
    {**_CROSSED, **_DROPPED, "learning_rate": 5e-4, "id_learning_rate": 2e-3, "epochs": 3},
    {**_CROSSED, **_DROPPED, "epochs": 1, "learning_rate": 4e-3},
    {**_PLAIN, "dropout": 0.3, "group_weight": 0.0},
    {**_CROSSED, "dropout": 0.3, "id_dropout": 0.5, "group_weight": 0.0},
)
"""Trials of every neural model, so that none has a head, a regulariser or a loss that another lacks: with and without
cross layers, dropout and dropout of ids; then slow and long, short and fast, and twice more dropout without the ranking
term."""
SIMILARITIES = ("cosine", "has vector")
"""Prefixes of the columns made from vectors, for models with similarities only."""


class NeuralModel:
    """A `CtrModel` over a network. Trials mix fields of `FitSettings` with settings of the network itself."""

    name = ""
    calibrated = True
    trials: Sequence[Mapping[str, Any]] = ({},)
    left_out: tuple[str, ...] = ()
    """Prefixes of the names of features that this model must not read."""
    content = True
    """Whether the network reads vectors; if not, none are gathered for it."""

    def __init__(self) -> None:
        self.network: nn.Module | None = None
        self.report: FitReport | None = None

    def build(self, settings: Mapping[str, Any], *, vector_width: int, dense_width: int, seed: int) -> nn.Module:
        """An untrained network; `settings` are the fields of a trial beyond `FitSettings`."""
        raise NotImplementedError

    def fit(self, train: CtrData, validation: CtrData | None, *, seed: int, trial: Mapping[str, Any]) -> None:
        """Train for the trial's epochs; validation rows are reported on, and change nothing."""
        names = {one.name for one in fields(FitSettings)}
        chosen = dict(trial)
        settings = FitSettings(**{name: value for name, value in chosen.items() if name in names})
        columns = self._columns(train)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = self.build(
                {name: value for name, value in chosen.items() if name not in names},
                vector_width=train.items.vectors_EIV.shape[2],
                dense_width=columns.dense_NF.shape[1],
                seed=seed,
            )
            self.report = self.learn(
                columns,
                None if validation is None else self._columns(validation),
                settings,
                seed=seed,
            )

    def learn(
        self, train: ColumnBatches, validation: ColumnBatches | None, settings: FitSettings, *, seed: int
    ) -> FitReport:
        """Train `network`."""
        assert self.network is not None
        return fit(self.network, train, validation, settings, seed=seed)

    def predict(self, data: CtrData) -> NDArray[np.float64]:
        """Probabilities in the order of the rows."""
        assert self.network is not None, "fit first"
        return predict(self.network, self._columns(data))

    def _columns(self, data: CtrData) -> ColumnBatches:
        return ColumnBatches(data, history_length=HISTORY_LENGTH, left_out=self.left_out, content=self.content)
