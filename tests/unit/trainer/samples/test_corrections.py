from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

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
from trainer.samples.join_rules import JoinRules
from trainer.samples.rows import pack_impressions, unpack_impressions

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


def test_thousands_of_purchases_an_hour_later_are_corrected_whatever_the_rate_of_impressions() -> None:
    line = Timeline(attribution_seconds=60, correction_megabytes=50)
    for n in range(20_000):
        line.second(n // 100, behaviour(f"x{n}", user=f"u{n}", item=f"i{n % 7}"))
    for n in range(0, 20_000, 10):
        line.second(HOUR, behaviour(f"t{n}", "purchase", user=f"u{n}", item=f"i{n % 7}", exposure_id=f"x{n}"))
    assert len(line.corrected()) == 2_000


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


def test_an_upgrade_is_a_row_but_no_second_impression_and_weighs_nothing_in_the_click_loss() -> None:
    trainer = trained_with(purchases=True)
    assert (trainer.progress.upgraded, trainer.progress.corrected, trainer.progress.in_time) == (1, 0, 1.0)
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


def test_rows_of_an_earlier_build_unpack_without_the_columns_of_this_one() -> None:
    line = correcting()
    line.second(0, behaviour("x1", item="a"))
    state = pack_impressions(line.end())
    for name in ("upgrade", "draw", "exposure_id.bytes", "exposure_id.ends"):
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
