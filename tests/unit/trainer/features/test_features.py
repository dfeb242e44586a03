"""Features of the moment and their state, against plain loops."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import pytest
from pydantic import ValidationError

from tests.factories.feature_world import (
    PlainFeatures,
    Row,
    Take,
    World,
    columns_of,
    features_of,
    random_takes,
)
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState
from trainer.features.states import SharedCounts, TakeRows
from trainer.samples.id_hashes import id_hashes
from trainer.samples.item_facts import facts_of, word_hash

CONFIG = FeatureConfig(attributes=("genres", "colour"), history_length=8, partners=64)
ITEMS = 40


def fed(world: World, takes: list[Take], *, step: int = 50, before: int | None = None) -> FeatureState:
    """A state that was given these takes in steps."""
    state = FeatureState(world.config, world)
    for start in range(0, len(takes), step):
        part = takes[start : start + step]
        state.add(columns_of(part), before=part[-1].second + 1)
    if before is not None:
        state.add(columns_of([]), before=before)
    return state


def random_rows(takes: list[Take], *, now: int, count: int, seed: int) -> list[Row]:
    """Rows of users with their newest takes as history; a third was drawn from a take."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        mine = [take for take in takes if take.user == rng.integers(1, 16) and take.second < now]
        mine = mine[::-1][: int(rng.integers(0, 12))]
        source = takes[rng.integers(len(takes))]
        target, named = int(rng.integers(1, ITEMS + 1)), (0, 0)
        if rng.random() < 0.5:
            target, named = source.item, (source.event, source.second)
        rows.append(Row(target, [take.item for take in mine], [take.second for take in mine], now, named))
    return rows


@pytest.mark.parametrize(("seed", "length"), [(0, 40), (1, 40), (2, 8)])
def test_every_feature_equals_a_loop_over_all_takes(seed: int, length: int) -> None:
    config = CONFIG.model_copy(update={"history_length": length})
    world = World(config, ITEMS, seed=seed)
    takes = random_takes(300, users=15, items=ITEMS, seconds=40_000, seed=seed)
    state = fed(world, takes, step=7 + seed)
    rows = random_rows(takes, now=45_000, count=120, seed=seed)
    if length < 40:  # what a source was paired with may have left its user's ring
        rows = [dataclasses.replace(row, source=(0, 0)) for row in rows]
    found = features_of(state, rows)
    plain = PlainFeatures(world, takes)
    expected = [plain.row(row) for row in rows]
    assert found.shape == (len(rows), len(config.names)) and set(expected[0]) == set(config.names)
    for column, name in enumerate(config.names):
        assert found[:, column] == pytest.approx([one[name] for one in expected], abs=1e-3), name


def test_the_order_inside_a_step_does_not_matter() -> None:
    config = CONFIG.model_copy(update={"partners": 4})
    takes = random_takes(400, users=15, items=ITEMS, seconds=4_000, seed=4)
    one, other = (FeatureState(config, World(config, ITEMS)) for _ in range(2))
    rng = np.random.default_rng(0)
    for start in range(0, len(takes), 40):
        part = takes[start : start + 40]
        one.add(columns_of(part), before=part[-1].second + 1)
        other.add(columns_of([part[n] for n in rng.permutation(len(part))]), before=part[-1].second + 1)
    assert_same_state(one, other)


def assert_same_state(one: FeatureState, other: FeatureState) -> None:
    ours, theirs = one.snapshot(), other.snapshot()
    assert ours.values == theirs.values
    assert ours.arrays.keys() == theirs.arrays.keys()
    for name, array in ours.arrays.items():
        assert array.dtype == theirs.arrays[name].dtype and array.tobytes() == theirs.arrays[name].tobytes(), name


def test_a_restored_state_goes_on_with_the_same_digits() -> None:
    config = CONFIG.model_copy(update={"partners": 4, "max_items": 16, "max_users": 16, "remembered_takes": 20})
    world = World(config, ITEMS)
    takes = random_takes(600, users=40, items=ITEMS, seconds=9_000, seed=5)
    state = fed(world, takes[:300])
    state.delete("i3")
    restored = FeatureState(config, world)
    restored.restore(state.snapshot())
    assert_same_state(state, restored)
    for one in (state, restored):
        one.forget(2)
        one.delete("i5")
        for start in range(300, 600, 60):
            one.add(columns_of(takes[start : start + 60]), before=takes[start + 59].second)
    assert_same_state(state, restored)
    rows = random_rows(takes, now=9_999, count=30, seed=1)
    assert features_of(state, rows).tobytes() == features_of(restored, rows).tobytes()


