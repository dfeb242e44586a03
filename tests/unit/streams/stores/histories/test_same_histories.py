"""Training, serving and evaluation see the same histories."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from schemas.behaviours import Behaviour
from streams.broker.records import BehaviourRecord
from streams.stores.histories.config import BehaviourStoreConfig
from streams.stores.histories.packed_history import (
    UserTakes,
    hash_of,
    pack_takes,
    packed_history,
    packed_items,
    unpack_takes,
)
from streams.stores.histories.store import InMemoryBehaviourStore
from tests.factories.click_log import LOG
from tests.factories.samples import DAY0, behaviour
from tests.factories.timelines import Timeline
from trainer.offline.data import Histories
from trainer.samples.join_rules import JoinRules
from trainer.samples.rows import Impression

USERS, LENGTH, LATENESS = 4, 5, 20
Log = list[tuple[int, Behaviour]]


def random_log(rng: random.Random) -> Log:
    """Takes of all kinds and exposures, by (partition, event): out of order as far as counts, some delivered twice."""
    log = []
    for number, second in enumerate(rng.sample(range(2_000), 300)):
        kind = rng.choice(["exposure", "click", "click", "cart", "purchase"])
        user = rng.randrange(USERS)
        made = behaviour(f"e{number}", kind, user=f"u{user}", item=f"i{rng.randrange(9)}", second=second)
        for _ in range(rng.choice([1, 1, 1, 2])):
            log.append((second + rng.randrange(LATENESS), user % 2, made))
    log.sort(key=lambda entry: entry[0])
    return [(partition, made) for _, partition, made in log]


def trained(log: Log) -> tuple[list[Impression], Timeline]:
    """Impressions of the log, and one of each user after its end."""
    line = Timeline()
    config = Timeline.config(history_length=LENGTH, lateness_seconds=LATENESS)
    rules = JoinRules.of(config, [0, 1])
    window, join = rules.window(), rules.join(line.catalogue)
    ends = [(user % 2, behaviour(f"end{user}", user=f"u{user}", item="end", second=3_000)) for user in range(USERS)]
    rows: list[Impression] = []
    for offset, (partition, made) in enumerate([*log, *ends]):
        window.observe(partition, offset, made)
        for events in window.released():
            join.add_second(events)
    for events in window.released(everything=True):
        join.add_second(events)
    rows.extend(join.resolved(float("inf")))
    return rows, line


async def served(log: Log, rng: random.Random) -> InMemoryBehaviourStore:
    """What recorders store who begin again at any place, as after a kill."""
    store = InMemoryBehaviourStore(BehaviourStoreConfig(history_length=LENGTH + rng.randrange(20)))
    await store.bind(LOG)
    for partition in (0, 1):
        records = [BehaviourRecord(offset, made) for offset, (where, made) in enumerate(log) if where == partition]
        for batch in cut(records, rng):
            first, last = batch[0].offset, batch[-1].offset + 1
            stored = (await store.positions()).get(partition, 0)
            report = await store.record(partition, batch, first_offset=min(first, stored), next_offset=last)
            assert report.resume_from is None
    return store


def cut(records: list[BehaviourRecord], rng: random.Random) -> Iterator[list[BehaviourRecord]]:
    at = 0
    while at < len(records):
        end = min(at + rng.randrange(1, 40), len(records))
        yield records[max(0, at - rng.randrange(30)) : end]
        at = end


def evaluated(log: Log, rows: list[Impression], line: Timeline) -> list[list[int]]:
    """History of each row, oldest first, as of its second."""
    once = {made.event_id: made for _, made in log if made.kind.is_take}.values()
    takes = sorted(
        (int(made.user_id[1:]), int(made.occurred_at.timestamp()), line.catalogue.number(made.item_id)) for made in once
    )
    user_T, second_T, item_T = np.array(takes).T
    place_T = user_T * (1 << 40) + second_T
    user_N = np.array([int(row.user_id[1:]) for row in rows])
    start_N = np.searchsorted(user_T, user_N)
    stop_N = np.searchsorted(place_T, user_N * (1 << 40) + np.array([row.second for row in rows]))
    row_P, place_P, _ = Histories.of(user_T, item_T, second_T).newest(start_N, stop_N, LENGTH)
    return [item_T[place_P[row_P == n]][::-1].tolist() for n in range(len(rows))]


@pytest.mark.parametrize("seed", range(8))
async def test_trainer_redis_and_evaluation_hold_the_same_histories(seed: int) -> None:
    rng = random.Random(seed)
    log = random_log(rng)
    rows, line = trained(log)
    assert [list(row.history) for row in rows] == evaluated(log, rows, line)
    store = await served(log, rng)
    ends = [row for row in rows if row.event_id.startswith("end")]
    assert len(ends) == USERS
    for row in ends:
        assert (await store.taken_items(row.user_id))[-LENGTH:] == line.history(row)
        times = [taken.occurred_at for taken in await store.history(row.user_id)]
        assert times[-LENGTH:] == list(row.history_seconds)


def observed(*takes: tuple[str, str, float]) -> UserTakes:
    user = UserTakes()
    for number, (item, kind, at) in enumerate(takes):
        assert user.observe(behaviour(f"e{number}", kind, item=item, second=at), length=5, remembered=9)
    return user


def test_an_item_stands_once_at_its_newest_take_as_its_most_reliable_kind() -> None:
    user = observed(("a", "click", 1), ("b", "click", 2), ("a", "purchase", 3), ("a", "click", 4), ("c", "cart", 5))
    assert [(taken.item_id, taken.occurred_at - DAY0, taken.kind) for taken in user.history()] == [
        ("b", 2, "click"),
        ("a", 4, "purchase"),
        ("c", 5, "cart"),
    ]
    assert user.ids == [hash_of("e1"), hash_of("e3"), hash_of("e4")]
    stored = UserTakes()
    unpack_takes(pack_takes(user), stored)
    assert (stored.history(), stored.ids) == (user.history(), user.ids)


def test_a_take_that_is_recorded_late_moves_no_item_back() -> None:
    user = observed(("a", "click", 9), ("b", "click", 10), ("a", "purchase", 3))
    assert [(taken.item_id, taken.occurred_at - DAY0, taken.kind) for taken in user.history()] == [
        ("a", 9, "purchase"),
        ("b", 10, "click"),
    ]


def test_histories_that_an_earlier_build_stored_are_read_with_each_item_once() -> None:
    ids = [hash_of(f"e{n}") for n in range(4)]
    packed = pack_takes(UserTakes([1.0, 2.0, 3.0, 4.0], ["a", "b", "a", "c"], bytearray([2, 0, 0, 1]), ids))
    assert packed_items(packed) == ["b", "a", "c"]
    assert [(taken.item_id, taken.occurred_at, taken.kind) for taken in packed_history(packed)] == [
        ("b", 2.0, "click"),
        ("a", 3.0, "purchase"),
        ("c", 4.0, "cart"),
    ]
    user = UserTakes()
    unpack_takes(packed, user)
    assert user.items == ["b", "a", "c"] and user.ids == ids[1:]
