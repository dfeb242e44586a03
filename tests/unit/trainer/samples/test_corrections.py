from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from schemas.behaviours import BehaviourKind
from tests.factories.feeding import finish, is_balanced, observe_all, through_bytes
from tests.factories.samples import DAY0, DIM, SMALL_MODEL, behaviour, make_catalogue, make_trainer, small_config
from tests.factories.timelines import Timeline
from trainer.negatives.memory_bank import SpaceTimeMemory
from trainer.negatives.sampler import SpaceTimeSampler, TakeCounts
from trainer.networks.collate import collate
from trainer.networks.config import LearnerConfig
from trainer.networks.learner import Learner
from trainer.online.trainer import OnlineTrainer
from trainer.samples.config import JoinConfig
from trainer.samples.corrections import CorrectableRows
from trainer.samples.join_rules import JoinRules
from trainer.samples.recent_ids import BYTES_PER_ID
from trainer.samples.rows import Impression, pack_impressions, unpack_impressions
from trainer.samples.window import ObserveResult

HOUR = 3600
WINDOWS = {"correction_seconds": 100, "cart_correction_seconds": 200, "purchase_correction_seconds": 400}


def correcting(**over: Any) -> Timeline:
    return Timeline(**{"correction_megabytes": 1, **WINDOWS, **over})


def test_a_late_take_brings_its_exposure_once_more_as_taken_with_the_history_of_then() -> None:
    line = correcting()
    line.second(0, behaviour("t0", "click", item="z"))
    line.second(1, behaviour("x1", item="a"))
    line.second(2, behaviour("t1", "click", item="y"))
    line.second(50, behaviour("late", "purchase", item="a", exposure_id="x1"))
    (row,) = line.join.corrections()
    assert (row.event_id, row.second - DAY0, row.label, row.correction) == ("late", 1, 1, True)
    assert line.history(row) == ["z"] and row.taken_as == "purchase" and not row.upgrade
    assert [(row.event_id, row.label) for row in line.end()] == [("x1", 0)]
    line.second(51, behaviour("again", "purchase", item="a", exposure_id="x1"))
    assert line.corrected() == []  # once


def test_click_cart_and_purchase_after_each_other_end_as_a_purchase() -> None:
    line = Timeline(attribution_seconds=60, correction_megabytes=1)  # the windows of the default settings
    line.second(0, behaviour("x1", item="a"))
    line.second(20, behaviour("t1", "click", item="a", exposure_id="x1"))
    line.second(90, behaviour("t2", "cart", item="a", exposure_id="x1"))
    line.second(300, behaviour("t3", "purchase", item="a"))
    line.second(301, behaviour("t4", "click", item="a", exposure_id="x1"))
    cart, purchase = line.join.corrections()
    assert [(row.event_id, row.label, row.taken_as) for row in line.end()] == [("x1", 1, "click")]
    assert (cart.event_id, cart.label, cart.taken_as, cart.upgrade) == ("t2", 1, "cart", True)
    assert (purchase.event_id, purchase.taken_as, purchase.upgrade, purchase.shown_as) == ("t3", "purchase", True, "x1")
    assert line.join.too_late == 0


@pytest.mark.parametrize(("kind", "last"), [("click", 110), ("cart", 210), ("purchase", 410)])
def test_each_kind_of_take_has_a_window_of_its_own_and_one_that_is_too_late_is_counted(kind: str, last: int) -> None:
    line = correcting()
    line.second(0, behaviour("x1", item="a"), behaviour("x2", item="b"))
    line.second(last, behaviour("t1", kind, item="a", exposure_id="x1"))
    assert (line.corrected(), line.join.too_late) == (["t1"], 0)
    line.second(last + 1, behaviour("t2", kind, item="b", exposure_id="x2"))
    assert (line.corrected(), line.join.too_late) == ([], 1)


def test_a_take_without_a_name_and_without_exposure_is_not_too_late() -> None:
    line = correcting()
    line.second(0, behaviour("t1", "click", item="a"))
    assert line.join.too_late == 0


def test_a_take_of_another_user_or_of_no_more_reliable_kind_corrects_nothing() -> None:
    line = correcting()
    line.second(0, behaviour("x1", item="a"))
    line.second(3, behaviour("t1", "cart", item="a", exposure_id="x1"))
    line.second(4, behaviour("x2", item="b"))
    line.second(30, behaviour("t2", "click", item="a"))
    line.second(31, behaviour("t3", "cart", user="u2", item="b", exposure_id="x2"))
    assert line.corrected() == []