def test_a_snapshot_holds_all_that_changed_after_the_one_before() -> None:
    config = CONFIG.model_copy(update={"partners": 4, "max_items": 16, "max_users": 16, "remembered_takes": 40})
    world = World(config, ITEMS)
    takes = random_takes(600, users=40, items=ITEMS, seconds=9_000, seed=5)
    state = fed(world, takes[:500])
    first = state.snapshot().frozen()
    for item in range(1, 6):
        state.delete(f"i{item}")
    state.forget(2)
    for take in takes[500:510]:
        state.add(columns_of([take]), before=take.second + 1)
    whole = state.snapshot().arrays
    second = state.snapshot().frozen({name: copy.held for name, copy in first.copies.items()})
    assert sum(len(copy.numbers) for copy in second.copies.values()) > 0
    for name, copy in first.copies.items():
        later = second.copies[name]
        kept, changed = copy.columns(slice(None)).arrays, later.columns(slice(None)).arrays
        for column, values in changed.items():
            found = np.zeros((later.held.count, *values.shape[1:]), values.dtype)
            found[copy.numbers[: later.held.count]] = kept[column][: later.held.count]
            found[later.numbers] = values
            assert found.tobytes() == whole[f"{name}{column}"].tobytes(), column


def test_a_state_of_other_features_is_refused() -> None:
    world = World(CONFIG, ITEMS)
    state = FeatureState(CONFIG, world).snapshot()
    with pytest.raises(ValueError, match="of features"):
        FeatureState(CONFIG.model_copy(update={"partners": 32}), world).restore(state)


def test_a_row_does_not_depend_on_its_batch() -> None:
    world = World(CONFIG, ITEMS)
    takes = random_takes(300, users=15, items=ITEMS, seconds=40_000, seed=6)
    state = fed(world, takes)
    rows = random_rows(takes, now=41_000, count=60, seed=2)
    together = features_of(state, rows)
    alone = np.concatenate([features_of(state, [row]) for row in rows])
    assert together.tobytes() == alone.tobytes()


def test_one_history_for_all_candidates_gives_what_each_row_gives() -> None:
    world = World(CONFIG, ITEMS)
    takes = random_takes(300, users=15, items=ITEMS, seconds=40_000, seed=7)
    state = fed(world, takes)
    history = [take for take in takes if take.user == 3][::-1][:8]
    rows = [Row(n, [t.item for t in history], [t.second for t in history], 41_000) for n in range(1, ITEMS + 1)]
    assert features_of(state, rows).tobytes() == features_of(state, rows, shared_history=True).tobytes()


def test_what_decays_to_almost_nothing_becomes_nothing() -> None:
    world = World(CONFIG, ITEMS)
    state = fed(world, [Take(1, 1, 0, 1), Take(2, 2, 0, 2)])
    late = features_of(state, [Row(n, [2], [0], 400 * 86_400) for n in range(1, 5)])
    assert np.isfinite(late).all()
    weeks = features_of(state, [Row(n, [2], [0], 20 * 86_400) for n in range(1, 5)])
    assert set(weeks[:, CONFIG.names.index("takes 1d")]) == {0.0} and weeks[0, CONFIG.names.index("takes 7d")] > 0
    decayed = [place for place, name in enumerate(CONFIG.names) if name in ("takes 1h", "takes 6h", "takes 1d")]
    assert not late[:, decayed].any()
    just_drawn = features_of(state, [Row(1, [2], [0], 10, source=(1, 0))])
    assert not just_drawn[:, [CONFIG.names.index(name) for name in ("takes", "takes 1h", "item idle")]].any()


