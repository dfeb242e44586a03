"""Logistic regression on the tabular features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.offline.data import CtrData
from trainer.offline.tabular import tabular, target_category


class Logistic:
    """L2-regularised; columns standardised by the training rows, the category one-hot."""

    name = "logistic"
    calibrated = True
    trials: Sequence[Mapping[str, Any]] = [{"c": 0.003}, {"c": 0.03}, {"c": 0.3}, {"c": 3.0}]

    def fit(self, train: CtrData, validation: CtrData | None, *, seed: int, trial: Mapping[str, Any]) -> None:
        """Learn to convergence; `seed` changes nothing."""
        from sklearn.linear_model import LogisticRegression

        columns, _ = tabular(train)
        self._mean, self._scale = columns.mean(0), columns.std(0)
        self._scale[self._scale < 1e-6] = 1.0
        self._model = LogisticRegression(C=float(trial["c"]), max_iter=500)
        self._model.fit(self._inputs(train), train.rows.label_N)

    def predict(self, data: CtrData) -> NDArray[np.float64]:
        """Probabilities."""
        return np.asarray(self._model.predict_proba(self._inputs(data))[:, 1], np.float64)

    def _inputs(self, data: CtrData) -> Any:
        from scipy.sparse import csr_matrix, hstack

        columns, _ = tabular(data)
        scaled = np.clip((columns - self._mean) / self._scale, -8, 8).astype(np.float64)
        category, n = target_category(data), len(data)
        size = int(data.items.category_I.max(initial=0)) + 1
        one_hot = csr_matrix((np.ones(n), category, np.arange(n + 1)), shape=(n, size))
        return hstack([csr_matrix(scaled), one_hot]).tocsr()
