from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from schemas.behaviours import Behaviour
from tests.factories.feeding import fetches, finish, is_balanced, observe_all, pump, through_bytes
from tests.factories.samples import DAY0, behaviour, make_trainer, small_config
from tests.factories.timelines import Timeline
from trainer.online.config import TrainerConfig
from trainer.online.trainer import OnlineTrainer
from trainer.provenance.journal import Segment
from trainer.provenance.rebuild import Rebuild
from trainer.samples.exposure_draws import DrawnBefore, ExposureDraws, nothing_ahead
from trainer.samples.id_hashes import id_hashes
from trainer.samples.join_rules import JoinRules
from trainer.samples.rows import Impression
from trainer.samples.window import Observed

DRAWING = {"draw_exposures": 2, "draw_window_seconds": 20, "release_every_rows": 10_000}


def takes(count: int, *, partitions: int = 1, seed: int = 0) -> list[list[Behaviour]]:
    """Takes alone, of 12 users and 30 items; every fifth is followed by a purchase."""
    rng = np.random.default_rng(seed)
    logs: list[list[Behaviour]] = [[] for _ in range(partitions)]
    second = 0
    for n in range(count):
        second += int(rng.integers(0, 3))
        user, item = int(rng.integers(12)), f"i{rng.integers(30)}"
        log = logs[user % partitions]
        log.append(behaviour(f"t{n}", "click", user=f"u{user}", item=item, second=second))
        if n % 5 == 0:
            log.append(behaviour(f"p{n}", "purchase", user=f"u{user}", item=item, second=second + 8))
    return [sorted(log, key=lambda event: event.occurred_at) for log in logs]


def pool(draws: ExposureDraws) -> list[tuple[int, str, str]]:
    """Second, item and user of the takes that are drawn from."""
    state = draws.snapshot()
    return list(zip((state.arrays["seconds"] - DAY0).tolist(), state.texts("items"), state.texts("users"), strict=True))


@pytest.mark.parametrize("restart", [False, True])
def test_what_is_drawn_from_is_what_was_taken_around_the_moment_and_none_of_it_the_user_takes_then_or_later(
    restart: bool,
) -> None:
    rng, window = np.random.default_rng(4), 6
    log = [(int(s), f"i{rng.integers(9)}", f"u{rng.integers(3)}") for s in np.sort(rng.integers(0, 60, 120))]
    seconds = {
        second: [
            Observed(0, n, DAY0 + second, behaviour(f"t{n}", "click", user=user, item=item, second=second))
            for n, (at, item, user) in enumerate(log)
            if at == second
        ]
        for second in sorted({at for at, _, _ in log})
    }

    def ahead(first: int, last: int) -> list[list[Observed]]:
        return [own for at, own in seconds.items() if first <= DAY0 + at <= last]

    draws, gone, drawn = ExposureDraws(per_take=9, window_seconds=window), None, 0
    for now in list(seconds):
        if not (events := seconds[now]):
            continue
        draws.move_to(events, ahead)
        if now > 40 and gone is None:
            gone = "u1"
            draws.forget(gone)
            seconds.update({at: [e for e in own if e.behaviour.user_id != gone] for at, own in seconds.items()})
            events = seconds[now]
            log = [take for take in log if take[2] != gone]
        if restart:
            state, draws = draws.snapshot(), ExposureDraws(per_take=9, window_seconds=window)
            draws.restore(through_bytes(state))
        around = [take for take in log if abs(take[0] - now) <= window]
        assert sorted(pool(draws)) == sorted(around)
        for event in events:
            own, user = event.behaviour.item_id, event.behaviour.user_id
            taken = {item for at, item, who in around if who == user and at >= now}
            expected = {item for _, item, _ in around} - taken - {own, "i3"}
            found = [drawn.item_id for drawn in draws.draw(event, fits=lambda item: item != "i3")]
            assert set(found) == expected and len(found) == len(expected)
            drawn += len(found)
    assert drawn > 200


def test_a_second_that_was_known_as_the_last_one_ahead_is_not_counted_again() -> None:
    events = [Observed(0, n, DAY0 + 6 * n, behaviour(f"t{n}", "click", item=f"i{n}", second=6 * n)) for n in range(3)]
    draws = ExposureDraws(per_take=1, window_seconds=6)
    for event in events:
        draws.move_to([event], lambda first, last: [[one] for one in events if first <= one.second <= last])
    assert [at for at, _, _ in pool(draws)] == [6, 12]