def test_a_full_list_gives_one_place_to_the_new_pairs_of_a_step() -> None:
    config = CONFIG.model_copy(update={"partners": 3})
    world = World(config, ITEMS)
    state = fed(world, [Take(1, 1, 0, 1), Take(1, 2, 1, 2), Take(1, 3, 2, 3), Take(1, 4, 3, 4)])
    assert partners(state, world, 1) == {2: 1, 3: 1, 4: 1}
    more = [Take(2, item, 10, 10 + item) for item in (5, 6, 7, 8)] + [Take(2, 1, 11, 30)]
    state.add(columns_of(more), before=12)
    now = partners(state, world, 1)
    assert len(now) == 3 and len(now.keys() & {2, 3, 4}) == 2


def test_a_list_replaces_its_smallest_count() -> None:
    config = CONFIG.model_copy(update={"partners": 2})
    world = World(config, ITEMS)
    often = [Take(user, item, user, 10 * user + item) for user in (1, 2, 3) for item in (1, 2)]
    state = fed(world, [*often, Take(4, 1, 5, 91), Take(4, 3, 6, 92), Take(5, 1, 7, 93), Take(5, 4, 8, 94)], step=1)
    assert partners(state, world, 1) == {2: 3, 4: 1}


def partners(state: FeatureState, world: World, item: int) -> dict[int, int]:
    """Partners of an item and how often they were taken together."""
    takes = state.states(np.array([0, item])).takes
    names = {world.hash(n): n for n in range(1, ITEMS + 1)}
    counted = zip(takes.partner_UP[1].tolist(), takes.together_UP[1].tolist(), strict=True)
    return {names[partner]: count for partner, count in counted if count}


def test_a_deleted_item_leaves_every_list() -> None:
    world = World(CONFIG, ITEMS)
    takes = random_takes(300, users=15, items=ITEMS, seconds=40_000, seed=8)
    state = fed(world, takes)
    assert any(7 in partners(state, world, item) for item in range(1, ITEMS + 1))
    state.delete("i7")
    assert not state.states(np.array([0, 7])).takes.takes_U.any()
    state.add(columns_of([take for take in takes[-5:] if take.item != 7]), before=50_000)
    assert not any(7 in partners(state, world, item) for item in range(1, ITEMS + 1))
    state.add(columns_of([Take(1, 9, 50_000, 999)]), before=50_001)
    assert 7 not in partners(state, world, 9)


def test_lists_are_searched_for_a_deleted_item_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.features.state._SWEPT_ROWS", 10)
    world = World(CONFIG, ITEMS)
    state = fed(world, random_takes(300, users=15, items=ITEMS, seconds=40_000, seed=8))
    state.delete("i7")
    holding = []
    for _ in range(5):
        holding.append(sum(7 in partners(state, world, item) for item in range(1, ITEMS + 1)))
        state.add(columns_of([]), before=50_000)
    assert holding[0] > holding[1] and holding[-1] == 0


def test_many_deleted_items_are_searched_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.features.state._SWEPT_ROWS", 10)
    world = World(CONFIG, ITEMS)
    state = fed(world, random_takes(300, users=15, items=ITEMS, seconds=40_000, seed=8))
    for item in range(1, 16):
        state.delete(f"i{item}")
    state.add(columns_of([]), before=50_000)
    state.delete("i16")  # in the midst of a pass: in the next one
    for _ in range(8):
        restored = FeatureState(CONFIG, world)
        restored.restore(state.snapshot())
        state = restored
        state.add(columns_of([]), before=50_000)
    assert not any(partners(state, world, item).keys() & set(range(1, 17)) for item in range(1, ITEMS + 1))
    assert any(partners(state, world, item) for item in range(17, ITEMS + 1))


def test_a_step_costs_about_the_same_however_many_items_were_deleted() -> None:
    def seconds(deleted: int) -> float:
        state = fed(World(CONFIG, ITEMS), random_takes(30, users=15, items=ITEMS, seconds=40_000, seed=8))
        for item in range(deleted):
            state.delete(f"other {item}")
        start = time.process_time()
        state.add(columns_of([]), before=50_000)
        return time.process_time() - start

    assert min(seconds(1_000) for _ in range(3)) < 20 * max(seconds(1) for _ in range(3))


