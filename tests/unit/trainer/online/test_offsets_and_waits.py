"""Where every event stands: the offsets of a candidate, what a batch waits for, what is held back at the end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.factories.feeding import finish, is_balanced, observe_all, pump, through_bytes
from tests.factories.samples import DAY0, behaviour, click_log, embedding, make_trainer, small_config
from trainer.online.remembered_items import RememberedItems
from trainer.online.trainer import OnlineTrainer
from trainer.samples.rows import Impression


def test_the_offsets_of_a_candidate_are_those_below_which_everything_is_learned() -> None:
    trainer, learned, newest, seen = make_trainer(), set[int](), 0, []
    log = [behaviour("first", "click", user="u99", second=-1), *click_log(60)[0]]  # a take before any row
    for offset, event in enumerate(log):
        trainer.intake.observe(0, offset, event)
        for report in pump(trainer):
            newest = max(newest, report.last_event_at)
        learned |= {o for step in trainer.journal.segment().steps for _, o, _ in step.places.tolist()}
        done = [
            at in learned or (e.kind.is_take and e.occurred_at.timestamp() <= newest)
            for at, e in enumerate(log[: offset + 1])
        ]
        expected = done.index(False) if False in done else offset + 1
        found = trainer.candidate().offsets[0]
        assert found == max((at + 1 for at in range(expected) if done[at]), default=0)
        assert trainer.intake.offsets.read_offsets() == {0: offset + 1}
        seen.append((found, trainer.intake.offsets.committed_offsets()[0], offset + 1))
    assert len({found for found, _, _ in seen}) > 5
    assert any(found < committed < read for found, committed, read in seen)  # three different things
    finish(trainer)
    assert trainer.candidate().offsets == trainer.intake.offsets.committed_offsets() == {0: len(log)}


@pytest.mark.parametrize("restart", [False, True])
def test_a_row_waits_until_its_item_comes_is_deleted_or_given_up_and_that_ends_with_the_next_vector(
    restart: bool,
) -> None:
    trainer = make_trainer(small_config(batch_rows=2, lateness_seconds=0, attribution_seconds=0), items=0)
    observe_all(trainer, [behaviour(f"x{n}", item=f"i{n % 2}", second=n) for n in range(7)])
    trainer.delete_item("i0")
    assert trainer.intake.advance() == {"i1"} and trainer.step() is None
    assert trainer.intake.advance(timed_out=["i1"]) == frozenset()
    trainer = restarted(trainer) if restart else trainer
    assert trainer.intake.advance() == frozenset() and trainer.step() is not None
    trainer.put_embedding(embedding("i0", 1))
    trainer.put_embedding(embedding("i1", 2))
    for item in ("i0", "i1"):  # what comes after a vector is waited for again
        trainer.catalogue.delete_item(item)
    assert trainer.intake.advance() == {"i0", "i1"}


def restarted(trainer: OnlineTrainer) -> OnlineTrainer:
    again = make_trainer(trainer.config, items=0)
    again.restore(through_bytes(trainer.snapshot()))
    return again


def test_a_batch_waits_for_takes_to_its_last_second_and_no_further() -> None:
    trainer = make_trainer(small_config(batch_rows=2, lateness_seconds=0, attribution_seconds=0), items=3)
    log = [behaviour("x0", item="i1", second=0), behaviour("x1", item="i2", second=5)]
    log += [behaviour("t0", "click", user="u2", item="new", second=5)]
    log += [behaviour("t1", "click", user="u2", item="newer", second=6), behaviour("x2", item="i1", second=8)]
    observe_all(trainer, log)
    assert trainer.intake.advance() == {"new"}
    trainer.put_embedding(embedding("new", 9))
    assert not trainer.intake.advance()
    assert trainer.step() is not None
    assert [take.second - DAY0 for take in trainer.intake.takes_until(DAY0 + 7)] == [6]


@pytest.mark.parametrize("rows", [0, 3, 30])
def test_the_last_rows_are_kept_back_and_then_learned_in_the_same_batches(rows: int) -> None:
    def batches(rows: int) -> list[list[str]]:
        trainer = make_trainer(small_config(batch_rows=4, lateness_seconds=0))
        observe_all(trainer, [behaviour(f"x{n}", item="i1", user=f"u{n}", second=n) for n in range(42)])
        trainer.intake.hold_back(rows)
        trainer.intake.finish()
        found, kept = [], 0
        for held in (rows, 0):
            trainer.intake.hold_back(held)
            trainer.intake.advance()
            while batch := trainer.intake.next_batch():
                found.append([row.event_id for row in batch])
                trainer.intake.trained(batch)
                trainer.intake.advance()
            if held:
                kept = trainer.intake.last_rows
                assert trainer.intake.at_last_rows and rows <= kept < rows + 4
        assert trainer.intake.last_rows == 0 and not trainer.intake.at_last_rows
        return found

    assert [len(batch) for batch in batches(rows)] == [*[4] * 10, 2] and batches(rows) == batches(0)


def test_exactly_as_many_rows_as_a_batch_and_those_held_back_are_enough() -> None:
    trainer = make_trainer(small_config(batch_rows=4, lateness_seconds=0, attribution_seconds=0))
    trainer.intake.hold_back(2)
    for n in range(8):
        trainer.intake.observe(0, n, behaviour(f"x{n}", item="i1", user=f"u{n}", second=n))
        trainer.intake.advance()
        ready = trainer.intake.last_rows
        assert bool(trainer.intake.next_batch()) == (ready == 6) == (n == 6), n


@pytest.mark.parametrize("late", ["waits for its take", "is buffered"])
def test_a_short_batch_is_made_only_when_nothing_else_can_fill_it(late: str) -> None:
    """Nine rows are more than are made ready at a time; what is left behind them still comes."""
    trainer = make_trainer(small_config(batch_rows=2, lateness_seconds=0, attribution_seconds=0))
    log = [behaviour(f"x{n}", item=f"i{n}", second=0) for n in range(9)]
    log += [behaviour("t", "click", user="other", item="i1", second=1)] if late == "is buffered" else []
    log += [behaviour(f"y{n}", item=f"i{n}", second=1 + len(log) % 9) for n in range(3)]
    observe_all(trainer, log)
    trainer.intake.finish()
    sizes = []
    for _ in range(3):
        trainer.intake.advance()
        while batch := trainer.intake.next_batch():
            sizes.append(len(batch))
            trainer.intake.trained(batch)
    assert sizes == [2] * 6


def test_the_last_rows_are_at_hand_only_when_no_batch_can_be_taken_before_them() -> None:
    trainer = make_trainer(small_config(batch_rows=4, lateness_seconds=0, attribution_seconds=0))
    trainer.intake.hold_back(2)
    observe_all(trainer, [behaviour(f"x{n}", item="i1", user=f"u{n}", second=n) for n in range(6)])
    trainer.intake.finish()
    trainer.intake.advance()
    assert trainer.intake.last_rows == 6 and not trainer.intake.at_last_rows
    trainer.intake.trained(trainer.intake.next_batch())
    assert trainer.intake.last_rows == 2 and trainer.intake.at_last_rows and trainer.intake.next_batch() == []


def test_a_user_is_forgotten_wherever_their_events_stand() -> None:
    """Buffered, waiting for a take, ready, a correction that is ready, and a queued take."""
    config = small_config(batch_rows=100, lateness_seconds=0, attribution_seconds=4, correction_seconds=100)
    trainer = make_trainer(config)
    log = []
    for n in range(12):
        log.append(behaviour(f"x{n}", user=f"u{n % 2}", item=f"i{n}", second=3 * n))
        log.append(
            behaviour(f"t{n}", "click", user=f"u{n % 2}", item=f"i{n}", second=3 * n + n % 3, exposure_id=f"x{n}")
        )
    log += [
        behaviour(f"l{n}", "purchase", user=f"u{n}", item=f"i{n}", second=36, exposure_id=f"x{n}") for n in range(2)
    ]
    log.append(behaviour("z", user="u1", item="i1", second=38))
    observe_all(trainer, sorted(log, key=lambda event: event.occurred_at))
    trainer.intake.advance()
    own = sum(event.user_id == "u0" for event in log)
    before = trainer.intake.counts
    erased = trainer.forget("u0")
    counts = trainer.intake.counts
    assert counts.erased == erased and counts.trained == before.trained and counts.pending == before.pending - erased
    assert is_balanced(counts) and 0 < erased < own  # takes count as trained once they are history
    again = restarted(trainer)
    for each in (trainer, again):
        finish(each)
        rows = [row for table in each.progress.drain_scores() for row in table.user.tolist()]
        assert rows == ["u1"] * 7 and each.progress.upgraded == 1
        assert each.intake.counts.pending == 0 and is_balanced(each.intake.counts)
        assert each.intake.offsets.trained_offsets() == each.intake.offsets.committed_offsets() == {0: len(log)}


def test_kinds_and_late_events_are_counted_by_partition_over_a_restart() -> None:
    trainer = make_trainer(small_config(lateness_seconds=5), partitions=2)
    for offset, (kind, second) in enumerate(
        (("exposure", 0), ("click", 30), ("click", 31), ("purchase", 20), ("cart", 3))
    ):
        trainer.intake.observe(1, offset, behaviour(f"e{offset}", kind, second=second))
    again = make_trainer(small_config(lateness_seconds=5), partitions=2)
    again.restore(through_bytes(trainer.snapshot()))
    for each in (trainer, again):
        assert each.intake.kinds == {"exposure": 1, "click": 2} and each.intake.late.by_partition == {1: 2}
    late = trainer.intake.late.newest
    assert [(one.partition, one.offset, one.event_id, one.behind_seconds) for one in late] == [
        (1, 3, "e3", 11), (1, 4, "e4", 28),
    ]  # fmt: skip
    assert late[0].occurred_at == DAY0 + 20
    for offset in range(5, 40):
        trainer.intake.observe(1, offset, behaviour(f"e{offset}", second=3))
    assert [one.offset for one in trainer.intake.late.newest] == list(range(20, 40))
    assert trainer.intake.late.by_partition == {1: 37}


def test_the_newest_items_are_remembered_and_one_named_again_is_new() -> None:
    items = RememberedItems(3)
    for item in "abcad":
        items.add(item)
    assert list(items) == ["c", "a", "d"] and "b" not in items
    items.discard("a")
    items.discard("never")
    items.restore("wxyz")
    assert list(items) == ["x", "y", "z"]


def test_a_row_of_the_log_settles_its_place_and_a_correction_or_a_drawn_row_does_not() -> None:
    trainer = make_trainer(small_config(lateness_seconds=0, attribution_seconds=0))
    observe_all(trainer, [behaviour(f"x{n}", item="i1", second=n) for n in range(3)])
    trainer.intake.advance()
    row = Impression("x0", 0, 0, DAY0, "u1", 1, (), (), False, False)
    others = [replace(row, offset=1, correction=True), replace(row, offset=1, draw=1)]
    trainer.intake.trained([row, *others])
    assert trainer.intake.offsets.committed_offsets() == {0: 1} and trainer.intake.counts.trained == 1


def test_items_are_in_use_while_a_row_that_is_ready_or_a_take_that_is_queued_names_them() -> None:
    config = small_config(
        lateness_seconds=0, attribution_seconds=0, history_length=1, correction_megabytes=0, batch_rows=9
    )
    trainer = make_trainer(config)
    log = [behaviour("t0", "click", item="i1", second=0), behaviour("q0", "click", user="v", item="i5", second=0)]
    log += [behaviour("x1", item="i2", second=1), behaviour("q1", "click", user="v", item="i6", second=1)]
    log += [behaviour("t1", "click", item="i3", second=2), behaviour("x2", user="w", item="i4", second=50)]
    observe_all(trainer, [*log, behaviour("end", user="w", item="i9", second=60)])
    trainer.intake.advance()

    def in_use() -> set[str]:
        return {trainer.catalogue.item_id(item) for item in trainer.intake.items_in_use()}

    assert in_use() == {"i1", "i2", "i3", "i4", "i5", "i6"}
    trainer.intake.takes_until(DAY0 + 60)
    assert in_use() == {"i1", "i2", "i3", "i4", "i6"}
    trainer.intake._ready.clear()
    assert in_use() == {"i3", "i6"}
