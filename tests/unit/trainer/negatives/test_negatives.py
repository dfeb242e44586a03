from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.behaviours import BehaviourKind
from tests.factories.samples import DAY0, make_catalogue
from trainer.negatives.memory_bank import SpaceTimeMemory, TakeBank
from trainer.negatives.sampler import ContrastivePlan, SpaceTimeSampler, TakeCounts
from trainer.samples.catalogue import Catalogue
from trainer.samples.rows import Impression, Take


def take(item: int, second: int = 0, user: str = "u") -> Take:
    return Take(DAY0 + second, user, item)


def impression(item: int, *, user: str = "u1", label: int = 1, history: tuple[int, ...] = (1,)) -> Impression:
    return Impression("e", 0, 0, DAY0 + 50, user, item, history, (0,) * len(history), False, False, label)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 5), max_size=40), st.integers(1, 5))
def test_ring_keeps_the_newest_in_order_at_every_wrap_around_and_purge(size: int, items: list[int], gone: int) -> None:
    bank, oracle = TakeBank(size, max_age_seconds=1e9), deque[int](maxlen=size)
    for n, item in enumerate(items):
        bank.add(take(item, n))
        oracle.append(item)
        assert bank.items(DAY0).tolist() == list(oracle)
    removed = bank.purge(gone)
    assert removed == oracle.count(gone)
    kept = deque((item for item in oracle if item != gone), maxlen=size)
    assert bank.items(DAY0).tolist() == list(kept)
    bank.add(take(9))
    kept.append(9)
    assert bank.items(DAY0).tolist() == list(kept)


def test_bank_leaves_out_takes_that_are_too_old() -> None:
    bank = TakeBank(10, max_age_seconds=60)
    bank.add(take(1, 0))
    bank.add(take(2, 50))
    assert bank.items(DAY0 + 60).tolist() == [1, 2]
    assert bank.items(DAY0 + 61).tolist() == [2]


def test_takes_move_from_the_window_to_the_bank_by_age_and_by_count() -> None:
    memory = SpaceTimeMemory(window_seconds=10, window_takes=2, bank_takes=10, bank_seconds=1e6)
    for item, second in [(1, 0), (2, 5), (3, 11), (4, 12)]:
        memory.add(take(item, second))
    assert memory.window_items().tolist() == [3, 4]
    assert memory.bank_items(DAY0 + 12).tolist() == [1, 2]


def make_memory(**over: float) -> SpaceTimeMemory:
    known = {"window_seconds": 10, "window_takes": 3, "bank_takes": 10, "bank_seconds": 1e6} | over
    return SpaceTimeMemory(**known)  # type: ignore[arg-type]


@pytest.mark.parametrize(("age", "window", "bank"), [(10, [1, 2], []), (11, [2], [1])])
def test_a_take_is_in_the_window_for_its_whole_length(age: int, window: list[int], bank: list[int]) -> None:
    memory = make_memory()
    memory.add(take(1, 0))
    memory.add(take(2, age))
    assert (memory.window_items().tolist(), memory.bank_items(DAY0 + age).tolist()) == (window, bank)


def test_a_deleted_item_leaves_window_and_bank_and_the_rest_keep_their_order_times_and_steps() -> None:
    memory = make_memory(window_takes=3, bank_takes=4, bank_steps=5)
    for step, item in enumerate((7, 1, 7, 2, 3, 7, 4, 7, 5), 1):
        memory.step = step
        memory.add(take(item, step))
    assert memory.bank_items(DAY0).tolist() == [7, 2, 3, 7] and memory.window_items().tolist() == [4, 7, 5]
    memory.purge(7)
    assert memory.window_items().tolist() == [4, 5] and memory.bank_items(DAY0).tolist() == [2, 3]
    memory.step = 12  # 2 moved to the bank at step 7, 3 at step 8
    assert memory.bank_items(DAY0).tolist() == [2, 3]
    memory.step = 13
    assert memory.bank_items(DAY0).tolist() == [3]
    memory.step = 8
    assert [memory.bank_items(DAY0 + 1_000_000 + late).tolist() for late in (4, 5, 6)] == [[2, 3], [3], []]
    memory.add(take(6, 9))
    memory.add(take(8, 9))
    assert memory.window_items().tolist() == [5, 6, 8] and memory.bank_items(DAY0).tolist() == [2, 3, 4]


def test_stored_vectors_of_the_rest_stay_theirs_when_an_item_is_deleted() -> None:
    bank = TakeBank(3, max_age_seconds=1e9, vector_width=1)
    for step, item in enumerate((1, 2, 3, 4)):
        bank.add(take(item), step=step, vector=np.array([item], np.float32))
    assert bank.purge(3) == 1
    vectors, ages = bank.newest_rows(np.array([4, 2]), step=10)
    assert vectors.tolist() == [[4], [2]] and ages.tolist() == [7, 9]


