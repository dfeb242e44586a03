"""The rows of every release come back from the log and the journal, in batches of any size."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas.behaviours import Behaviour
from tests.factories.feeding import fetches, finish, observe_all, pump, through_bytes
from tests.factories.samples import behaviour, click_log, embedding, make_trainer, small_config, unit_vector
from trainer.online.trainer import OnlineTrainer
from trainer.provenance.journal import Leaf, Segment, StepRows, VectorUse, row_text
from trainer.provenance.rebuild import Rebuild, TrainingRow, damaged_vectors
from trainer.samples.catalogue import vector_digest
from trainer.samples.join_rules import JoinRules

CONFIG = small_config(space_negatives=6, time_negatives=6, window_takes=9, bank_takes=20, release_every_rows=40)
Logs = list[list[Behaviour]]
Ends = dict[str, tuple[int, int]]


def last_segment(trainer: OnlineTrainer) -> Segment:
    """As it comes back from where it is kept, with its archive."""
    segment = trainer.candidate().segment
    assert segment is not None
    return replace(Segment.from_state(through_bytes(segment.to_state())), archive=segment.archive)


def trained(
    logs: Logs, *, seed: int, forget: bool = False, config: Any = CONFIG
) -> tuple[OnlineTrainer, list[Segment], Ends]:
    """A live run: partitions in random order, silence of one now and then, updates, deletes; users forgotten."""
    rng = np.random.default_rng(seed)
    trainer = make_trainer(config, partitions=len(logs), items=30)
    segments: list[Segment] = []
    ends: Ends = {}
    positions = [0] * len(logs)
    for p, events in fetches(logs, rng, most=29):
        for offset, event in events:
            trainer.intake.observe(p, offset, event)
        positions[p] += len(events)
        odd = int(rng.integers(8))
        if odd == 0:
            trainer.intake.window.idle([int(rng.integers(len(logs)))])
        elif odd == 1:
            trainer.delete_item(f"i{rng.integers(30)}")
        elif odd == 2:
            item = int(rng.integers(40))
            trainer.put_embedding(embedding(f"i{item}", item + 50, content=f"c{rng.integers(9)}"))
        elif odd == 3 and forget and len(ends) < 3:
            user = f"u{rng.integers(12)}"
            ends.setdefault(user, (positions[0], positions[1]))
            if ends[user] == (positions[0], positions[1]):
                trainer.forget(user)
        learn(trainer, segments)
    trainer.intake.finish()
    learn(trainer, segments)
    return trainer, [*segments, last_segment(trainer)], ends


def learn(trainer: OnlineTrainer, segments: list[Segment]) -> None:
    while True:
        trainer.intake.advance(timed_out=trainer.intake.advance())
        if trainer.step() is None:
            return
        if trainer.release_due():
            segments.append(last_segment(trainer))
            trainer.begin_next()


def rules(trainer: OnlineTrainer) -> JoinRules:
    """As they are kept beside a journal and read again."""
    kept_settings = json.loads(json.dumps(JoinRules.of(trainer.config, [0, 1]).settings))
    return JoinRules.kept(kept_settings, [0, 1], trainer.intake.window.dropped_by_idle)


def rebuilt(segment: Segment, by: JoinRules, logs: Logs, *, seed: int, ends: Ends | None = None) -> Rebuild:
    rng = np.random.default_rng(seed)
    rebuild = Rebuild(segment, by)
    for p, events in fetches(logs, rng, most=59):
        for offset, event in events:
            if offset < (ends or {}).get(event.user_id, (0, 0))[p]:
                rebuild.erased(p, offset, event.user_id)
            else:
                rebuild.observe(p, offset, event)
        rebuild.advance()
    rebuild.advance(everything=True)
    return rebuild


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_every_release_is_rebuilt_exactly_whatever_the_batches(seed: int, other: int) -> None:
    logs = click_log(150, partitions=2, seed=seed, late_takes=5)
    config = CONFIG.model_copy(update={"max_users": 8})  # users are forgotten for others: that is rebuilt too
    trainer, segments, _ = trained(logs, seed=seed, config=config)
    parts = trainer.progress.drain_scores()
    scored = [row for part in parts for row in zip(part.user, part.item, part.label, strict=True)]
    before = np.cumsum([0, *(segment.rows for segment in segments[:-1])])
    assert [segment.first_row for segment in segments] == before.tolist()
    rows = []
    for segment in segments:
        rebuild = rebuilt(segment, rules(trainer), logs, seed=other)
        result = rebuild.verify(segment.root)
        assert result.verified, result
        assert (result.rows, result.rebuilt, result.erased) == (segment.rows, segment.rows, 0)
        assert not damaged_vectors(segment.vectors, segment.archive)
        rows += list(rebuild.rows())
    first = [row for row in rows if not row.correction]
    assert [(row.user_id, row.item, row.label) for row in first] == scored
    assert len(rows) - len(first) == trainer.progress.corrected + trainer.progress.upgraded
    assert trainer.progress.corrected > 0


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000))
@example(2366)  # nothing of some users is trained: all they did was late, or forgotten before
@example(3390)
def test_after_users_were_forgotten_the_rest_still_verifies_and_they_are_not_shown(seed: int) -> None:
    logs = click_log(150, partitions=2, seed=seed, late_takes=5)
    trainer, segments, ends = trained(logs, seed=seed, forget=True)
    # and one who was forgotten long after everything was trained: the user of the first row
    p, o, _ = segments[0].steps[0].places[0].tolist()
    user = logs[p][o].user_id
    late = {**ends, user: (len(logs[0]), len(logs[1]))}
    for gone in (ends, late):
        erased = 0
        for segment in segments:
            rebuild = rebuilt(segment, rules(trainer), logs, seed=seed + 1, ends=gone)
            result = rebuild.verify(segment.root)
            assert result.verified, (result, gone)
            assert result.rebuilt + result.erased == result.rows == segment.rows
            assert gone is ends or user not in {row.user_id for row in rebuild.rows()}
            erased += result.erased
        assert gone is ends or erased > 0


def test_a_late_event_that_only_silence_made_late_is_late_again() -> None:
    trainer = make_trainer(small_config(batch_rows=4), partitions=2)
    logs: Logs = [
        [behaviour(f"x{n}", user="u0", item=f"i{n}", second=10 * n) for n in range(12)],
        [behaviour("t", "click", user="u1", item="i1", second=30), behaviour("y", user="u1", item="i2", second=95)],
    ]
    observe_all(trainer, logs[0])
    trainer.intake.window.idle([1])
    pump(trainer)
    observe_all(trainer, logs[1], partition=1)
    finish(trainer)
    assert list(trainer.intake.window.dropped_by_idle) == [(1, 0)] and trainer.intake.counts.late == 1
    segment, by = last_segment(trainer), rules(trainer)
    assert rebuilt(segment, by, logs, seed=0).verify(segment.root).verified
    forgetful = rebuilt(segment, replace(by, dropped_by_idle=()), logs, seed=0).verify(segment.root)
    assert not forgetful.verified  # the planted bug: without the journal the click would be part of a history


@pytest.mark.parametrize("harm", ["label", "history", "gone", "negatives", "vector"])
def test_what_is_not_as_it_was_trained_is_told(harm: str) -> None:
    logs = click_log(150, partitions=2, seed=4)
    trainer, segments, _ = trained(logs, seed=4)
    segment = segments[1]
    root = segment.root
    archive = dict(segment.archive)
    p, o, _ = segment.steps[0].places[0].tolist()
    if harm == "label":  # takes answer nothing any more; every place and every history is as it was
        logs[:] = [[event.model_copy(update={"exposure_id": "nowhere"}) for event in log] for log in logs]
    elif harm == "history":
        first = next(i for i, event in enumerate(logs[0]) if event.kind.is_take)
        logs[0][first] = logs[0][first].model_copy(update={"item_id": "forged"})
    elif harm == "gone":
        logs[p][o] = behaviour("other", user="u99", second=10_000)
    elif harm == "negatives":
        step = next(step for step in segment.steps if step.negatives)
        assert step.negatives is not None
        step.negatives[0] = "forged"
    else:
        archive[next(iter(archive))] = unit_vector(12345)
    result = rebuilt(segment, rules(trainer), logs, seed=1).verify(root)
    if harm == "vector":
        assert result.verified and len(damaged_vectors(segment.vectors, archive)) == 1
    else:
        told = {"gone": "rows are not in the log", "negatives": "own hash differs"}.get(
            harm, "not those that were trained"
        )
        assert not result.verified and any(told in problem for problem in result.problems), result.problems
        assert (result.rebuilt < result.rows) == (harm == "gone")


def test_a_rebuild_is_complete_when_every_row_is_there_or_known_to_be_erased_drawn_ones_too() -> None:
    places = np.array([[0, 0, 0], [0, 1, 1], [0, 1, 2]])
    segment = Segment(first_step=4, steps=[StepRows(places, np.array([0, 1, 0]), ["n"], ["i7"])])
    rebuild = Rebuild(segment, JoinRules.of(small_config(draw_exposures=1, draw_window_seconds=1), [0]))
    rebuild.observe(0, 0, behaviour("x0", item="i1", second=0))
    rebuild.advance(everything=True)
    assert not rebuild.complete
    rebuild.erased(0, 5, "gone")  # no row of this stretch
    assert not rebuild.complete
    rebuild.erased(0, 1, "gone")
    assert rebuild.complete
    (row,) = rebuild.rows()
    assert (row.step, row.place, row.event_id, row.user_id, row.item) == (5, (0, 0, 0), "x0", "u1", "i1")
    assert (row.second, row.label, row.correction, row.negatives) == (1_700_000_000, 0, False, None)
    result = rebuild.verify(segment.root)
    assert (result.rows, result.rebuilt, result.erased, result.users) == (3, 1, 2, 1)


def leaf_of(row: TrainingRow) -> Leaf:
    leaf = Leaf()
    leaf.add(row_text(row.event_id, row.item, str(row.label), row.history, row.history_seconds))
    return leaf


@pytest.mark.parametrize(
    ("others", "erased", "problem"),
    [
        ([], (), None),
        ([Leaf(b"z", 2)], (1, 2), None),
        ([Leaf(b"z", 2)], (1,), "not in the log"),
        ([Leaf(b"z", 1)], (1, 2), "1 trained rows belong to no user, but 2 rows were erased"),
        ([Leaf(b"z", 3)], (1, 2), "3 trained rows belong to no user, but 2 rows were erased"),
        (None, (), "rows of 1 users"),
    ],
)
def test_leaves_without_rows_are_those_of_the_erased_and_of_nobody_else(
    others: list[Leaf] | None, erased: tuple[int, ...], problem: str | None
) -> None:
    places = np.array([[0, place, 0] for place in range(3 if others else 1)])
    segment = Segment(steps=[StepRows(places, np.zeros(len(places), np.int64), None)])
    rebuild = Rebuild(segment, JoinRules.of(small_config(), [0]))
    rebuild.observe(0, 0, behaviour("x0", item="i1", second=0))
    for place in erased:
        rebuild.erased(0, place, "gone")
    rebuild.advance(everything=True)
    (row,) = rebuild.rows()
    segment.leaves = [Leaf(b"y", 1)] if others is None else [*others, leaf_of(row)]
    result = rebuild.verify(segment.root)
    assert result.verified == (problem is None), result
    assert problem is None or any(problem in one for one in result.problems), result


def test_a_row_is_settled_before_a_later_second_is_joined_and_a_correction_is_told_from_it() -> None:
    by = JoinRules.of(small_config(attribution_seconds=5, correction_seconds=100), [0])
    segment = Segment(steps=[StepRows(np.array([[0, 0, 0], [0, 1, 0]]), np.array([0, 1]), ["n"])])
    rebuild = Rebuild(segment, by)
    rebuild.observe(0, 0, behaviour("x0", item="i1", second=0))
    rebuild.observe(0, 1, behaviour("t0", "click", item="i1", second=50))
    rebuild.advance(everything=True)
    rows = list(rebuild.rows())
    assert [(row.event_id, row.label, row.correction, row.negatives) for row in rows] == [
        ("x0", 0, False, None),
        ("t0", 1, True, ["n"]),
    ]


@pytest.mark.parametrize("lost", [0, 1])
def test_rows_of_a_user_who_came_back_after_the_erasure_are_among_those_that_were_erased(lost: int) -> None:
    """Their chain lacks its beginning, so its leaf cannot be compared: the rows are counted."""
    segment = Segment(steps=[StepRows(np.array([[0, 0, 0], [0, 1, 0]]), np.zeros(2, np.int64), None)])
    segment.leaves = [Leaf(b"both rows", 2 + lost)]
    rebuild = Rebuild(segment, JoinRules.of(small_config(), [0]))
    rebuild.erased(0, 0, "u1")
    rebuild.observe(0, 1, behaviour("x1", item="i1", second=0))
    rebuild.advance(everything=True)
    assert rebuild.verify(segment.root).verified == (not lost)


def test_a_vector_is_damaged_where_it_is_missing_or_another_and_one_that_was_none_is_not() -> None:
    vector = unit_vector(1)
    digest = vector_digest("c", vector)
    uses = [VectorUse(0, "there", digest, "c", 0.0), VectorUse(0, "none", b"", "", 0.0)]
    assert damaged_vectors(uses, {digest: vector}) == []
    assert damaged_vectors(uses, {}) == damaged_vectors(uses, {digest: unit_vector(2)}) == ["there"]