def test_purchases_an_hour_later_are_corrected_whatever_the_rate_of_impressions() -> None:
    line = Timeline(attribution_seconds=60, correction_megabytes=50)
    for n in range(4_000):
        line.second(n // 100, behaviour(f"x{n}", user=f"u{n}", item=f"i{n % 7}"))
    for n in range(0, 4_000, 10):
        line.second(HOUR, behaviour(f"t{n}", "purchase", user=f"u{n}", item=f"i{n % 7}", exposure_id=f"x{n}"))
    assert len(line.corrected()) == 400


def test_memory_bounds_what_can_be_corrected_and_what_was_taken_is_kept_longest() -> None:
    line = correcting(correction_megabytes=0.0017)  # two rows
    for second, item in enumerate("abc"):
        line.second(second, behaviour(f"x{second}", item=item))
        if item == "a":
            line.second(second, behaviour("t0", "click", item="a", exposure_id="x0"))
    for second, item in enumerate("abc"):
        line.second(50 + second, behaviour(f"late-{item}", "cart", item=item, exposure_id=f"x{second}"))
    assert line.corrected() == ["late-a", "late-c"]
    assert line.join.too_late == 1


def resolved(event_id: str, *, label: int = 0, second: int = 0, draw: int = 0) -> Impression:
    kind = BehaviourKind.CLICK if label else None
    offset = sum(event_id.encode())
    return Impression(event_id, 0, offset, second, "u", offset, (), (), False, False, label, taken_as=kind, draw=draw)


@pytest.mark.parametrize("bound", [{"most_rows": 2}, {"most_bytes": 2 * 800}])
def test_beyond_a_bound_the_oldest_that_were_not_taken_are_dropped_first_and_counted(bound: dict[str, float]) -> None:
    windows = dict.fromkeys((BehaviourKind.CLICK, BehaviourKind.CART), 10.0)
    rows = CorrectableRows(windows, **{"most_rows": 1e9, "most_bytes": 1e9, **bound}, upgrades=True)
    left = []
    for number, label in enumerate((1, 0, 0, 1, 1)):
        rows.add(resolved("abcde"[number], label=label))
        left.append(sorted(row.event_id for row in rows))
    assert left == [["a"], ["a", "b"], ["a", "c"], ["a", "d"], ["d", "e"]] and rows.dropped == 3
    again = CorrectableRows(windows, **{"most_rows": 1e9, "most_bytes": 1e9, **bound}, upgrades=True)
    again.restore(through_bytes(rows.snapshot()))
    again.add(resolved("f", label=1))
    assert sorted(row.event_id for row in again) == ["e", "f"] and again.dropped == 4


def test_rows_are_kept_to_the_last_second_of_the_longest_window_taken_or_not() -> None:
    windows = {BehaviourKind.CLICK: 5.0, BehaviourKind.PURCHASE: 10.0}
    rows = CorrectableRows(windows, most_bytes=1e9, most_rows=1e9, upgrades=True)
    for second in (0, 1):
        rows.add(resolved(f"n{second}", second=second))
        rows.add(resolved(f"t{second}", second=second, label=1))
    for before, left in ((10, ["n0", "n1", "t0", "t1"]), (11, ["n1", "t1"]), (12, [])):
        rows.forget_before(before)
        assert sorted(row.event_id for row in rows) == left


def test_what_can_be_corrected_goes_with_its_user() -> None:
    line = correcting()
    line.second(0, behaviour("x1", item="c"))
    line.second(30)
    line.join.forget("u1")
    line.second(31, behaviour("t3", "cart", item="c"))
    assert line.corrected() == []


def trained_with(purchases: bool) -> OnlineTrainer:
    trainer = make_trainer(small_config())
    log = []
    for n in range(40):
        log.append(behaviour(f"x{n}", user=f"u{n % 5}", item=f"i{n}", second=3 * n))
        if n % 2:
            log.append(
                behaviour(f"t{n}", "click", user=f"u{n % 5}", item=f"i{n}", second=3 * n + 1, exposure_id=f"x{n}")
            )
        if n == 11 and purchases:
            log.append(behaviour("buy", "purchase", user="u1", item="i1", second=3 * n + 1, exposure_id="x1"))
    observe_all(trainer, log)
    finish(trainer)
    return trainer


def test_an_upgrade_is_a_row_but_no_second_impression() -> None:
    trainer = trained_with(purchases=True)
    assert (trainer.progress.upgraded, trainer.progress.corrected, trainer.progress.in_time()) == (1, 0, (1.0,))
    assert trainer.progress.rows == 41 and is_balanced(trainer.intake.counts)
    assert sum(map(len, trainer.progress.drain_scores())) == 40


def test_an_upgrade_weighs_nothing_in_the_click_loss_and_is_no_positive_of_the_contrastive_term() -> None:
    line = correcting()
    catalogue = line.catalogue = make_catalogue(3)
    line.join = JoinRules.of(JoinConfig(attribution_seconds=10), [0]).join(catalogue)
    line.second(0, behaviour("t0", "click", item="i3"))
    for n in (1, 2):
        line.second(n, behaviour(f"x{n}", item=f"i{n}"))
        line.second(n, behaviour(f"t{n}", "click", item=f"i{n}", exposure_id=f"x{n}"))
    line.second(60, behaviour("buy", "purchase", item="i1", exposure_id="x1"))
    rows = [*line.end()[1:], *line.join.corrections()]
    memory = SpaceTimeMemory(window_seconds=9, window_takes=9, bank_takes=9, bank_seconds=9)
    plan = SpaceTimeSampler(space=1, time=1).plan(rows, memory, TakeCounts(9), catalogue, np.random.default_rng(0))
    assert plan is not None and plan.rows.tolist() == [0]
    collated = collate(rows, None, catalogue, history_length=5)
    assert collated.weights_B is not None and collated.weights_B.tolist() == [1, 0]
    learner = Learner(SMALL_MODEL, LearnerConfig(), vector_width=DIM, seed=0)
    report = learner.step(collated.batch, collated.labels_B, None, weights_B=collated.weights_B)
    assert report.loss == pytest.approx(-np.log(report.probabilities_B[0]) / 2, rel=1e-4)


def test_what_can_be_corrected_survives_a_restart_with_its_kind() -> None:
    line, other = correcting(), correcting()
    line.second(0, behaviour("x1", item="a"), behaviour("x2", item="b"))
    line.second(3, behaviour("t1", "click", item="a", exposure_id="x1"))
    line.second(20, behaviour("t2", "click", item="b", exposure_id="x2"))
    line.second(21, behaviour("t9", "click", item="q", exposure_id="nowhere"))
    other.join.restore(through_bytes(line.join.snapshot()))
    for name in ("a", "b", "q"):
        other.catalogue.number(name)
    for each in (line, other):
        each.corrected()
        each.second(40, behaviour("t3", "cart", item="a", exposure_id="x1"))
        each.second(41, behaviour("t4", "purchase", item="b", exposure_id="x2"))
        assert each.corrected() == ["t3", "t4"] and each.join.too_late == 1


def restarted(line: Timeline) -> Timeline:
    again = Timeline()
    again.catalogue, again.rules, again.offset = line.catalogue, line.rules, line.offset
    again.join = line.rules.join(line.catalogue)
    again.join.restore(through_bytes(line.join.snapshot()))
    return again


@pytest.mark.parametrize("restart", [False, True])
def test_an_unnamed_take_corrects_the_newest_exposure_of_its_item_restarted_or_not(restart: bool) -> None:
    line = correcting()
    line.second(0, behaviour("x1", item="a"))
    line.second(1, behaviour("t1", "click", item="a", exposure_id="x1"))
    line.second(5, behaviour("x2", item="a"))
    line.second(20, behaviour("t2", "click", user="u2", item="a"))
    line = restarted(line) if restart else line
    line.second(30, behaviour("t3", "cart", item="a"), behaviour("t4", "purchase", item="a", exposure_id="x1"))
    rows = line.join.corrections()
    assert [(row.event_id, row.shown_as, row.upgrade) for row in rows] == [("t3", "x2", False), ("t4", "x1", True)]
    assert [(row.partition, row.offset, row.draw) for row in rows] == [(0, 4, 0), (0, 5, 0)]


@pytest.mark.parametrize("restart", [False, True])
def test_the_bound_of_memory_counts_what_a_restart_brought_back(restart: bool) -> None:
    line = correcting(correction_megabytes=0.0017)  # two rows
    line.second(0, behaviour("x0", item="a"), behaviour("x1", item="b"), behaviour("x2", item="c"))
    line.second(20, behaviour("x3", item="d"))
    line = restarted(line) if restart else line
    line.second(40)
    late = [behaviour(f"t{n}", "cart", item="abcd"[n], exposure_id=f"x{n}") for n in range(4)]
    line.second(41, *late)
    assert line.corrected() == ["t2", "t3"] and line.join.too_late == 2
    assert line.join._correctable is not None and line.join._correctable.dropped == 2


def test_a_take_that_names_anothers_exposure_or_one_of_another_item_corrects_nothing_and_does_not_free_it() -> None:
    line = correcting()
    line.second(0, behaviour("x1", item="a"), behaviour("x2", user="u2", item="b"))
    line.second(
        20, behaviour("t1", "cart", item="b", exposure_id="x1"), behaviour("t2", "cart", item="b", exposure_id="x2")
    )
    assert line.corrected() == [] and line.join.too_late == 2
    line.second(21, behaviour("t3", "cart", item="a", exposure_id="x1"), behaviour("t4", "cart", user="u2", item="b"))
    assert line.corrected() == ["t3", "t4"]


def test_what_was_taken_goes_with_its_user_too() -> None:
    line = correcting()
    line.second(0, behaviour("x1", item="a"), behaviour("x2", user="u2", item="a"))
    line.second(1, behaviour("t1", "click", item="a"), behaviour("t2", "click", user="u2", item="a"))
    line.second(30)
    line.join.forget("u1")
    line.second(31, behaviour("t3", "cart", item="a"), behaviour("t4", "cart", user="u2", item="a"))
    assert line.corrected() == ["t4"]


def test_rules_come_back_from_where_they_are_kept_and_reach_what_they_rule() -> None:
    numbers = {name: float(n) for n, name in enumerate(JoinConfig.model_fields, 3)}
    config = JoinConfig.model_validate(numbers)
    rules = JoinRules.of(config, [0, 1])
    assert {name: rules.settings[name] for name in numbers} == numbers
    assert replace(JoinRules.kept(rules.settings, [0, 1], [(0, 3)]), dropped_by_idle=()) == rules
    attribution = config.attribution_seconds
    assert rules.take_seconds == {
        "click": attribution + config.correction_seconds,
        "cart": attribution + config.cart_correction_seconds,
        "purchase": attribution + config.purchase_correction_seconds,
    }
    windows = rules.window(), replace(rules, draw_exposures=0).window()
    for window in windows:
        window.observe(0, 0, behaviour("a", second=0))
        window.observe(1, 0, behaviour("b", second=0))
    held = windows[0].watermark - windows[0].complete_before
    assert windows[0].watermark == DAY0 - config.lateness_seconds and held == int(config.draw_window_seconds)
    assert windows[1].complete_before == windows[1].watermark
    windows[0].observe(0, 1, behaviour("c", second=6))  # the horizon is 6, the lateness 5
    assert windows[0].observe(0, 2, behaviour("a", second=0)) is ObserveResult.DUPLICATE
    bound = {"duplicate_megabytes": 160 * BYTES_PER_ID / 1e6, "duplicate_horizon_seconds": 1e9}
    few = replace(rules, **bound, dropped_by_idle=[(0, 3)]).window()
    for n in range(200):
        few.observe(1, n, behaviour(f"e{n}", second=n))
    assert few.ids_dropped > 0 and windows[0].ids_dropped == 0
    assert few.observe(0, 3, behaviour("d", second=199)) is ObserveResult.LATE


def test_rules_of_an_earlier_build_that_corrected_nothing_correct_nothing() -> None:
    rules = JoinRules.of(JoinConfig(), [0])
    old = {name: value for name, value in rules.settings.items() if name != "upgrades"} | {"correction_rows": 0.0}
    kept = JoinRules.kept(old, [0], ())
    assert kept.corrections() is None and not kept.upgrades and kept.draw_exposures == rules.draw_exposures


def test_rows_of_an_earlier_build_unpack_without_the_columns_of_this_one() -> None:
    line = correcting()
    line.second(0, behaviour("x1", item="a"))
    state = pack_impressions(line.end())
    for name in ("level_before", "value", "draw", "exposure_id.bytes", "exposure_id.ends"):
        del state.arrays[name]
    (row,) = unpack_impressions(state)
    assert (row.upgrade, row.draw, row.shown_as) == (False, 0, "x1")


def test_rules_of_an_earlier_build_correct_as_they_did() -> None:
    settings = {
        "lateness_seconds": 60.0,
        "duplicate_horizon_seconds": 60.0,
        "attribution_seconds": 10.0,
        "history_length": 5.0,
        "max_users": 9.0,
        "correction_seconds": 100.0,
        "correction_rows": 1.0,
    }
    line = correcting()
    line.join = JoinRules.kept(settings, [0], ()).join(line.catalogue)
    line.second(0, behaviour("x1", item="a"), behaviour("x2", item="b"), behaviour("x3", item="c"))
    line.second(1, behaviour("t1", "click", item="a", exposure_id="x1"))
    line.second(50, behaviour("t2", "purchase", item="a", exposure_id="x1"))
    line.second(51, behaviour("t3", "click", item="b", exposure_id="x2"))
    line.second(52, behaviour("t4", "click", item="c", exposure_id="x3"))
    assert line.corrected() == ["t4"]


def test_the_setting_of_earlier_builds_is_refused_with_what_replaces_it() -> None:
    with pytest.raises(ValidationError, match="CORRECTION_MEGABYTES"):
        JoinConfig.model_validate({"correction_rows": 0})


def test_rules_of_an_earlier_build_have_one_window_and_a_bound_by_rows_and_correct_no_row_that_was_taken() -> None:
    settings = JoinRules.of(Timeline.config(), [0]).settings | {"correction_rows": 2.0, "correction_seconds": 30.0}
    for name in ("upgrades", "cart_correction_seconds", "purchase_correction_seconds", "correction_megabytes"):
        del settings[name]
    rules = JoinRules.kept(settings, [0], ())
    assert set(rules.take_seconds.values()) == {40.0}
    line = Timeline()
    line.join = rules.join(line.catalogue)
    line.second(0, behaviour("x1", item="a"), behaviour("x2", item="b"))
    line.second(1, behaviour("t1", "click", item="a", exposure_id="x1"), behaviour("x3", item="c"))
    line.second(2, behaviour("x4", item="d"))
    line.second(40, *(behaviour(f"late{n}", "purchase", item="abcd"[n], exposure_id=f"x{n + 1}") for n in range(4)))
    assert line.corrected() == ["late2", "late3"]
    with pytest.raises(KeyError):
        JoinRules.kept({name: value for name, value in settings.items() if name != "max_users"}, [0], ())


@pytest.mark.parametrize(
    ("name", "instead"), [("correction_rows", "CORRECTION_MEGABYTES"), ("max_pending", "PENDING_")]
)
def test_a_setting_that_is_gone_is_refused_with_what_is_there_instead(name: str, instead: str) -> None:
    with pytest.raises(ValidationError, match=f"MIM_TRAINER__{name.upper()} is gone: .*{instead}"):
        JoinConfig.model_validate({name: 5})


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_can_be_corrected_and_were_restored_are_found_as_those_that_were_not(seed: int) -> None:
    rng = random.Random(seed)
    windows = {BehaviourKind.CLICK: 15.0, BehaviourKind.PURCHASE: 30.0}

    def make() -> CorrectableRows:
        return CorrectableRows(windows, most_bytes=1e9, most_rows=5, upgrades=True)

    one, other = make(), make()
    for n in range(120):
        user, item, shown = f"u{rng.randrange(2)}", rng.randrange(3), f"x{rng.randrange(4)}"
        label = rng.randrange(2)
        row = Impression(shown, 0, n, n, user, item, (), (), False, False, label)
        row.taken_as = BehaviourKind.CLICK if label else None
        named = {"exposure_id": shown} if rng.randrange(2) else {}
        take = behaviour(f"t{n}", rng.choice(["click", "purchase"]), user=user, item=f"i{item}", **named)
        verb = rng.randrange(6)
        told: list[list[Any]] = []
        if rng.randrange(4) == 0:
            state, other = through_bytes(other.snapshot()), make()
            other.restore(state)
        for rows in (one, other):
            told.append([rows.find(take, item), rows.pop_corrected(take, item, n) if verb == 0 else None])
            if verb == 1 and n % 5 == 0:
                rows.forget(user)
            else:
                rows.add(replace(row))
            rows.forget_before(n)
            told[-1] += [*rows, rows.dropped]
        assert told[0] == told[1]
    assert one.dropped > 10
