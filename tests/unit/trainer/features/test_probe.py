"""The probe of a release: the same values from the same code, and other values from other formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from trainer.features import columns, partners, state
from trainer.features.config import FeatureConfig
from trainer.features.probe import differing, probe

CONFIGS = [FeatureConfig(), FeatureConfig(attributes=("colour",), numbers=("price", "stars"), history_length=2)]


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "other"])
def test_the_probe_is_the_same_each_time_and_every_feature_shows_in_it(config: FeatureConfig) -> None:
    values = probe(config)
    assert values == probe(config) and differing(config, values) == []
    assert np.isfinite(values).all()
    rows_BF = np.reshape(values, (-1, len(config.names)))
    silent = [name for place, name in enumerate(config.names) if not np.ptp(rows_BF[:, place])]
    assert silent == []


def test_each_feature_that_differs_is_named_and_a_rounding_is_no_difference() -> None:
    config = CONFIGS[0]
    for place, name in enumerate(config.names):
        values = probe(config)
        values[place + len(config.names)] += 0.01
        assert differing(config, values) == [name]
    assert differing(config, [value + 1e-5 for value in probe(config)]) == []
    assert differing(config, probe(config)[:-1]) == list(config.names) and "takes" in differing(config, [np.nan] * 175)


def faults() -> dict[str, Callable[[pytest.MonkeyPatch], Any]]:
    counted = state._counted
    return {
        "half-life": lambda patch: patch.setitem(columns.HALF_LIVES, "1d", 80_000.0),
        "recency": lambda patch: patch.setattr(columns, "RECENT", 7.0),
        "counting": lambda patch: patch.setattr(state, "_counted", lambda count, at: counted(count, at[1:])),
        "pairs": lambda patch: patch.setattr(state, "count_pairs", lambda rows, slot, partner: np.unique(slot)),
    }


@pytest.mark.parametrize("name", ["half-life", "recency", "counting", "pairs"])
def test_a_formula_that_another_version_has_otherwise_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[0]
    theirs = probe(config)
    faults()[name](monkeypatch)
    assert differing(config, theirs) and partners.count_pairs is not None
