from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories.feeding import fetches, through_bytes
from tests.factories.samples import DAY0, behaviour
from trainer.samples.window import EventWindow, Observed, ObserveResult


def window(partitions: int = 2, *, lateness: float = 10, horizon: float = 100) -> EventWindow:
    return EventWindow(range(partitions), lateness_seconds=lateness, horizon_seconds=horizon)


def released_ids(events: EventWindow, *, everything: bool = False) -> list[str]:
    return [event.behaviour.event_id for second in events.released(everything=everything) for event in second]


def test_nothing_is_released_before_every_partition_spoke() -> None:
    events = window()
    events.observe(0, 0, behaviour("a", second=0))
    events.observe(0, 1, behaviour("b", second=1000))
    assert released_ids(events) == []


def test_watermark_is_the_slowest_partition_minus_lateness() -> None:
    # p0   0 ......... 1000        p1   0 .. 30        lateness 10 -> released before 20
    events = window()
    events.observe(0, 0, behaviour("a", second=0))
    events.observe(0, 1, behaviour("b", second=1000))
    events.observe(1, 0, behaviour("c", second=19))
    events.observe(1, 1, behaviour("d", second=30))
    assert events.watermark == DAY0 + 20
    assert released_ids(events) == ["a", "c"]
    assert events.buffered == 2


def test_idle_partition_does_not_hold_back_and_speaks_again() -> None:
    events = window()
    events.observe(0, 0, behaviour("a", second=0))
    events.observe(0, 1, behaviour("b", second=50))
    events.idle([1])
    assert released_ids(events) == ["a"]
    events.observe(1, 0, behaviour("c", second=60))
    events.observe(0, 2, behaviour("d", second=500))
    assert events.watermark == DAY0 + 50  # partition 1 counts again: 60 - 10
    assert released_ids(events) == []


def test_event_behind_its_own_partition_by_more_than_the_lateness_is_late() -> None:
    events = window()
    assert events.observe(0, 0, behaviour("a", second=100)) is ObserveResult.ACCEPTED
    assert events.observe(0, 1, behaviour("b", second=90)) is ObserveResult.ACCEPTED
    assert events.observe(0, 2, behaviour("c", second=89)) is ObserveResult.LATE


def test_repeated_event_id_is_a_duplicate_inside_the_horizon_and_late_beyond_it() -> None:
    events = window(horizon=50)
    events.observe(0, 0, behaviour("a", second=0))
    assert events.observe(0, 1, behaviour("a", second=0)) is ObserveResult.DUPLICATE
    events.observe(0, 2, behaviour("b", second=50))
    assert events.observe(0, 3, behaviour("a", second=0)) is ObserveResult.DUPLICATE
    events.observe(0, 4, behaviour("c", second=51))
    assert events.observe(0, 5, behaviour("a", second=0)) is ObserveResult.LATE


def test_remembered_ids_are_bounded_by_the_horizon() -> None:
    events = window(1, horizon=50)
    for n in range(1000):
        events.observe(0, n, behaviour(f"e{n}", second=n))
    assert 51 <= len(events._partitions[0].seen) <= 51 * 9 / 8


def test_all_idle_releases_all_but_the_newest_second() -> None:
    events = window()
    events.observe(0, 0, behaviour("a", second=0))
    events.observe(1, 0, behaviour("b", second=7))
    events.idle([0, 1])
    assert released_ids(events) == ["a"]
    # a further event of that second is still in time
    assert events.observe(1, 1, behaviour("c", second=7)) is ObserveResult.ACCEPTED


