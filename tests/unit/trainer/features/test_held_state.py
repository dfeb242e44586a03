"""A state that is kept as it was while takes are counted on: exactly that state, and what is not asked of it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.factories.feature_world import World, columns_of, random_takes
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState

CONFIG = FeatureConfig(attributes=("genres",), history_length=8, partners=4, max_items=24)
ITEMS = 60
TAKES = random_takes(600, users=12, items=ITEMS, seconds=40_000, seed=3)


@pytest.mark.parametrize("held_after", [0, 60, 300])
def test_a_state_that_is_kept_stays_as_it_was_through_takes_evictions_deletes_and_sweeps(held_after: int) -> None:
    world = World(CONFIG, ITEMS)
    state = FeatureState(CONFIG, world)
    numbers = np.arange(ITEMS + 1)
    hashes, facts = world.hashes(numbers), world.facts(numbers)

    def count(start: int, stop: int) -> None:
        for at in range(start, stop, 30):
            state.add(columns_of(TAKES[at : at + 30]), before=TAKES[min(at + 30, stop) - 1].second + 1)

    count(0, held_after)
    assert state.held_before is None
    state.hold()
    then, shared = state.states(numbers), state.shared
    for at in range(held_after, 600, 60):
        count(at, at + 60)
        state.delete(f"i{1 + at % ITEMS}")
        kept = state.held_states(hashes, facts)
        assert (kept.before, kept.shared) == (then.before, shared) and state.held_before == then.before
        for name, column in vars(kept.takes).items():
            np.testing.assert_array_equal(column, getattr(then.takes, name), err_msg=name)
    assert (state.states(numbers).takes.takes_U != then.takes.takes_U).sum() > 10


def test_a_state_that_is_kept_for_long_takes_no_more_memory_than_its_items() -> None:
    state = FeatureState(CONFIG, World(CONFIG, ITEMS))
    state.add(columns_of(TAKES[:60]), before=TAKES[59].second + 1)
    state.hold()
    assert state._held is not None
    kept = []
    for at in range(60, 600, 5):
        state.add(columns_of(TAKES[at : at + 5]), before=TAKES[at + 4].second + 1)
        kept.append(len(state._held._copies))
    assert kept[-1] <= CONFIG.max_items and kept[-1] == kept[len(kept) // 2]