def test_of_an_item_that_was_stored_twice_the_newest_row_counts_also_after_a_restart() -> None:
    def make() -> SpaceTimeMemory:
        return make_memory(window_takes=1, bank_takes=4, bank_seconds=100, bank_steps=5, vector_width=1)

    memory, again = make(), make()
    for step, item in enumerate((1, 2, 1, 3), 1):
        memory.bank.add(take(item, 10 * step), step=step, vector=np.array([step], np.float32))
    memory.add(take(9, 40))
    memory.step = 4
    again.restore(memory.snapshot())
    for each in (memory, again):
        vectors, ages = each.bank.newest_rows(np.array([1, 3, 2]), step=6)
        assert vectors.ravel().tolist() == [3, 4, 2] and ages.tolist() == [3, 2, 4]
        assert each.step == 4 and each.window_items().tolist() == [9]
        assert [each.bank_items(DAY0 + at).tolist() for at in (120, 121, 131)] == [[2, 1, 3], [1, 3], [3]]
        each.add(take(8, 41))
        each.step = 8
        assert each.bank_items(DAY0 + 41).tolist() == [1, 3, 9]


def test_a_ring_of_another_size_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="items have shape"):
        TakeBank(3, max_age_seconds=1).restore(TakeBank(4, max_age_seconds=1).snapshot())


@pytest.fixture
def catalogue() -> Catalogue:
    return make_catalogue(30, twins=(7, 8))


def plan_for(batch: list[Impression], catalogue: Catalogue, *, seed: int = 0, draw: int = 12) -> ContrastivePlan | None:
    """Of thirty items, each taken once in its own second."""
    memory = SpaceTimeMemory(window_seconds=20, window_takes=100, bank_takes=100, bank_seconds=1e6)
    counts = TakeCounts(1000.0)
    for n in range(1, 31):
        memory.add(take(n, n))
        counts.add(n, DAY0 + n)
    return SpaceTimeSampler(space=draw, time=draw).plan(batch, memory, counts, catalogue, np.random.default_rng(seed))


def test_no_row_stands_against_its_positive_its_twin_or_what_its_user_took(catalogue: Catalogue) -> None:
    batch = [impression(7, user="u1", history=(3, 4)), impression(5, user="u1"), impression(9, user="u2", history=(2,))]
    plan = plan_for(batch, catalogue, draw=100)
    forbidden = [{7, 8, 3, 4, 5, 1}, {5, 7, 3, 4, 1}, {9, 2}]
    for p, items in enumerate(forbidden):
        open_items = set(plan.candidates[plan.allowed[p]].tolist())
        assert not open_items & items
        assert open_items == set(plan.candidates.tolist()) - items


def test_same_generator_state_gives_the_same_plan_and_another_one_another(catalogue: Catalogue) -> None:
    batch = [impression(7), impression(9, user="u2")]
    first, again, other = (plan_for(batch, catalogue, seed=seed, draw=4) for seed in (1, 1, 2))
    assert first.candidates.tolist() == again.candidates.tolist()
    assert first.candidates.tolist() != other.candidates.tolist()


def test_short_supply_gives_distinct_candidates_only(catalogue: Catalogue) -> None:
    plan = plan_for([impression(7)], catalogue, draw=10_000)
    assert len(plan.candidates) == len(set(plan.candidates.tolist())) == 30


def test_candidates_without_a_vector_are_left_out(catalogue: Catalogue) -> None:
    catalogue.delete_item("i12")
    plan = plan_for([impression(7)], catalogue, draw=10_000)
    assert catalogue.number("i12") not in plan.candidates


def test_batch_without_a_usable_positive_has_no_plan(catalogue: Catalogue) -> None:
    assert plan_for([impression(7, label=0), impression(9, history=())], catalogue, draw=4) is None


@pytest.mark.parametrize("order", [(0, 60), (60, 0)], ids=["in order", "a correction of an old row comes last"])
def test_the_bank_is_as_of_the_newest_row_of_the_batch(catalogue: Catalogue, order: tuple[int, int]) -> None:
    memory = make_memory(window_takes=1, bank_seconds=100)
    for item, second in ((12, -50), (13, -40), (14, 0)):  # at second 60 the first two are 110 and 100 old
        memory.add(take(item, second))
    batch = [replace(impression(7 + n, user=f"u{n}"), second=DAY0 + second) for n, second in enumerate(order)]
    plan = SpaceTimeSampler(space=0, time=9).plan(batch, memory, TakeCounts(9.0), catalogue, np.random.default_rng(0))
    assert plan is not None and plan.candidates.tolist() == [7, 8, 13]


