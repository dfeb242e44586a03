"""States of items as records: what a trainer writes, and what a server computes from its copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from schemas.item_states import StateHead, parse_state_key, state_key, state_value
from tests.factories.feature_world import Take, World
from tests.factories.state_pipe import CONFIG, ITEMS, TAKES, Pipe, asked, of_server, of_trainer
from trainer.features import columns, state_records
from trainer.features.columns import features
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState
from trainer.features.state_records import StateCopies
from trainer.features.states import SharedCounts, TakeRows
from trainer.samples.id_hashes import id_hashes


@pytest.mark.parametrize("most", [3, 1_000])
def test_trainer_and_server_compute_the_same_to_the_last_bit_at_the_same_state(most: int) -> None:
    pipe = Pipe()
    for start in range(0, len(TAKES), 50):
        pipe.count(TAKES[start : start + 50])
        assert (pipe.write(most=most) == 1) == (most > ITEMS)
        assert pipe.copies.complete and pipe.copies.head is not None
        states = pipe.copies.states(np.zeros((1, 2), np.int64), pipe.world.facts(np.array([0])))
        assert pipe.copies.head.before == pipe.state.before == states.before
        assert of_server(pipe.copies, pipe.world).tobytes() == of_trainer(pipe).tobytes()
    late = StateCopies(CONFIG)
    for record in pipe.compacted():
        late.apply(*record)
    assert late.head == pipe.copies.head and of_server(late, pipe.world).tobytes() == of_trainer(pipe).tobytes()


def test_only_what_changed_is_written_again() -> None:
    pipe = Pipe()
    pipe.count(TAKES)
    pipe.write()
    assert pipe.write() == 0
    pipe.count([Take(99, 7, 50_000, 10_001)])
    before = len(pipe.topic)
    assert pipe.write() == 1
    written = [parse_state_key(key)[1] for key, _ in pipe.topic[before:]]
    assert written == [id_hashes("i7")[0], None], "a user's first take changes its item alone; the head comes last"


def test_what_changes_while_a_write_is_on_its_way_comes_with_the_next() -> None:
    pipe = Pipe()
    pipe.count(TAKES)
    write = pipe.writer.next(pipe.state, most=1_000)
    assert write is not None
    pipe.count([Take(99, 7, 50_000, 10_001)])
    pipe.writer.written(write, takes=0)
    for record in write.records:
        pipe.copies.apply(*record)
    assert of_server(pipe.copies, pipe.world).tobytes() != of_trainer(pipe).tobytes()
    assert pipe.write() == 1
    assert of_server(pipe.copies, pipe.world).tobytes() == of_trainer(pipe).tobytes()


def test_a_write_that_failed_is_made_again() -> None:
    pipe = Pipe()
    pipe.count(TAKES[:50])
    assert pipe.writer.next(pipe.state, most=1_000) is not None
    pipe.count(TAKES[50:100])
    pipe.write()
    assert of_server(pipe.copies, pipe.world).tobytes() == of_trainer(pipe).tobytes()


def test_a_deleted_item_gets_a_tombstone_and_leaves_the_copies_of_lists() -> None:
    pipe = Pipe()
    pipe.count(TAKES)
    pipe.write()
    pipe.state.delete("i3")
    pipe.count([Take(99, 7, 50_000, 10_001)])  # lists are searched with the next step
    pipe.write()
    assert (state_key(CONFIG.version, id_hashes("i3")[0]), None) in pipe.topic
    numbers, _ = asked()
    held = pipe.copies.states(pipe.world.hashes(numbers), pipe.world.facts(numbers))
    assert held.takes.takes_U[3] == 0 and pipe.world.hash(3) not in held.takes.partner_UP
    assert of_server(pipe.copies, pipe.world).tobytes() == of_trainer(pipe).tobytes()


def test_items_that_lose_their_counts_to_others_lose_them_in_the_topic() -> None:
    pipe = Pipe(CONFIG.model_copy(update={"max_items": 32}))
    for start in range(0, len(TAKES), 25):
        pipe.count(TAKES[start : start + 25])
        pipe.write()
    assert len(pipe.copies) == len(pipe.state.keys) <= 32
    assert of_server(pipe.copies, pipe.world).tobytes() == of_trainer(pipe).tobytes()


def test_an_item_without_a_copy_was_never_taken() -> None:
    copies, world = StateCopies(CONFIG), World(CONFIG, ITEMS)
    numbers, request = asked()
    untaken = FeatureState(CONFIG, world).states(numbers)
    assert of_server(copies, world).tobytes() == features(CONFIG, untaken, *request).tobytes()
    assert copies.head is None and not copies.complete


def test_a_server_with_less_room_drops_those_longest_without_a_take() -> None:
    pipe = Pipe()
    pipe.count(TAKES)
    pipe.write()
    small = StateCopies(CONFIG.model_copy(update={"max_items": 16}))
    for record in pipe.compacted():
        small.apply(*record)
    assert 0 < len(small) <= 16
    pipe.count([Take(99, 7, 50_000, 10_001)])
    pipe.write()
    for record in pipe.compacted():
        small.apply(*record)
    numbers, _ = asked()
    assert small.states(pipe.world.hashes(numbers), pipe.world.facts(numbers)).takes.last_U[7] == 50_000


def test_a_full_server_drops_those_longest_without_a_take_and_none_that_just_changed() -> None:
    copies, world = StateCopies(CONFIG.model_copy(update={"max_items": 16})), World(CONFIG, ITEMS)
    head = StateHead(number=1, before=0, left=0, log="log")

    def write(**last: int) -> None:
        for item, second in last.items():
            rows = TakeRows.empty(CONFIG, 1)
            rows.takes_U[0], rows.last_U[0] = 1, second
            copies.apply(state_key(CONFIG.version, id_hashes(item)[0]), state_value(CONFIG.version, rows.to_bytes(0)))
        copies.apply(
            state_key(CONFIG.version, None), state_value(CONFIG.version, SharedCounts.empty().to_bytes(), head)
        )

    write(**{f"i{n}": 100 - n for n in range(1, 17)})
    write(i16=200, i17=201, i18=202)
    numbers, _ = asked()
    held = copies.states(world.hashes(numbers), world.facts(numbers)).takes
    last = {item: int(held.last_U[item]) for item in np.flatnonzero(held.takes_U).tolist()}
    assert last == {n: 100 - n for n in range(1, 14)} | {16: 200, 17: 201, 18: 202} and len(copies) == 16


def test_copies_are_a_state_of_the_trainer_from_the_last_record_of_a_write_until_some_of_the_next_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state_records, "_HELD_BACK", 3)
    pipe = Pipe()
    copies = pipe.copies

    def write(most: int) -> tuple[StateHead, list[tuple[bool, StateHead | None]]]:
        made = pipe.writer.next(pipe.state, most=most, hold=True)
        assert made is not None and len(made.items) > 3
        found = []
        for record in made.records:
            copies.apply(*record)
            found.append((copies.complete, copies.held_head))
        pipe.writer.written(made, takes=0)
        return made.head, found

    pipe.count(TAKES[:300])
    _, found = write(5)
    assert found[-1] == (False, None), "items are left"
    first, found = write(1_000)
    assert found[-1] == (True, first) and first.held
    pipe.count(TAKES[300:])
    second, (*found, last) = write(1_000)
    assert found[:2] == [(False, first)] * 2, "kept back until there are three"
    assert {held for _, held in found[2:]} == {None} and last == (True, second)


class Costly(dict[int, int]):
    """Refuses what takes as long as it has entries."""

    def keys(self) -> Any:
        raise AssertionError("all items were looked at")

    __iter__ = keys


def test_a_write_costs_a_server_as_much_as_the_write_holds_however_many_items_it_knows() -> None:
    pipe = Pipe()
    pipe.count(TAKES[:200])
    pipe.write()
    pipe.copies._slot = Costly(pipe.copies._slot)
    pipe.count(TAKES[200:])
    pipe.write()
    assert of_server(pipe.copies, pipe.world).tobytes() == of_trainer(pipe).tobytes()


# ---- another trainer -------------------------------------------------------------------------------------------------


def test_a_trainer_that_goes_on_writes_only_what_the_topic_does_not_hold() -> None:
    pipe = Pipe()
    pipe.count(TAKES[:200])
    pipe.write()
    pipe.count(TAKES[200:203])  # counted, and the trainer ends before it writes
    pipe.restart()
    before = len(pipe.topic)
    assert pipe.write() == 1
    assert 0 < len(pipe.topic) - before < ITEMS
    assert pipe.copies.head is not None and pipe.copies.head.number == 2
    assert of_server(pipe.copies, pipe.world).tobytes() == of_trainer(pipe).tobytes()


def test_an_item_that_the_topic_holds_no_more_is_written_again() -> None:
    pipe = Pipe()
    pipe.count(TAKES)
    pipe.write()
    key = state_key(CONFIG.version, id_hashes("i3")[0])
    pipe.restart()
    pipe.writer.heard(key, None)
    pipe.copies.apply(key, None)
    assert pipe.write() == 1
    assert of_server(pipe.copies, pipe.world).tobytes() == of_trainer(pipe).tobytes()


def test_a_topic_that_begins_anew_hears_of_a_state_without_takes_too() -> None:
    pipe = Pipe()
    assert pipe.write() == 1 and pipe.write() == 0
    pipe.writer.begin_anew()
    assert pipe.write() == 1 and pipe.write() == 0


def test_a_trainer_behind_the_topic_writes_nothing_until_it_has_caught_up() -> None:
    pipe = Pipe()
    pipe.count(TAKES)
    pipe.write()
    served, topic = of_server(pipe.copies, pipe.world), len(pipe.topic)
    pipe.restart(late=True)
    pipe.count(TAKES[:100])
    assert pipe.writer.is_late(pipe.state) and pipe.write() == 0 and len(pipe.topic) == topic
    assert of_server(pipe.copies, pipe.world).tobytes() == served.tobytes()
    pipe.count(TAKES[100:])
    assert pipe.write() == 1
    assert of_server(pipe.copies, pipe.world).tobytes() == of_trainer(pipe).tobytes()


def test_a_trainer_of_another_log_removes_what_it_never_counted() -> None:
    pipe = Pipe()
    pipe.count(TAKES)
    pipe.write()
    pipe.restart(late=True, log="another")
    pipe.count(TAKES[:10])
    assert pipe.write() == 1 and len(pipe.copies) == len({take.item for take in TAKES[:10]})
    assert of_server(pipe.copies, pipe.world).tobytes() == of_trainer(pipe).tobytes()


def test_states_of_another_feature_set_stand_beside_and_are_passed_over() -> None:
    other = FeatureConfig(partners=8, max_items=64)
    one, two = Pipe(), Pipe(other)
    one.count(TAKES)
    one.write()
    topic = list(one.topic)
    two.topic = topic
    two.restart()
    two.count(TAKES[:50])
    two.write()
    copies = StateCopies(CONFIG)
    for record in two.compacted():
        copies.apply(*record)
    assert copies.head == one.copies.head and of_server(copies, one.world).tobytes() == of_trainer(one).tobytes()


# ---- skews that have to be caught ------------------------------------------------------------------------------------


def test_a_stale_counter_is_seen_as_another_state_and_other_numbers() -> None:
    pipe = Pipe()
    pipe.count(TAKES[:300])
    pipe.write()
    pipe.count(TAKES[300:])
    assert pipe.copies.head is not None and pipe.copies.head.before < pipe.state.before
    stale, current = of_server(pipe.copies, pipe.world), of_trainer(pipe)
    takes = CONFIG.names.index("takes")
    assert (stale[:, takes] != current[:, takes]).any()


def test_a_half_life_changed_on_one_side_makes_another_set(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe()
    pipe.count(TAKES)
    pipe.write()
    was = CONFIG.version
    monkeypatch.setitem(columns.HALF_LIVES, "1d", 86_401.0)  # the one dictionary that all of a process read
    assert CONFIG.version != was
    served = StateCopies(CONFIG)
    for record in pipe.compacted():
        served.apply(*record)
    assert served.head is None and len(served) == 0


def test_swapped_features_make_another_set() -> None:
    assert FeatureConfig(attributes=("a", "b")).version != FeatureConfig(attributes=("b", "a")).version
    assert FeatureConfig(numbers=("year", "price")).version != FeatureConfig(numbers=("price", "year")).version
