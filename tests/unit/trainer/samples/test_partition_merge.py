"""Reading several partitions side by side, and waiting for vectors: decided without a broker."""

from __future__ import annotations

import json
import math
import random

from tests.factories.samples import behaviour
from trainer.online.embedding_wait import EmbeddingWait
from trainer.samples.partition_merge import Entry, PartitionMerge

SILENT = {0: math.inf, 1: math.inf}


def make_entry(partition: int, offset: int, second: float | None, *, produced_at: float = 0.0) -> Entry:
    event = None if second is None else behaviour(f"{partition}-{offset}", second=second)
    return Entry(partition, offset, produced_at, event)


def make_log(partition: int, seconds: list[float | None]) -> list[Entry]:
    return [make_entry(partition, offset, second) for offset, second in enumerate(seconds)]


def make_merge(*logs: list[float | None], room: int = 100, silence: float = 0.0) -> PartitionMerge:
    """Two partitions with the events of these seconds."""
    merge = PartitionMerge([0, 1], room_per_partition=room, silence_seconds=silence)
    for partition, seconds in enumerate(logs):
        merge.add(partition, make_log(partition, seconds))
    return merge


def places(entries: list[Entry]) -> list[tuple[int, int]]:
    return [(entry.partition, entry.offset) for entry in entries]


def test_the_partition_furthest_behind_is_handed_out_first() -> None:
    merge = make_merge([1, 4, 9], [2, 3, 10])
    merge.set_exhausted(SILENT)
    assert places(merge.pop(10)) == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2)]
    assert merge.empty_and_exhausted() == [0, 1]


def test_nothing_is_handed_out_while_a_partition_with_more_to_give_is_empty() -> None:
    merge = make_merge([1, 2, 3])
    assert merge.pop(10) == []
    merge.set_exhausted({1: math.inf})  # the broker says: nothing there
    assert places(merge.pop(2)) == [(0, 0), (0, 1)]
    merge.set_exhausted({})  # new records there, not fetched yet
    assert merge.pop(10) == []


def test_an_event_from_the_past_and_a_broken_one_do_not_set_a_partition_back() -> None:
    merge = make_merge([10, 1, None, 12], [5, 11, 20])
    merge.set_exhausted(SILENT)
    # 0 stands at 10 after its first event, so the old and the broken one come right behind it
    assert places(merge.pop(10)) == [(1, 0), (0, 0), (0, 1), (0, 2), (1, 1), (0, 3), (1, 2)]


def test_the_order_does_not_depend_on_how_much_is_fetched_at_a_time() -> None:
    rng = random.Random(7)
    logs = {p: make_log(p, [rng.choice([None, *range(100)]) for _ in range(rng.randrange(200))]) for p in range(5)}
    orders = []
    for most in (1, 3, 17, 1000):
        merge = PartitionMerge(list(logs), room_per_partition=10)
        fetched = dict.fromkeys(logs, 0)
        order: list[tuple[int, int]] = []
        while len(order) < sum(map(len, logs.values())):
            for p in rng.sample(merge.with_room(), k=rng.randint(0, len(merge.with_room()))):
                size = rng.randint(0, most)
                merge.add(p, logs[p][fetched[p] : fetched[p] + size])
                fetched[p] = min(len(logs[p]), fetched[p] + size)
            merge.set_exhausted({p: math.inf for p in logs if fetched[p] == len(logs[p])})
            order += places(merge.pop(rng.randint(1, 50)))
        orders.append(order)
    assert all(order == orders[0] for order in orders)
    for p, entries in logs.items():
        assert [offset for partition, offset in orders[0] if partition == p] == [entry.offset for entry in entries]


def test_a_burst_after_silence_waits_for_the_share_of_the_other_partitions() -> None:
    # partition 0's half of a burst arrives at 100; the broker found partition 1 empty at 100, and at 103 it is there
    merge = make_merge(silence=5)
    merge.add(0, [make_entry(0, n, 1000 + 10 * n, produced_at=100) for n in range(3)])
    for now in (100, 102):
        merge.set_exhausted({0: now, 1: now})
        assert merge.pop(10) == []
    merge.add(1, [make_entry(1, n, 1005 + 10 * n, produced_at=100) for n in range(3)])
    merge.set_exhausted({0: 103, 1: 103})
    assert places(merge.pop(10)) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]  # 0 is empty now, and may get more
    merge.set_exhausted({0: 105, 1: 105})
    assert places(merge.pop(10)) == [(1, 2)]