@pytest.mark.parametrize(
    ("space", "time", "found"), [(9, 0, {7, 21, 22, 23}), (0, 9, {7, 11, 12}), (9, 9, {7, 11, 12, 21, 22, 23})]
)
def test_space_is_drawn_from_the_window_and_time_from_the_bank_each_to_its_number(
    catalogue: Catalogue, space: int, time: int, found: set[int]
) -> None:
    def plan(space: int, time: int) -> ContrastivePlan:
        memory = make_memory()
        for second, item in enumerate((11, 12, 21, 22, 23)):
            memory.add(take(item, second))
        sampler = SpaceTimeSampler(space=space, time=time)
        made = sampler.plan([impression(7)], memory, TakeCounts(9.0), catalogue, np.random.default_rng(3))
        assert made is not None
        return made

    assert set(plan(space, time).candidates.tolist()) == found
    few = set(plan(min(space, 2), min(time, 1)).candidates.tolist())
    assert few < found and len(few) == 1 + min(space, 2) + min(time, 1)


def test_a_positive_without_a_vector_is_none_and_one_without_a_past_needs_a_search(catalogue: Catalogue) -> None:
    catalogue.delete_item("i5")
    batch = [
        impression(5),
        impression(7, history=()),
        impression(9, label=0),
        replace(impression(10), taken_before=BehaviourKind.CLICK),
    ]
    batch.append(impression(11))
    memory, counts = make_memory(), TakeCounts(9.0)
    for needs, rows in ((True, [4]), (False, [1, 4])):
        sampler = SpaceTimeSampler(space=2, time=2, needs_history=needs)
        plan = sampler.plan(batch, memory, counts, catalogue, np.random.default_rng(0))
        assert plan is not None and plan.rows.tolist() == rows
        assert plan.positives.tolist() == [batch[row].item for row in rows]


@pytest.mark.parametrize("query", [{"query_text": "red"}, {"query_image": b"photo"}], ids=["text", "picture"])
def test_what_was_taken_after_the_same_search_is_no_negative_of_it(catalogue: Catalogue, query: dict[str, Any]) -> None:
    batch = [replace(impression(n, user=f"u{n}", history=()), **query) for n in (11, 12)]
    batch.append(impression(13, user="u13"))
    sampler = SpaceTimeSampler(space=0, time=0, needs_history=False)
    plan = sampler.plan(batch, make_memory(), TakeCounts(9.0), catalogue, np.random.default_rng(0))
    assert plan is not None and plan.candidates.tolist() == [11, 12, 13]
    assert plan.allowed.tolist() == [[False, False, True], [False, False, True], [True, True, False]]


def test_without_masks_only_the_positive_itself_is_left_out(catalogue: Catalogue) -> None:
    batch = [impression(7, history=(8, 9)), impression(9, user="u2")]
    sampler = SpaceTimeSampler(space=0, time=0, masks=False)
    plan = sampler.plan(batch, make_memory(), TakeCounts(9.0), catalogue, np.random.default_rng(0))
    assert plan is not None and plan.allowed.tolist() == [[False, True], [True, False]]


def test_the_correction_is_of_as_many_draws_as_were_made(catalogue: Catalogue) -> None:
    """Two positives of one item and six takes of three items: eight draws, four distinct candidates."""
    batch, counts = [impression(7), impression(7, user="u2")], TakeCounts(1e9)
    memory = make_memory(window_takes=9)
    for item in (1, 1, 1, 2, 2, 3):
        memory.add(take(item))
        counts.add(item, DAY0)
    sampler = SpaceTimeSampler(space=9, time=9)
    plan = sampler.plan(batch, memory, counts, catalogue, np.random.default_rng(0))
    assert plan is not None and plan.candidates.tolist() == [1, 2, 3, 7]
    np.testing.assert_array_equal(plan.log_q, counts.log_q(np.array([1, 2, 3, 7]), draws=8))
    np.testing.assert_array_equal(plan.positive_log_q, counts.log_q(np.array([7, 7]), draws=8))


def test_take_counts_forget_with_their_half_life() -> None:
    counts = TakeCounts(100.0)
    for _ in range(8):
        counts.add(1, DAY0)
    counts.add(2, DAY0 + 200)  # eight takes two half-lives ago weigh as much as two now
    q = np.exp(counts.log_q(np.array([1, 2])))
    smoothing = 0.1 * 3 / 2
    np.testing.assert_allclose(q, [(2 + smoothing) / (3 + smoothing), (1 + smoothing) / (3 + smoothing)], rtol=1e-6)


