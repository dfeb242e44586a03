from __future__ import annotations

import random

import pytest

from tests.factories.feeding import through_bytes
from tests.factories.samples import behaviour
from trainer.samples.recent_ids import RecentIds, id_hash
from trainer.samples.window import EventWindow, ObserveResult
from trainer.state import State, whole_numbers


def test_every_id_of_the_horizon_is_known_and_older_ones_are_forgotten() -> None:
    ids = RecentIds(horizon_seconds=800, most=10**6)
    for n in range(5_000):
        ids.add(id_hash(f"e{n}"), n, now=n)
    assert all(id_hash(f"e{n}") in ids for n in range(5_000 - 800, 5_000))
    assert not any(id_hash(f"e{n}") in ids for n in range(5_000 - 1_100))
    assert len(ids) <= 1_100 and ids.dropped == 0


def test_an_id_of_a_late_event_shortens_the_memory_of_none() -> None:
    ids = RecentIds(horizon_seconds=80, most=10**6)
    ids.add(1, 100, now=100)
    ids.add(2, 30, now=100)
    for n in range(101, 181):
        ids.add(n, n, now=n)
        assert 1 in ids
    for n in range(181, 200):
        ids.add(n, n, now=n)
    assert 1 not in ids and 2 not in ids


@pytest.mark.parametrize("late_first", [False, True])
def test_ids_beside_a_late_one_are_kept_by_their_own_second(late_first: bool) -> None:
    ids, again = (RecentIds(horizon_seconds=80, most=10**6) for _ in range(2))
    both = [(1, 100), (2, 30)]
    for hashed, second in reversed(both) if late_first else both:
        ids.add(hashed, second, now=100)
    again.restore(through_bytes(ids.snapshot()))
    for one in (ids, again):
        for n in range(110, 181):
            one.add(n, n, now=n)
            assert 1 in one
        one.add(181, 181, now=181)
        assert 1 not in one


def test_random_numbers_are_found_where_they_are_and_nowhere_else() -> None:
    rng = random.Random(3)
    numbers = [rng.randrange(1, 1 << 64) for _ in range(3_000)] + [1, (1 << 64) - 1, 1 << 63]
    ids = RecentIds(horizon_seconds=80, most=10**6)
    for place, number in enumerate(numbers[::2]):
        ids.add(number, 0, now=place % 7 if place < 7 else 7)
    ids.add(5, 0, now=30)
    assert all(number in ids for number in numbers[::2])
    assert not any(number in ids for number in set(numbers[1::2]) - set(numbers[::2]))


def test_too_many_ids_are_bounded_and_counted() -> None:
    ids = RecentIds(horizon_seconds=1e9, most=8_000)
    for n in range(100_000):
        ids.add(id_hash(f"e{n}"), n, now=n)
    assert len(ids) < 12_000 and ids.dropped > 80_000
    assert all(id_hash(f"e{n}") in ids for n in range(93_000, 100_000))


def test_a_restart_knows_the_same_ids() -> None:
    ids, again = (RecentIds(horizon_seconds=100, most=10**6) for _ in range(2))
    for n in range(250):
        ids.add(id_hash(f"e{n}"), n, now=n)
    again.restore(through_bytes(ids.snapshot()))
    again.dropped = ids.dropped = 3
    again.restore(through_bytes(ids.snapshot()))
    assert again.dropped == 3
    for n in range(250, 500):
        near = range(n - 130, n - 80, 3)
        assert [id_hash(f"e{m}") in again for m in near] == [id_hash(f"e{m}") in ids for m in near]
        for one in (ids, again):
            one.add(id_hash(f"e{n}"), n, now=n)


def test_ids_that_do_not_fit_their_generations_are_refused() -> None:
    ids = RecentIds(horizon_seconds=100, most=10**6)
    ids.add(7, 0, now=0)
    state = ids.snapshot()
    state.arrays["ends"][:] = 5
    with pytest.raises(ValueError, match="generations"):
        RecentIds(horizon_seconds=100, most=10**6).restore(state)


def test_a_snapshot_of_an_earlier_build_still_tells_its_repetitions() -> None:
    window = EventWindow([0], lateness_seconds=5, horizon_seconds=100)
    window.observe(0, 0, behaviour("a", second=0))
    window.observe(0, 1, behaviour("b", second=1))
    state = window.snapshot()
    arrays = {name: array for name, array in state.arrays.items() if not name.startswith("ids0")}
    old = State(arrays, dict(state.values))
    del old.values["ids0"]
    old.arrays["seen0.seconds"] = whole_numbers([1_700_000_000, 1_700_000_001])
    old.put_texts("seen0", ["a", "b"])
    again = EventWindow([0], lateness_seconds=5, horizon_seconds=100)
    again.restore(old)
    assert again.observe(0, 2, behaviour("a", second=0)) is ObserveResult.DUPLICATE
    assert again.observe(0, 3, behaviour("c", second=2)) is ObserveResult.ACCEPTED