def test_a_partition_that_stays_silent_does_not_hold_the_others_for_ever() -> None:
    merge = make_merge(silence=5)
    for second in range(20):  # one event a second in partition 0, none in partition 1
        merge.add(0, [make_entry(0, second, second, produced_at=second)])
    merge.set_exhausted({1: 12.0})
    assert len(merge.pop(100)) == 8  # those produced at 0 to 7


def test_a_partition_without_room_is_not_fetched_nor_said_to_be_read_to_its_end() -> None:
    merge = make_merge([1, 2], room=2)
    assert merge.with_room() == [1]
    merge.set_exhausted(SILENT)
    assert merge.empty_and_exhausted() == [1]


def test_an_item_is_waited_for_from_when_its_first_behaviour_was_produced() -> None:
    waits = EmbeddingWait(timeout_seconds=120)
    waits.needed("new", produced_at=1000)
    waits.needed("new", produced_at=1100)
    assert waits.overdue(["new"], now=1119) == set()
    assert waits.overdue(["new"], now=1120) == {"new"}


def test_an_old_log_does_not_wait_for_items_that_never_got_a_vector() -> None:
    waits = EmbeddingWait(timeout_seconds=120)
    for number in range(50):
        waits.needed(f"gone{number}", produced_at=0)
    assert len(waits.overdue([f"gone{number}" for number in range(50)], now=86_400)) == 50


def test_a_vector_or_a_tombstone_ends_the_wait() -> None:
    waits = EmbeddingWait(timeout_seconds=120)
    waits.needed("item", produced_at=0)
    waits.resolved("item")
    waits.needed("item", produced_at=500)
    assert waits.overdue(["item"], now=619) == set()
    assert waits.overdue(["item"], now=620) == {"item"}


def test_an_item_that_no_behaviour_named_is_waited_for_from_now_on() -> None:
    waits = EmbeddingWait(timeout_seconds=10)
    assert waits.overdue(["history"], now=100) == set()
    assert waits.overdue(["history"], now=110) == {"history"}


def test_waits_survive_a_restart() -> None:
    waits, again = EmbeddingWait(timeout_seconds=10), EmbeddingWait(timeout_seconds=10)
    for item, at in (("a", 0), ("b", 5), ("c", 6)):
        waits.needed(item, produced_at=at)
    waits.timed_out(["a"])
    again.restore(json.loads(json.dumps(waits.snapshot())))
    for each in (waits, again):
        each.needed("a", produced_at=8)  # waited for anew
        assert each.timeouts == 1 and each.overdue(["a", "b", "c"], now=15) == {"b"}


def test_waits_are_bounded() -> None:
    waits = EmbeddingWait(timeout_seconds=10, max_waits=3)
    for number in range(10):
        waits.needed(str(number), produced_at=number)
    assert waits.overdue(["9"], now=19) == {"9"}
    assert waits.overdue(["0"], now=19) == set()  # forgotten, so it starts anew


def test_of_some_partitions_alone_the_others_keep_their_entries_and_their_order() -> None:
    merge = make_merge([1, 4, 9], [2, 3, 10])
    merge.set_exhausted(SILENT)
    assert merge.pop(10, only=[]) == []
    assert places(merge.pop(2, only=[1])) == [(1, 0), (1, 1)]
    assert places(merge.pop(10)) == [(0, 0), (0, 1), (0, 2), (1, 2)]
    merge.add(0, [])
    assert merge.empty_and_exhausted() == [0, 1]


def test_an_item_that_is_waited_for_already_takes_no_others_place() -> None:
    waits = EmbeddingWait(timeout_seconds=10, max_waits=2)
    for item, at in (("a", 0), ("b", 0), ("b", 9), ("a", 9)):
        waits.needed(item, produced_at=at)
    assert waits.overdue(["a", "b"], now=10) == {"a", "b"}
