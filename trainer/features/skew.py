"""Whether a server computed the features that a trainer computes from its own state of the same version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from schemas.skew import ServedRows
from trainer.features.columns import features
from trainer.features.config import FeatureConfig
from trainer.features.states import ItemStates
from trainer.samples.searches import query_item

TOLERANCE = 1e-3
"""Largest difference of a feature that counts as none."""

StatesOf = Callable[[Sequence[str]], ItemStates]
"""States of items by id, of the version that the rows are of; row 0 is padding."""


@dataclass
class Skew:
    """What was compared so far."""

    rows: int = 0
    differing: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    """By feature that differs, the largest difference."""

    def add(self, config: FeatureConfig, served: ServedRows, states_of: StatesOf) -> None:
        """Compare the rows of a request. Raises `ValueError` if they do not have the features of `config`."""
        theirs_BF = values_of(served, len(config.names))
        apart_BF = np.abs(theirs_BF - recomputed(config, served, states_of))
        apart_BF[np.isnan(apart_BF)] = np.inf
        beyond_BF = apart_BF > TOLERANCE
        self.rows += len(beyond_BF)
        self.differing += int(beyond_BF.any(axis=1).sum())
        for place in np.flatnonzero(beyond_BF.any(axis=0)).tolist():
            name, most = config.names[place], float(min(apart_BF[:, place].max(), np.finfo(np.float32).max))
            self.largest[name] = max(most, self.largest.get(name, 0.0))


def values_of(served: ServedRows, width: int) -> NDArray[np.float32]:
    """The logged features, shape (rows, width). Raises `ValueError` if there are more or fewer."""
    return np.frombuffer(served.values, "<f4").reshape(len(served.targets), width)


def recomputed(config: FeatureConfig, served: ServedRows, states_of: StatesOf) -> NDArray[np.float32]:
    """The features of a request's rows from other states, shape (rows, F)."""
    count, taken = len(served.targets), len(served.history)
    query = [] if served.query is None else [query_item(served.query)]
    states = states_of([*served.targets, *served.history, *query])
    history_L = np.arange(count + taken, count, -1) if taken else np.zeros(1, np.int64)
    seconds_L = np.array(served.history_seconds[::-1], np.int64) if taken else np.zeros(1, np.int64)
    now_B = np.full(count, served.now)
    query_B = np.full(count, len(states) - 1 if query else 0)
    return features(config, states, np.arange(1, count + 1), history_L[None], seconds_L[None], now_B, query_B=query_B)
