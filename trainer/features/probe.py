"""Features of a few rows that are always the same, by which two installations see whether they compute the same.

The version of a feature set covers names and constants. What a formula does is only in the code, so a release carries
the values of this probe, and whoever loads it computes them again. They go through counting and reading alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from schemas.attributes import Attribute
from trainer.features.columns import features
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState
from trainer.features.take_columns import TakeColumns
from trainer.samples.id_hashes import hash_columns
from trainer.samples.item_facts import FactRows, facts_of

TOLERANCE = 1e-3
"""Largest difference of a value that counts as none: sums of float32 differ a little between processors."""

_ITEMS, _USERS, _TAKES = 8, 4, 40
_BEGIN = 1_700_000_000


class _Items:
    def __init__(self, config: FeatureConfig) -> None:
        names = [f"probe {n}" for n in range(_ITEMS)]
        self._hashes_I2 = np.concatenate([np.zeros((1, 2), np.int64), hash_columns(names)])
        self._facts = FactRows.empty(config, 1 + _ITEMS)
        for n in range(1, _ITEMS):  # of the last one nothing is known
            attributes: dict[str, Attribute] = {
                name: [f"{name} {n % 3}", f"{name} {n}"] for name in config.attributes or ("a", "b")
            }
            attributes |= {name: 3.0 * n for name in config.numbers if name not in ("price", "year")}
            self._facts.put(
                n,
                facts_of(
                    config,
                    category=f"category {n % 3}",
                    price=5.0 * n,
                    year=1990 + 4 * n,
                    attributes=attributes,
                    published_at=_BEGIN - 86_400.0 * n,
                    published_at_is="inferred" if n == 2 else "known",
                ),
            )

    def hashes(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._hashes_I2[numbers]

    def facts(self, numbers: NDArray[np.int64]) -> FactRows:
        return self._facts.rows(numbers)


def probe(config: FeatureConfig) -> list[float]:
    """The values, row by row in the order of the features' names; the last row is of a drawn exposure."""
    items = _Items(config)
    small = {"max_items": 64, "max_users": 64, "remembered_takes": 2 * _TAKES}
    state = FeatureState(config.model_copy(update=small), items)
    n = np.arange(_TAKES)
    led_to = (n % 3, n % 4) if config.queries else ()  # any name can be that of a search, or of a trigger
    takes = TakeColumns(1 + n % _USERS, 1 + n * n % (_ITEMS - 1), _BEGIN + 1_009 * n, 1 + n, n == 3, *led_to)
    for step in np.split(n, 4):
        state.add(takes.select(step), before=int(takes.second_T[step[-1]]) + 1)
    target_B = np.array([1, 2, 3, _ITEMS, takes.item_T[-2]])
    history_BL = np.array([[4, 2, 3], [3, 1, 0], [0, 0, 0], [5, 6, 1], [1, 2, 3]])
    now = _BEGIN + 1_009 * _TAKES + 7_200
    seconds_BL = np.where(history_BL > 0, now - 600 * np.arange(1, 4) ** 3, 0)
    source_B = np.array([0, 0, 0, 0, int(takes.event_T[takes.item_T == target_B[-1]][-1])])
    second_B = np.where(source_B > 0, takes.second_T[np.maximum(source_B - 1, 0)], 0)
    values_BF = features(
        config,
        state.states(np.arange(1 + _ITEMS)),
        target_B,
        history_BL,
        seconds_BL,
        np.full(len(target_B), now),
        state.sources(target_B, source_B, second_B),
        np.array([1, 2, 0, 1, 2]),
    )
    return [round(float(value), 6) for value in values_BF.ravel()]


def differing(config: FeatureConfig, theirs: Sequence[float]) -> list[str]:
    """Names of the features that another installation computes otherwise; all of them if it has more or fewer."""
    ours = np.array(probe(config))
    if len(theirs) != len(ours):
        return list(config.names)
    apart = ~(np.abs(ours - np.array(theirs)) <= TOLERANCE)
    return [config.names[place] for place in np.flatnonzero(apart.reshape(-1, len(config.names)).any(axis=0)).tolist()]