@pytest.mark.parametrize("restarted", [False, True])
def test_a_second_that_only_a_forgotten_user_spoke_in_judges_no_event_restarted_or_not(restarted: bool) -> None:
    events = window(lateness=5)
    for offset, (event_id, user, second) in enumerate([("a", "u", 100), ("b", "v", 104), ("c", "u", 107)]):
        events.observe(0, offset, behaviour(event_id, user=user, second=second))
    assert [event.behaviour.event_id for event in events.forget("v")] == ["b"]
    if restarted:
        state, events = events.snapshot(), window(lateness=5)
        events.restore(state)
    events.idle([0, 1])
    assert released_ids(events) == ["a"]
    assert events.observe(1, 0, behaviour("x", user="x", second=103)) is ObserveResult.ACCEPTED
    assert released_ids(events, everything=True) == ["x", "c"]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_results_and_order_do_not_depend_on_how_partitions_interleave(data: st.DataObject) -> None:
    logs = [
        data.draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=25), label=f"partition {p}")
        for p in range(3)
    ]

    def run(seed: int) -> tuple[list[str], list[tuple[int, int, ObserveResult]]]:
        rng = np.random.default_rng(seed)
        events = window(3, lateness=8, horizon=20)
        results, order = [], []
        for p, fetched in fetches(logs, rng, most=5):
            for offset, (second, ident) in fetched:
                event = behaviour(f"p{p}-{ident}", second=second)
                results.append((p, offset, events.observe(p, offset, event)))
            order += released_ids(events)
        order += released_ids(events, everything=True)
        return order, sorted(results, key=lambda v: v[:2])

    assert run(1) == run(2) == run(3)


def test_a_second_is_ordered_exposures_first_then_by_id_and_place_never_by_arrival() -> None:
    places = [("c", "click", 0, 2), ("a", "click", 0, 3), ("b", "exposure", 1, 4), ("b", "exposure", 0, 9),
              ("b", "exposure", 0, 5), ("a", "exposure", 1, 8)]  # fmt: skip
    events = [Observed(p, offset, DAY0, behaviour(event_id, kind)) for event_id, kind, p, offset in places]
    found = [
        (event.behaviour.event_id, event.partition, event.offset) for event in sorted(events, key=lambda e: e.order)
    ]
    assert found == [("a", 1, 8), ("b", 0, 5), ("b", 0, 9), ("b", 1, 4), ("a", 0, 3), ("c", 0, 2)]


@pytest.mark.parametrize("hold", [0, 6])
def test_what_a_second_was_released_with_is_final_and_what_follows_is_not(hold: int) -> None:
    events = EventWindow([0, 1], lateness_seconds=10, horizon_seconds=10, hold_seconds=hold)
    for offset, second in enumerate((0, 40)):
        events.observe(0, offset, behaviour(f"a{second}", second=second))
    events.observe(1, 0, behaviour("b", second=35))
    assert events.complete_before == DAY0 + 25 - hold
    events.idle([1])
    assert events.complete_before == -math.inf  # nothing was released, and partition 1 may resume
    assert released_ids(events) == ["a0"]
    assert events.complete_before == DAY0 + 1
    fresh = EventWindow([0, 1], lateness_seconds=10, horizon_seconds=10, hold_seconds=hold)
    for offset, second in enumerate((0, 40)):
        fresh.observe(0, offset, behaviour(f"a{second}", second=second))
    fresh.idle([1])
    assert released_ids(fresh) == ["a0"] and fresh.complete_before == DAY0 + 1
    assert fresh.observe(1, 0, behaviour("c", second=hold)) is ObserveResult.LATE
    assert list(fresh.dropped_by_idle) == [(1, 0)]
    assert fresh.observe(1, 1, behaviour("d", second=hold + 1)) is ObserveResult.ACCEPTED


def test_what_waits_ahead_is_given_from_the_first_to_the_last_second_in_order() -> None:
    events = window(1, lateness=50)
    for offset, second in enumerate((4, 1, 3, 2, 0)):
        events.observe(0, offset, behaviour(f"e{second}", second=second))
    found = [event.behaviour.event_id for second in events.ahead(DAY0 + 1, DAY0 + 3) for event in second]
    assert found == ["e1", "e2", "e3"] and events.buffered == 5