def test_two_items_of_one_short_hash_count_pairs_as_before_a_restart() -> None:
    config = CONFIG.model_copy(update={"max_items": 16})
    world = World(config, ITEMS)
    world._hashes[2] = world._hashes[1] + [1 << 40, 0]
    assert world.hash(1) == world.hash(2)
    state = fed(world, [Take(1, 3, 0, 1), Take(1, 2, 1, 2), Take(1, 4, 2, 3)], step=1)
    state.delete("i3")  # item 1 is given the slot of item 3, before that of item 2
    state.add(columns_of([Take(2, 1, 3, 4)]), before=4)
    for gone in (False, True):
        if gone:
            state._empty(np.array([state._slots.by_key[int(world._hashes[2, 0])]]))
        restored = FeatureState(config, world)
        restored.restore(state.snapshot())
        for one in (state, restored):
            one.add(columns_of([Take(5, 4, 5 + gone, 9 + gone), Take(5, 1, 6 + gone, 11 + gone)]), before=9)
        assert_same_state(state, restored)


def test_a_forgotten_user_is_in_no_later_pair_and_the_counts_stay() -> None:
    world = World(CONFIG, ITEMS)
    state = fed(world, [Take(1, 1, 0, 1), Take(1, 2, 1, 2)])
    state.forget(1)
    assert partners(state, world, 1) == {2: 1}
    state.add(columns_of([Take(1, 3, 2, 3)]), before=3)
    assert partners(state, world, 3) == {} and partners(state, world, 1) == {2: 1}


def test_a_drawn_exposure_knows_no_more_of_category_and_attributes_than_if_its_source_had_never_been() -> None:
    world = World(CONFIG, ITEMS)
    target = next(n for n in range(1, ITEMS + 1) if all(world.described[n]["attributes"].values()))  # type: ignore[attr-defined]
    others = [take for take in random_takes(40, users=15, items=ITEMS, seconds=900, seed=2) if take.item != target]
    names = [name for name in CONFIG.names if name.endswith("popularity")]
    places = [CONFIG.names.index(name) for name in names]
    rows = [Row(target, [3], [1], 1_000), Row(target, [3], [1], 1_000, source=(99, 950))]
    without = features_of(fed(world, others, before=1_000), rows)[0, places]
    known, drawn = features_of(fed(world, [*others, Take(20, target, 950, 99)], before=1_000), rows)[:, places]
    assert drawn == pytest.approx(without, abs=3e-4) and (known != without).all()


def test_a_drawn_exposure_leaves_out_the_take_of_a_user_who_was_forgotten() -> None:
    world = World(CONFIG, ITEMS)
    state = fed(world, [Take(1, 1, 0, 1), Take(1, 2, 1, 2), Take(2, 1, 2, 3)])
    state.forget(1)
    (found,) = features_of(state, [Row(1, [2], [1], 10, source=(1, 0))])
    assert found[CONFIG.names.index("takes")] == pytest.approx(np.log(2), abs=1e-3)
    assert found[CONFIG.names.index("together")] == pytest.approx(np.log(2), abs=1e-3)  # the pair can no longer be told


def test_a_source_that_the_state_does_not_know_was_not_counted() -> None:
    world = World(CONFIG, ITEMS)
    state = fed(world, [Take(1, 1, 0, 1)])
    (found,) = features_of(state, [Row(1, [], [], 10, source=(77, 5))])
    assert found[CONFIG.names.index("takes")] == pytest.approx(np.log(2), abs=1e-3)


def test_a_pair_counts_while_either_item_has_it_in_its_list() -> None:
    config = CONFIG.model_copy(update={"partners": 1})
    world = World(config, ITEMS)
    state = fed(world, [Take(1, 2, 0, 1), Take(1, 1, 1, 2), Take(2, 3, 2, 3), Take(2, 1, 3, 4)], step=1)
    assert len(partners(state, world, 1)) == 1
    rows = [Row(1, [2, 3], [0, 0], 10), Row(2, [1], [0], 10), Row(3, [1], [0], 10)]
    found = features_of(state, rows)[:, config.names.index("together")]
    assert found == pytest.approx(np.log1p([2, 1, 1]), abs=1e-3)


def test_items_longest_without_a_take_lose_their_counts() -> None:
    config = CONFIG.model_copy(update={"max_items": 16})
    world = World(config, ITEMS)
    takes = [Take(1, item, item, item) for item in range(1, ITEMS + 1)]
    state = fed(world, takes, step=3)
    counted = state.states(np.arange(ITEMS + 1)).takes.takes_U
    assert counted.sum() <= 16 and counted[-3:].all() and not counted[1:20].any()
    assert len(state.snapshot().arrays["rows.key"]) <= 17


