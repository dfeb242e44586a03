"""Logistic regression on the tabular features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import Misconfigured
from trainer.offline.data import CtrData
from trainer.offline.tabular import tabular, target_category

_WIDEST = 8.0
"""Standardised values are clipped to this, so that outliers do not dominate."""


class Logistic:
    """L2-regularised; columns standardised by the training rows, the category one-hot."""

    name = "logistic"
    calibrated = True
    trials: Sequence[Mapping[str, Any]] = [{"c": c} for c in (1e-5, 1e-4, 1e-3, 0.003, 0.03, 0.3, 3.0, 30.0)]

    def fit(self, train: CtrData, validation: CtrData | None, *, seed: int, trial: Mapping[str, Any]) -> None:
        """Train to convergence; `seed` has no effect."""
        try:
            from sklearn.compose import ColumnTransformer
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import OneHotEncoder
        except ImportError:
            raise Misconfigured(f"model {self.name!r} needs scikit-learn: pip install scikit-learn") from None
        columns, _ = tabular(train)
        self._mean, self._scale = columns.mean(0), columns.std(0)
        self._scale[self._scale < 1e-6] = 1.0
        category = [("category", OneHotEncoder(handle_unknown="ignore"), [columns.shape[1]])]
        self._model = make_pipeline(
            ColumnTransformer(category, remainder="passthrough", sparse_threshold=1.0),
            LogisticRegression(C=float(trial["c"]), max_iter=1_000),
        )
        self._model.fit(self._inputs(train), train.rows.label_N)

    def predict(self, data: CtrData) -> NDArray[np.float64]:
        """Probabilities."""
        return np.asarray(self._model.predict_proba(self._inputs(data))[:, 1], np.float64)

    def _inputs(self, data: CtrData) -> NDArray[np.float64]:
        columns, _ = tabular(data)
        scaled = np.clip((columns - self._mean) / self._scale, -_WIDEST, _WIDEST)
        return np.concatenate([scaled, target_category(data)[:, None]], axis=1).astype(np.float64)