def test_an_id_is_remembered_at_least_as_long_as_an_event_may_be_late() -> None:
    events = window(1, lateness=40, horizon=5)
    for offset, second in enumerate((0, 30)):
        events.observe(0, offset, behaviour(f"e{second}", second=second))
    assert events.observe(0, 2, behaviour("e0", second=0)) is ObserveResult.DUPLICATE


def test_the_ids_that_may_be_remembered_are_shared_out_among_partitions() -> None:
    events = EventWindow(range(4), lateness_seconds=1, horizon_seconds=1e9, most_ids=320)
    for n in range(400):
        events.observe(0, n, behaviour(f"e{n}", second=n))
    assert events.ids_dropped > 250


def test_events_dropped_by_idle_are_listed_until_the_log_has_deleted_them() -> None:
    events = EventWindow([0, 1], lateness_seconds=0, horizon_seconds=9, dropped_by_idle=[(0, 4), (0, 5), (1, 2)])
    events.forget_dropped_by_idle({0: 5})
    assert list(events.dropped_by_idle) == [(0, 5), (1, 2)]
    assert events.observe(0, 5, behaviour("a")) is ObserveResult.LATE


VERBS = ("observe", "observe", "observe", "observe", "release", "idle", "forget")


@pytest.mark.parametrize("hold", [0, 6])
@pytest.mark.parametrize("seed", range(12))
def test_a_window_restored_anywhere_goes_on_as_the_one_that_was_not(seed: int, hold: int) -> None:
    rng = random.Random(seed)
    script = [(rng.choice(VERBS), rng.randrange(2), n // 2 + rng.randrange(12)) for n in range(60)]
    cuts = rng.sample(range(10, 60), 3)

    def make() -> EventWindow:
        return EventWindow([0, 1], lateness_seconds=5, horizon_seconds=20, hold_seconds=hold)

    one, other, idle = make(), make(), set[int]()
    for offset, (verb, which, second) in enumerate(script):
        if offset in cuts:
            state, other = other.snapshot(), make()
            other.restore(through_bytes(state))
            other.idle(idle)  # that is no part of a snapshot
        told = []
        for events in (one, other):
            if verb == "observe":
                event = behaviour(f"{which}-{second % 11}", user=f"u{second % 3}", second=second)
                told.append(str(events.observe(which, offset, event)))
            elif verb == "idle":
                events.idle([which])
            elif verb == "forget":
                told.append(str(sorted(event.offset for event in events.forget(f"u{which}"))))
            else:
                told.append(str(released_ids(events)))
        idle = idle | {which} if verb == "idle" else idle - {which} if verb == "observe" else idle
        assert told[:1] == told[1:]
        for name in ("watermark", "complete_before", "buffered", "buffered_bytes", "dropped_by_idle"):
            assert getattr(one, name) == getattr(other, name), name
    assert released_ids(one, everything=True) == released_ids(other, everything=True)


def test_a_partition_speaks_again_with_an_event_that_is_not_accepted_too() -> None:
    events = window()
    for partition in (0, 1):
        events.observe(partition, 0, behaviour(f"a{partition}", second=0))
    events.observe(0, 1, behaviour("b", second=50))
    for event_id, second in (("a1", 0), ("c", -11)):
        events.idle([1])
        assert events.watermark == DAY0 + 40
        assert events.observe(1, 1, behaviour(event_id, second=second)) is not ObserveResult.ACCEPTED
        assert events.watermark == DAY0 - 10


def test_the_slowest_partitions_are_those_without_events_and_then_those_furthest_behind_but_none_that_is_idle() -> None:
    events = window(3)
    assert events.slowest == {0, 1, 2}
    events.observe(0, 0, behaviour("a", second=5))
    assert events.slowest == {1, 2}
    events.idle([2])
    assert events.slowest == {1}
    events.observe(1, 0, behaviour("b", second=5))
    assert events.slowest == {0, 1}
    events.observe(0, 1, behaviour("c", second=9))
    assert events.slowest == {1} and events.newest(0) == DAY0 + 9 and events.newest(2) is None
    events.idle([0, 1])
    assert events.slowest == set()
