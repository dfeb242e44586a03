"""What an offline CTR model can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.offline.data import CtrData


class CtrModel(Protocol):
    """Learns from impressions, then scores others. A new object per fit: `fit` is called once."""

    name: str
    trials: Sequence[Mapping[str, Any]]
    """What tuning tries, four for every model; models without settings have one empty trial."""
    calibrated: bool
    """Whether scores are probabilities; if not, only their order counts: no log-loss, NE or calibration."""

    def fit(self, train: CtrData, validation: CtrData | None, *, seed: int, trial: Mapping[str, Any]) -> None:
        """Learn. `validation` is for early stopping or calibration where it is given, and never the test span."""
        ...

    def predict(self, data: CtrData) -> NDArray[np.float64]:
        """Scores in the order of the rows, shape (N,)."""
        ...