def test_users_longest_without_a_take_lose_theirs() -> None:
    config = CONFIG.model_copy(update={"max_users": 16})
    world = World(config, ITEMS)
    state = fed(world, [Take(user, 1 + user % ITEMS, user, user) for user in range(1, 60)], step=5)
    users = state.snapshot().arrays["users/takes.user"]
    assert len(users) <= 17 and np.count_nonzero(users) <= 16 and users.max() == 59


def test_hashes_that_share_their_low_bits_are_told_apart() -> None:
    def alike(hash_of: Callable[[int], int]) -> int:
        return next(n for n in range(1, 1 << 20) if hash_of(n) % (1 << 16) == hash_of(0) % (1 << 16))

    colour = alike(lambda n: word_hash("colour", f"c{n}"))
    item = alike(lambda n: id_hashes(f"i{n}")[0] & 0xFFFF_FFFF)
    world = World(CONFIG, 3)
    for number, name in ((1, "c0"), (2, f"c{colour}"), (3, f"c{colour}")):
        about = {**world.described[number], "attributes": {"colour": name}}
        world._facts.put(number, facts_of(CONFIG, **about))  # type: ignore[arg-type]
    world._hashes[1], world._hashes[2] = id_hashes("i0"), id_hashes(f"i{item}")
    state = fed(world, [Take(1, 1, 0, 1), Take(1, 3, 1, 2)])
    rows = [Row(1, [2, 2], [0, 0], 10), Row(3, [2, 2], [0, 0], 10), Row(3, [2, 1], [0, 0], 10)]
    found = np.concatenate([features_of(state, [row]) for row in rows])
    assert found[:, CONFIG.names.index("colour share")].tolist() == [0, 1, 0.5]
    assert found[:, CONFIG.names.index("together")] == pytest.approx(np.log1p([0, 0, 1]), abs=1e-3)


def test_an_item_state_is_the_same_as_a_record() -> None:
    world = World(CONFIG, ITEMS)
    state = fed(world, random_takes(300, users=15, items=ITEMS, seconds=40_000, seed=9))
    states = state.states(np.arange(ITEMS + 1))
    records = [states.takes.to_bytes(place) for place in range(ITEMS + 1)]
    back = TakeRows.from_bytes(CONFIG, records)
    for name, column in vars(states.takes).items():
        assert getattr(back, name).dtype == column.dtype and getattr(back, name).tobytes() == column.tobytes()
    shared = SharedCounts.from_bytes(states.shared.to_bytes())
    assert shared.takes == states.shared.takes and shared.word_C.tobytes() == states.shared.word_C.tobytes()
    with pytest.raises(ValueError, match="bytes under these settings"):
        TakeRows.from_bytes(CONFIG.model_copy(update={"partners": 8}), records)


def test_an_item_takes_at_most_600_bytes() -> None:
    config = FeatureConfig(attributes=tuple("abcdefgh"), numbers=("price", "year", *"ijkl"))
    world = World(FeatureConfig(), 1)
    states = FeatureState(config, World(config.model_copy(update={"numbers": ()}), 1)).states(np.array([0, 1]))
    facts = sum(column[:1].nbytes for column in vars(world.facts(np.array([0]))).values())
    assert len(states.takes.to_bytes(0)) + facts + 4 * 4 <= 600


@pytest.mark.parametrize(
    "of_one_name", [{"numbers": ("takes",)}, {"attributes": ("a", "a")}, {"attributes": ("attributes",)}]
)
def test_features_of_one_name_are_refused(of_one_name: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ValidationError, match="name"):
        FeatureConfig.model_validate(of_one_name)


def test_the_version_names_what_a_value_depends_on() -> None:
    versions = {
        FeatureConfig().version,
        FeatureConfig(partners=32).version,
        FeatureConfig(history_length=20).version,
        FeatureConfig(attributes=("genres",)).version,
        FeatureConfig(attributes=("b", "a")).version,
        FeatureConfig(attributes=("a", "b")).version,
    }
    assert len(versions) == 6
    assert FeatureConfig(max_items=99).version == FeatureConfig().version
