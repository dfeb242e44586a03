"""Boosted trees (LightGBM) on the tabular features: the main baseline of the networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.offline.data import CtrData
from trainer.offline.tabular import tabular, target_category

_TIME_AND_POPULARITY = ("takes", "item idle", "age", "history length", "has history", "user idle")


class Trees:
    """Gradient boosting on every feature, the category as a categorical split."""

    name = "trees"
    calibrated = True
    trials: Sequence[Mapping[str, Any]] = [
        {"leaves": 4, "rounds": 150, "rate": 0.05, "leaf_rows": 400},
        {"leaves": 7, "rounds": 200, "rate": 0.05, "leaf_rows": 200},
        {"leaves": 15, "rounds": 300, "rate": 0.05, "leaf_rows": 100},
        {"leaves": 31, "rounds": 400, "rate": 0.05, "leaf_rows": 100},
        {"leaves": 63, "rounds": 600, "rate": 0.03, "leaf_rows": 200},
        {"leaves": 63, "rounds": 1200, "rate": 0.03, "leaf_rows": 200},
        {"leaves": 127, "rounds": 1000, "rate": 0.02, "leaf_rows": 300},
        {"leaves": 255, "rounds": 1500, "rate": 0.02, "leaf_rows": 500},
    ]

    def fit(self, train: CtrData, validation: CtrData | None, *, seed: int, trial: Mapping[str, Any]) -> None:
        """Train the trial's number of trees, without early stopping, so that a refit without validation is the same."""
        import lightgbm  # here, because it takes a while

        inputs, categorical = self._inputs(train)
        table = lightgbm.Dataset(inputs, train.rows.label_N, categorical_feature=categorical, free_raw_data=True)
        parameters = {
            "objective": "binary",
            "num_leaves": trial["leaves"],
            "learning_rate": trial["rate"],
            "min_data_in_leaf": trial["leaf_rows"],
            "feature_fraction": 0.7,
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "lambda_l2": 1.0,
            "max_cat_threshold": 16,
            "cat_smooth": 50.0,
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "verbosity": -1,
        }
        self._model = lightgbm.train(parameters, table, num_boost_round=int(trial["rounds"]))

    def predict(self, data: CtrData) -> NDArray[np.float64]:
        """Probabilities."""
        return np.asarray(self._model.predict(self._inputs(data)[0]), np.float64)

    def _inputs(self, data: CtrData) -> tuple[NDArray[np.float64], list[int]]:
        columns, _ = tabular(data)
        return np.concatenate([columns, target_category(data)[:, None]], axis=1).astype(np.float64), [columns.shape[1]]


class DenseOnly(Trees):
    """The same trees on popularity, age and time alone.

    It has no feature of a user's interests, so an AUC above one half measures the bias of the exposures.
    """

    name = "dense-only"

    def _inputs(self, data: CtrData) -> tuple[NDArray[np.float64], list[int]]:
        names = data.rows.dense_names
        chosen = [place for place, name in enumerate(names) if name.startswith(_TIME_AND_POPULARITY)]
        return data.rows.dense_NF[:, chosen].astype(np.float64), []
