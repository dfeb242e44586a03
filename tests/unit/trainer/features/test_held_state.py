"""A state that is kept as it was while takes are counted on: exactly that state, and what is not asked of it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.factories.feature_world import Take, World, columns_of, random_takes
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
    counts = shared.to_bytes()
    for at in range(held_after, 600, 60):
        count(at, at + 60)
        state.delete(f"i{1 + at % ITEMS}")
        kept = state.held_states(hashes, facts)
        assert (kept.before, kept.shared) == (then.before, shared) and state.held_before == then.before
        assert kept.shared.to_bytes() == counts
        for name, column in vars(kept.takes).items():
            np.testing.assert_array_equal(column, getattr(then.takes, name), err_msg=name)
    assert (state.states(numbers).takes.takes_U != then.takes.takes_U).sum() > 10


def test_a_state_that_is_kept_has_the_deleted_items_that_lists_lose_afterwards() -> None:
    world, numbers = World(CONFIG, 5), np.arange(6)
    state = FeatureState(CONFIG, world)
    state.add(columns_of([Take(1, item, item, item) for item in (1, 2, 3)]), before=4)
    state.hold()
    then = state.states(numbers).takes
    state.delete("i2")
    state.add(columns_of([]), before=5)
    kept = state.held_states(world.hashes(numbers), world.facts(numbers)).takes
    assert world.hash(2) not in state.states(numbers).takes.partner_UP
    np.testing.assert_array_equal(kept.partner_UP, then.partner_UP)
    np.testing.assert_array_equal(kept.together_UP, then.together_UP)


def test_a_state_that_is_kept_for_long_grows_with_the_items_that_changed_and_not_with_the_takes() -> None:
    state = FeatureState(CONFIG, World(CONFIG, 3))
    state.hold()
    assert state._held is not None
    for day in range(50):
        takes = random_takes(20, users=4, items=3, seconds=1_000, seed=day)
        state.add(columns_of(takes), before=10_000)
    assert sum(map(len, state._held._copies)) == 0 and len(state._held._copies) <= 3