def test_no_more_is_drawn_than_was_asked_for_and_each_take_has_draws_of_its_own() -> None:
    events = [Observed(0, n, DAY0, behaviour(f"t{n}", "click", user=f"u{n}", item=f"i{n}")) for n in range(40)]
    draws = ExposureDraws(per_take=3, window_seconds=5)
    draws.move_to(events, nothing_ahead)
    found = [tuple(one.item_id for one in draws.draw(event, fits=lambda item: True)) for event in events]
    assert all(len(set(one)) == 3 for one in found) and len(set(found)) > 35
    assert {item for one in found for item in one} > {f"i{n}" for n in range(0, 40, 8)}


def test_of_a_busy_second_the_takes_kept_are_chosen_by_their_ids_whatever_their_order() -> None:
    events = [Observed(0, n, DAY0, behaviour(f"t{n}", "click", item=f"i{n}")) for n in range(30)]
    kept = []
    for order in (events, events[::-1]):
        draws = ExposureDraws(per_take=1, window_seconds=24_999)  # two of a second
        draws.move_to(order, nothing_ahead)
        kept.append({item for _, item, _ in pool(draws)})
    assert kept[0] == kept[1] and len(kept[0]) == 2 and not kept[0] & {"i0", "i1"}


def test_draws_that_were_kept_come_back_by_place_and_number_and_others_are_the_takes_own() -> None:
    before = DrawnBefore({(0, 5, 2): "a", (0, 5, 3): "b", (1, 5, 2): "c"})
    events = [Observed(p, o, DAY0, behaviour("t", "click", item="own")) for p, o in ((0, 5), (1, 5), (0, 6))]
    found = [[drawn.item_id for drawn in before.draw(event, fits=lambda item: True)] for event in events]
    assert found == [["a", "b"], ["c", "own"], ["own", "own"]]


def drawing_line(restart: Timeline | None = None) -> Timeline:
    line = Timeline(draw_exposures=2, draw_window_seconds=20, correction_megabytes=1, correction_seconds=30)
    if restart is not None:
        line.catalogue, line.rows, line.offset = restart.catalogue, restart.rows, restart.offset
        line.join = line.rules.join(line.catalogue)
        line.join.restore(through_bytes(restart.join.snapshot()))
    return line


@pytest.mark.parametrize("restart", [False, True])
def test_a_second_take_answers_the_exposure_that_was_drawn_for_the_first_and_never_one_beside_it(restart: bool) -> None:
    line = drawing_line()
    line.second(0, *(behaviour(f"o{n}", "click", user="other", item=f"i{n}") for n in range(3)))
    line.second(1, behaviour("t1", "click", item="i9"))
    line = drawing_line(line) if restart else line
    assert line.join.waiting == 0  # what was drawn waits for no event of the log
    line.second(3, behaviour("t2", "purchase", item="i9"), behaviour("t3", "cart", item="i0"))
    rows = {row.event_id: row for row in line.end() if row.user_id == "u1"}
    assert {name: (row.label, row.taken_as) for name, row in rows.items() if row.draw <= 1} == {
        "t1": (1, "purchase"), "t3": (1, "cart"),
    }  # fmt: skip
    beside = [row for row in rows.values() if row.draw > 1]
    assert len(beside) >= 3 and not any(row.label for row in beside) and line.join.waiting_bytes == 0


def test_a_take_too_late_for_the_exposure_of_an_earlier_one_gets_one_of_its_own() -> None:
    line = drawing_line()
    line.second(0, behaviour("t1", "click", item="i9"))
    line.second(35, behaviour("t2", "click", item="i9"))  # known, says nothing new
    line.second(41, behaviour("t3", "click", item="i9"))  # 10 + 30 seconds are over
    assert [(row.event_id, row.draw) for row in line.end()] == [("t1", 1), ("t3", 1)]


def test_what_was_drawn_beside_a_take_is_never_corrected_and_goes_with_its_user() -> None:
    line = drawing_line()
    takes = {"o": ("other", "i0"), "t1": ("u1", "i9"), "t9": ("gone", "i8")}
    line.second(0, *(behaviour(name, "click", user=user, item=item) for name, (user, item) in takes.items()))
    assert {row.user_id for row in line.join.forget("gone")} == {"gone"} and line.join.waiting == 0
    assert set(line.join.snapshot().part("draws").texts("users")) == {"other", "u1"}
    line.second(20, behaviour("t2", "click", item="i0"), behaviour("t3", "click", user="v", item="i7"))
    assert line.corrected() == []
    rows = line.end()
    assert {row.item for row in rows if row.user_id == "v"} <= {line.catalogue.number(f"i{n}") for n in (0, 7, 9)}
    assert ("t2", 1) in {(row.event_id, row.draw) for row in rows}


