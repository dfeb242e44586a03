"""What an offline CTR model can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.offline.data import CtrData


class CtrModel(Protocol):
    """A model that is fitted once, on impressions, and scores others."""

    name: str
    trials: Sequence[Mapping[str, Any]]
    """Settings tried by tuning, eight for every model that learns; models without settings have one empty trial."""
    calibrated: bool
    """Whether scores are probabilities; if not, log-loss, NE and calibration are not reported."""

    def fit(self, train: CtrData, validation: CtrData | None, *, seed: int, trial: Mapping[str, Any]) -> None:
        """Train. `validation`, where given, is for early stopping or calibration; it is never the test span."""
        ...

    def predict(self, data: CtrData) -> NDArray[np.float64]:
        """Scores in the order of the rows, shape (N,)."""
        ...