def test_an_item_that_is_always_drawn_needs_no_correction() -> None:
    counts = TakeCounts(1e12)
    takes = np.random.default_rng(0).choice([1, 2, 3], p=[0.6, 0.3, 0.1], size=20_000)
    for item in takes.tolist():
        counts.add(item, DAY0)
    drawn = np.random.default_rng(1).choice(takes, (4_000, 12))
    seen = np.array([(drawn == item).any(1).mean() for item in (1, 2, 3)])
    np.testing.assert_allclose(np.exp(counts.log_q(np.array([1, 2, 3]), draws=12)), seen, atol=0.12)
    assert abs(counts.log_q(np.array([1]), draws=50)[0]) < 1e-6


def test_an_item_beyond_the_table_of_counts_was_never_taken_and_the_table_grows_to_its_last_item() -> None:
    counts, again = TakeCounts(1e9), TakeCounts(1e9)
    counts.add(1023, DAY0)
    np.testing.assert_allclose(np.exp(counts.log_q(np.array([1023, 90_000]))), np.array([1.1, 0.1]) / 1.1, rtol=1e-6)
    for item in (1024, 1023):
        counts.add(item, DAY0)
    again.restore(counts.snapshot())
    for each in (counts, again):
        found = np.exp(each.log_q(np.array([1023, 1024, 1025, 90_000])))
        np.testing.assert_allclose(found, np.array([2.15, 1.15, 0.15, 0.15]) / 3.15, rtol=1e-6)


def smoothed_shares(takes: list[tuple[int, int]], half_life: float, items: list[int]) -> list[float]:
    """Share of each item by plain sums, smoothed by a tenth of an average item's takes."""
    now = takes[-1][1]
    counts = dict.fromkeys(items, 0.0) | {item: 0.0 for item, _ in takes}
    for item, second in takes:
        counts[item] += 2.0 ** ((second - now) / half_life)
    one = 0.1 * sum(counts.values()) / len({item for item, count in counts.items() if count})
    return [(counts[item] + one) / (sum(counts.values()) + one) for item in items]


def test_take_counts_of_years_are_shares_of_the_newest_takes_still() -> None:
    counts, takes = TakeCounts(3600.0), []
    for hour in range(0, 24 * 365 * 4, 31):
        takes.append((1 + hour % 5 % 3, DAY0 + hour * 3600))
        takes.append((4, DAY0 + hour * 3600 + 1800))
    for item, second in takes:
        counts.add(item, second)
    found = np.exp(counts.log_q(np.array([1, 2, 3, 4, 5000]))).tolist()
    assert found == pytest.approx(smoothed_shares(takes, 3600.0, [1, 2, 3, 4, 5000]), rel=1e-5)


def test_the_smoothing_counts_items_that_were_taken_once_and_forgets_those_of_long_ago() -> None:
    long_ago = [(n, DAY0) for n in range(10, 2_000)]
    ages = [(1, DAY0 + day * 86_400) for day in range(1, 400)]  # a day is 24 half-lives: 10 to 1999 vanish
    counts, restored = TakeCounts(3600.0), TakeCounts(3600.0)
    for item, second in [*long_ago, *ages]:
        counts.add(item, second)
    restored.restore(counts.snapshot())
    for each in (counts, restored):
        each.add(2, ages[-1][1])
        each.add(2, ages[-1][1])
        found = np.exp(each.log_q(np.array([1, 2, 10]))).tolist()
        expected = smoothed_shares([*ages, *[(2, ages[-1][1])] * 2], 3600.0, [1, 2, 10])
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_correction_costs_as_much_for_a_million_items_as_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = TakeCounts(3600.0)
    counts.add(1_000_000, DAY0)
    monkeypatch.setattr(np, "count_nonzero", lambda array: pytest.fail("all items are counted in a step"))
    assert np.exp(counts.log_q(np.array([1_000_000])))[0] == pytest.approx(1.0)


def test_the_items_of_a_memory_are_those_of_window_and_bank_however_old() -> None:
    memory = make_memory(window_takes=2, bank_seconds=1)
    for second, item in enumerate((1, 2, 3, 4, 4)):
        memory.add(take(item, 5 * second))
    assert sorted(memory.items()) == [1, 2, 3, 4, 4] and memory.bank_items(DAY0 + 20).tolist() == []
    with pytest.raises(ValueError, match="at least 1"):
        TakeBank(0, max_age_seconds=1)


def test_without_any_take_nothing_is_corrected() -> None:
    assert TakeCounts(9.0).log_q(np.array([1, 2]), draws=3).tolist() == [0, 0]