def rows_of(log: list[Behaviour], **over: object) -> tuple[OnlineTrainer, list[Impression]]:
    """Everything that comes out ready, in its order."""
    trainer = make_trainer(small_config(**{**DRAWING, "batch_rows": 2, **over}))
    observe_all(trainer, log)
    trainer.intake.finish()
    rows = []
    trainer.intake.advance()
    while batch := trainer.intake.next_batch():
        rows += batch
        trainer.intake.trained(batch)
        trainer.intake.advance()
    return trainer, rows


def test_what_is_drawn_names_a_take_of_its_item_within_the_window() -> None:
    (log,) = takes(100)
    trainer, rows = rows_of(log)
    by_hash = {id_hashes(event.event_id)[0]: event for event in log}
    assert {row.drawn_from for row in rows if row.draw <= 1} == {0}
    beside = [row for row in rows if row.draw > 1]
    assert len(beside) > 100
    for row in beside:
        source = by_hash[row.drawn_from]
        assert source.item_id == trainer.catalogue.item_id(row.item) and source.kind.is_take
        assert int(source.occurred_at.timestamp()) == row.drawn_second and abs(row.drawn_second - row.second) <= 20


def test_a_log_of_takes_alone_makes_a_row_of_each_and_the_stated_number_beside_it() -> None:
    log = [event for event in takes(100)[0] if event.kind == "click"]
    trainer, rows = rows_of(log)
    first = [row for row in rows if row.draw == 1]
    by_event = {event.event_id: event for event in log}
    assert {row.event_id for row in first} <= by_event.keys() and len(first) > 80
    assert all(row.label == 1 and row.taken_as == "click" for row in first)
    beside = [row for row in rows if row.draw > 1]
    assert all(row.label == 0 and row.event_id.rsplit("~")[0] in by_event for row in beside)
    assert len(beside) > 1.5 * len(first)
    for row in beside:
        own = by_event[row.event_id.rsplit("~")[0]]
        around = {e.item_id for e in log if abs((e.occurred_at - own.occurred_at).total_seconds()) <= 20}
        assert trainer.catalogue.item_id(row.item) in around - {own.item_id}
    assert is_balanced(trainer.intake.counts) and trainer.intake.pending == 0


def test_without_the_setting_takes_alone_make_no_row() -> None:
    _, rows = rows_of(takes(50)[0], draw_exposures=0)
    assert rows == []


def test_a_take_that_answers_an_exposure_draws_nothing() -> None:
    log = [
        behaviour("t0", "click", user="u9", item="i9", second=0),
        behaviour("x1", item="i1", second=1),
        behaviour("t1", "click", item="i1", second=2),
        behaviour("x2", item="i2", second=3),
        behaviour("t2", "click", item="i2", second=4, exposure_id="x2"),
        behaviour("t3", "click", item="i3", second=5, exposure_id="not-in-the-log"),
    ]
    _, rows = rows_of(log)
    assert {(row.event_id, row.label) for row in rows} == {("t0", 1), ("x1", 1), ("x2", 1)}


def test_nothing_is_drawn_that_the_user_takes_later_or_that_the_log_has_not_named_yet_but_earlier_takes_are() -> None:
    log = [
        behaviour("t0", "click", user="u1", item="i1", second=0),
        behaviour("t1", "click", user="u2", item="i2", second=10),
        behaviour("t2", "click", user="u1", item="i3", second=11),
        behaviour("t3", "click", user="u1", item="i2", second=13),
        behaviour("t4", "click", user="u3", item="i4", second=14),
    ]
    trainer, rows = rows_of(log, draw_exposures=9)
    drawn = {trainer.catalogue.item_id(row.item) for row in rows if row.event_id.startswith("t2~")}
    assert drawn == {"i1"}
    assert [row.retaken for row in rows if row.event_id.startswith("t2~")] == [True]
    assert {trainer.catalogue.item_id(row.item) for row in rows if row.event_id.startswith("t4~")} == {"i1", "i2", "i3"}


def test_a_later_purchase_corrects_the_row_that_was_drawn_for_the_click() -> None:
    log = [
        behaviour("t1", "click", item="i1", second=0),
        behaviour("t2", "click", user="u2", item="i2", second=10),
        behaviour("buy", "purchase", item="i1", second=300),
    ]
    _, rows = rows_of(log)
    assert [(row.event_id, row.upgrade, row.taken_as) for row in rows if row.correction] == [("buy", True, "purchase")]
    assert sum(row.draw == 1 for row in rows) == 2


def run(logs: list[list[Behaviour]], *, seed: int, most: int, config: TrainerConfig, cuts: int = 0) -> OnlineTrainer:
    rng = np.random.default_rng(seed)
    trainer = make_trainer(config, partitions=len(logs))
    for number, (p, events) in enumerate(fetches(logs, rng, most=most)):
        for offset, event in events:
            trainer.intake.observe(p, offset, event)
        pump(trainer)
        if cuts and number % cuts == 0:
            again = make_trainer(config, partitions=len(logs))
            again.restore(through_bytes(trainer.snapshot()))
            trainer = again
    finish(trainer)
    return trainer


