"""Rows that a server logged beside the same features from another state."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
import pytest

from schemas.skew import ServedRows
from tests.factories.feature_world import Row, World, columns_of, features_of, random_takes
from trainer.features.config import FeatureConfig
from trainer.features.skew import Skew, recomputed
from trainer.features.state import FeatureState
from trainer.features.states import ItemStates

CONFIG = FeatureConfig(history_length=3)
WORLD = World(CONFIG, 6)
STATE = FeatureState(CONFIG, WORLD)
STATE.add(columns_of(random_takes(60, users=5, items=6, seconds=8_000, seed=1)), before=8_000)


def states_of(item_ids: Sequence[str]) -> ItemStates:
    return STATE.states(np.array([0, *map(WORLD.names.index, item_ids)]))


def served(values: np.ndarray | None = None) -> ServedRows:
    """Two rows of a user with more takes than are looked at, oldest first."""
    return ServedRows(
        release_id="r",
        number=1,
        before=8_000,
        now=9_000,
        targets=["i6", "i2"],
        history=["i1", "i2", "i3", "i4", "i5"],
        history_seconds=[1_000, 2_000, 3_000, 4_000, 5_000],
        values=base64.b64encode(b"" if values is None else values.astype("<f4").tobytes()),
        probabilities=[0.5, 0.5],
    )


def test_features_are_computed_again_from_the_newest_takes_of_the_request() -> None:
    rows = [Row(target, [5, 4, 3], [5_000, 4_000, 3_000], 9_000) for target in (6, 2)]
    assert recomputed(CONFIG, served(), states_of).tobytes() == features_of(STATE, rows).tobytes()


def test_the_largest_difference_of_each_feature_is_kept_over_all_requests() -> None:
    skew, place = Skew(), CONFIG.names.index("takes")
    for apart in (0.5, 2.0, 1.0, 0.0):
        values = recomputed(CONFIG, served(), states_of)
        values[1, place] += apart
        skew.add(CONFIG, served(values), states_of)
    assert (skew.rows, skew.differing) == (8, 3) and skew.largest == {"takes": pytest.approx(2.0)}
