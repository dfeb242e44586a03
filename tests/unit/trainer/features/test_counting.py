"""What the state counts of takes that come late, of items that lost their counts, and of values that are none."""

from __future__ import annotations

import numpy as np
import pytest

from tests.factories.feature_world import Row, Take, World, columns_of, features_of, random_takes
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState
from trainer.features.states import NO_ITEM, SharedCounts, item_hash

CONFIG = FeatureConfig(attributes=("genres", "colour"), history_length=8, partners=8, max_items=16)
ITEMS = 20


def partners(state: FeatureState, world: World, item: int) -> set[int]:
    takes = state.states(np.array([0, item])).takes
    listed = set(takes.partner_UP[1][takes.together_UP[1] > 0].tolist())
    return {number for number in range(1, ITEMS + 1) if world.hash(number) in listed}


def test_a_step_of_older_rows_leaves_the_moment_up_to_which_takes_are_counted() -> None:
    state = FeatureState(CONFIG, World(CONFIG, ITEMS))
    state.add(columns_of([Take(1, 1, 5, 1)]), before=10)
    state.add(columns_of([]), before=7)
    assert state.before == state.states(np.array([0, 1])).before == 10


def test_a_take_that_is_older_than_the_step_before_counts_as_if_it_had_come_in_time() -> None:
    world = World(CONFIG, ITEMS)
    late, in_time = FeatureState(CONFIG, world), FeatureState(CONFIG, world)
    takes = [Take(1, 1, 90_000, 1), Take(2, 1, 40_000, 2)]
    for take in takes:
        late.add(columns_of([take]), before=100_000)
    in_time.add(columns_of(takes), before=100_000)
    ours, theirs = (state.states(np.array([0, 1])).takes for state in (late, in_time))
    assert (ours.last_U[1], ours.previous_U[1], ours.takes_U[1]) == (90_000, 40_000, 2)
    np.testing.assert_allclose(ours.decayed_UH[1], theirs.decayed_UH[1], rtol=1e-6)


def test_every_value_of_a_taken_item_is_counted_and_no_padding_of_them() -> None:
    world = World(CONFIG, ITEMS)
    state = FeatureState(CONFIG, world)
    takes = [take for take in random_takes(100, users=5, items=ITEMS, seconds=900, seed=1) if not take.announces]
    state.add(columns_of(takes), before=1_000)
    words = world.facts(np.array([take.item for take in takes])).words_IW
    assert int(state.shared.word_C.sum()) == np.count_nonzero(words)
    assert int(state.shared.category_C.sum()) == state.shared.takes == len(takes)


def test_an_item_that_is_deleted_after_it_lost_its_counts_leaves_lists_and_is_in_no_later_pair() -> None:
    world = World(CONFIG, ITEMS)
    state = FeatureState(CONFIG, world)
    takes = [Take(1, 1, 0, 1), Take(1, 2, 1, 2), *(Take(n, n, n, n) for n in range(3, 18))]
    for take in takes:
        state.add(columns_of([take]), before=take.second + 1)
    assert not state.states(np.array([0, 1])).takes.takes_U.any() and partners(state, world, 2) == {1}
    state.delete("i1")
    state.add(columns_of([Take(1, 9, 50, 50)]), before=51)
    assert partners(state, world, 2) == partners(state, world, 9) - {2} | {9} == {9}


def test_an_item_whose_first_hash_is_zero_is_no_padding() -> None:
    assert item_hash(np.array([[0, 7], [0, 0]])).tolist() == [1, NO_ITEM]


def test_shared_counts_of_more_takes_than_are_ever_counted_are_refused() -> None:
    most = SharedCounts(SharedCounts.empty().category_C, SharedCounts.empty().word_C, 1 << 53)
    assert SharedCounts.from_bytes(most.to_bytes()).takes == 1 << 53
    record = bytearray(most.to_bytes())
    record[0] = 1
    with pytest.raises(ValueError, match="takes"):
        SharedCounts.from_bytes(bytes(record))


def test_an_item_in_the_place_of_another_has_nothing_of_it() -> None:
    config = CONFIG.model_copy(update={"max_items": 16})
    world = World(config, 40)
    often = [Take(user, item, 100 * user + item, 100 * user + item) for user in (1, 2) for item in range(1, 17)]
    later = [Take(item, item, 1_000 + item, 1_000 + item) for item in range(20, 30)]
    crowded, alone = FeatureState(config, world), FeatureState(config, world)
    for state, takes in (crowded, [*often, *later]), (alone, later):
        for start in range(0, len(takes), 4):
            part = takes[start : start + 4]
            state.add(columns_of(part), before=part[-1].second + 1)
    assert len(crowded.snapshot().arrays["rows.key"]) <= 17
    numbers = np.arange(20, 30)
    ours, theirs = crowded.states(numbers).takes, alone.states(numbers).takes
    assert [ours.to_bytes(place) for place in range(10)] == [theirs.to_bytes(place) for place in range(10)]


def test_what_a_request_is_triggered_by_is_no_take_of_its_user() -> None:
    state = FeatureState(CONFIG, World(CONFIG, ITEMS))
    state.add(columns_of([Take(1, 1, 0, 1)]), before=1)
    now = 50_000
    rows = [Row(3, [2, 1], [now, now - 3_600], now), Row(3, [2], [now], now), Row(3, [1], [now - 3_600], now)]
    idle = features_of(state, rows)[:, CONFIG.names.index("user idle")]
    assert idle == pytest.approx([np.log1p(1), 0, np.log1p(1)], abs=1e-3)