@pytest.mark.parametrize("most", [9])
def test_the_same_offsets_give_the_same_draws_whatever_the_fetches_and_restarts(most: int) -> None:
    logs, config = takes(70, partitions=2), small_config(**DRAWING)
    one = run(logs, seed=1, most=10_000, config=config)
    other = run(logs, seed=2, most=most, config=config, cuts=7)
    assert one.progress.rows > 150
    assert (one.progress.rows_sha256, one.progress.rows) == (other.progress.rows_sha256, other.progress.rows)
    assert is_balanced(other.intake.counts)


@pytest.mark.parametrize("forget", [False, True])
def test_drawn_rows_are_rebuilt_exactly_also_after_a_user_was_forgotten(forget: bool) -> None:
    (log,) = takes(120)
    config = small_config(**DRAWING)
    trainer = make_trainer(config)
    half = len(log) // 2
    observe_all(trainer, log[:half])
    pump(trainer)
    ends = 0
    if forget:
        trainer.forget("u3")
        ends = half
    for offset in range(half, len(log)):
        trainer.intake.observe(0, offset, log[offset])
    finish(trainer)
    kept = trainer.candidate().segment
    assert kept is not None
    segment = replace(Segment.from_state(through_bytes(kept.to_state())), archive=kept.archive)
    rebuild = Rebuild(segment, JoinRules.kept(JoinRules.of(config, [0]).settings, [0], ()))
    for offset, event in enumerate(log):
        if event.user_id == "u3" and offset < ends:
            rebuild.erased(0, offset, event.user_id)
        else:
            rebuild.observe(0, offset, event)
    rebuild.advance(everything=True)
    result = rebuild.verify(segment.root)
    assert result.verified, result
    assert result.rows == trainer.progress.rows and bool(result.erased) == forget


def test_held_seconds_are_final_for_a_partition_that_resumes() -> None:
    trainer = make_trainer(small_config(**DRAWING, lateness_seconds=0), partitions=2)
    for offset, second in enumerate((0, 5, 40)):
        trainer.intake.observe(0, offset, behaviour(f"t{offset}", "click", item="i1", second=second))
    trainer.intake.window.idle([1])
    trainer.intake.advance()
    assert trainer.intake.window.complete_before == DAY0 + 6
    late = trainer.intake.observe(1, 0, behaviour("late", "click", user="u2", item="i2", second=25))
    assert late.name == "LATE" and (1, 0) in trainer.intake.window.dropped_by_idle


def taken(event_id: str, user: str, item: str, second: int) -> Observed:
    return Observed(0, second, DAY0 + second, behaviour(event_id, "click", user=user, item=item, second=second))


def test_nothing_is_left_of_a_user_who_was_forgotten() -> None:
    draws = ExposureDraws(per_take=2, window_seconds=20)
    events = [taken("t1", "u1", "a", 5), taken("t2", "u2", "a", 5), taken("t3", "u2", "b", 5)]
    draws.move_to(events, nothing_ahead)
    assert draws.draw(taken("t0", "u1", "b", 4), fits=lambda item: True) == []
    draws.forget("u1")
    assert pool(draws) == [(5, "a", "u2"), (5, "b", "u2")] and {user for user, _ in draws._last} == {"u2"}
    (drawn,) = draws.draw(taken("t0", "u1", "b", 4), fits=lambda item: True)
    assert (drawn.item_id, drawn.event_id) == ("a", "t2")


def test_takes_of_an_earlier_build_that_kept_no_events_are_drawn_without_them() -> None:
    draws, again = (ExposureDraws(per_take=1, window_seconds=20) for _ in range(2))
    draws.move_to([taken("t1", "u1", "a", 5)], nothing_ahead)
    state = through_bytes(draws.snapshot())
    for name in [name for name in state.arrays if name.startswith("events")]:
        del state.arrays[name]
    again.restore(state)
    (drawn,) = again.draw(taken("t0", "u2", "b", 4), fits=lambda item: True)
    assert (drawn.item_id, drawn.event_id) == ("a", "")


def test_what_was_drawn_before_is_drawn_again_to_the_last_and_elsewhere_the_take_itself() -> None:
    draws = DrawnBefore({(0, 5, 2): "a", (0, 5, 3): "b"})
    found = [[one.item_id for one in draws.draw(taken("t", "u", "own", at), fits=bool)] for at in (5, 6)]
    assert found == [["a", "b"], ["own", "own"]]
