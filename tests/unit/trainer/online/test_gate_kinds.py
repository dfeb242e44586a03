"""The promotion gate and the further kinds of takes: who is refused for one, and what counts as one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from schemas.behaviours import Behaviour
from tests.factories.feeding import pump, through_bytes
from tests.factories.releases import make_manifest
from tests.factories.samples import DIM, SMALL_MODEL, behaviour, make_trainer, small_config
from trainer.features.config import FeatureConfig
from trainer.networks.ciubm import CiUBM
from trainer.online.gate import ComparedKind, ComparedRows, GateConfig, Opponents, judge
from trainer.online.shadow_evaluation import Release, ShadowEvaluation
from trainer.online.trainer import OnlineTrainer

KINDS = ("cart", "purchase")
CONFIG = GateConfig(trial_rows=100, min_takes=100)


def rows(count: int = 4_000) -> ComparedRows:
    rng = np.random.default_rng(0)
    score = rng.beta(2, 4, count)
    user = np.array([f"u{n}" for n in rng.integers(200, size=count)])
    label = (rng.random(count) < score).astype(np.int64)
    return ComparedRows(user, label, np.zeros(count, bool), score, score.copy(), score.copy())


def compared(count: int = 4_000, *, worse: float = 0.0) -> ComparedKind:
    """Carts that the serving release predicts as they are, and the candidate worse by so much."""
    rng = np.random.default_rng(1)
    score = rng.beta(1, 8, count)
    ours = np.clip(score + rng.normal(scale=worse, size=count), 1e-3, 1 - 1e-3) if worse else score.copy()
    return ComparedKind("cart", (rng.random(count) < score).astype(np.int64), ours, score)


def test_a_candidate_that_predicts_a_kind_worse_is_refused_and_the_kind_is_named() -> None:
    against = Opponents("r000001-0", "r000001-0")
    equal, worse = (judge(rows(), CONFIG, against=against, kinds=[compared(worse=w)]) for w in (0.0, 0.15))
    assert equal.passed and equal.figures["cart_logloss"] == equal.figures["serving_cart_logloss"]
    assert not worse.passed and len(worse.reasons) == 1
    assert worse.reasons[0].startswith("log-loss of kind cart 0.") and "of the serving release" in worse.reasons[0]
    lax = CONFIG.model_copy(update={"log_loss_margin": 50.0})
    assert judge(rows(), lax, against=against, kinds=[compared(worse=0.15)]).passed
    other = compared(worse=0.15)
    swapped = replace(other, candidate=other.serving, serving=other.candidate)
    assert judge(rows(), CONFIG, against=against, kinds=[swapped]).passed


def test_few_takes_of_a_kind_are_a_remark_and_scores_that_are_none_a_reason() -> None:
    against = Opponents("r000001-0", "r000001-0")
    rare = compared(200)
    few = judge(rows(), CONFIG, against=against, kinds=[replace(rare, candidate=rare.candidate / 9)])
    assert few.passed and few.remarks == [f"{int(rare.label.sum())} takes of kind cart, a comparison needs 100"]
    broken = compared()
    broken.candidate[3] = np.nan
    decision = judge(rows(), CONFIG, against=against, kinds=[broken])
    assert decision.reasons == ["scores of kind cart are not finite"]


def release(seed: int, number: int, kinds: tuple[str, ...]) -> Release:
    model = SMALL_MODEL.model_copy(update={"kinds": kinds})
    config = {"model": model.model_dump(mode="json"), "features": FeatureConfig().model_dump(mode="json")}
    manifest = make_manifest(1).model_copy(update={"release_id": f"r00000{number}-0123456789ab", "config": config})
    return CiUBM(model, vector_width=DIM, seed=seed).state_dict(), manifest


def bought_later(impressions: int) -> list[Behaviour]:
    """Every third item that is shown is put into the cart at once, and bought half a minute later."""
    events = []
    for n in range(impressions):
        known = {"user": f"u{n % 5}", "item": f"i{n % 7}"}
        events.append(behaviour(f"x{n}", second=10 * n, **known))
        if n % 3 == 0:
            events.append(behaviour(f"c{n}", "cart", second=10 * n + 1, exposure_id=f"x{n}", **known))
            events.append(behaviour(f"p{n}", "purchase", second=10 * n + 31, exposure_id=f"x{n}", **known))
    return sorted(events, key=lambda event: event.occurred_at)


def learned(shadow: ShadowEvaluation) -> OnlineTrainer:
    trainer = make_trainer(small_config(model=SMALL_MODEL.model_copy(update={"kinds": KINDS})))
    trainer.shadow = shadow
    for offset, event in enumerate(bought_later(120)):
        trainer.intake.observe(0, offset, event)
    pump(trainer)
    return trainer


def test_late_takes_count_in_the_kinds_that_they_are_new_to_though_they_are_no_rows_of_the_comparison() -> None:
    shadow = ShadowEvaluation(release(1, 2, KINDS), release(3, 1, KINDS), rows_needed=10_000)
    trainer = learned(shadow)
    assert trainer.progress.upgraded > 20
    cart, purchase = shadow.compared_kinds
    assert (cart.kind, purchase.kind) == KINDS
    assert len(cart.label) == len(shadow.compared) and cart.label.sum() == shadow.compared.label.sum()
    assert len(purchase.label) == len(shadow.compared) + trainer.progress.upgraded
    assert purchase.label.sum() == trainer.progress.upgraded
    assert not np.allclose(cart.candidate, cart.serving) and (purchase.candidate <= 1).all()
    again = ShadowEvaluation(release(1, 2, KINDS), release(3, 1, KINDS), rows_needed=10_000)
    again.restore(through_bytes(shadow.snapshot()))
    for one, other in zip(again.compared_kinds, shadow.compared_kinds, strict=True):
        for name in ("label", "candidate", "serving"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    before = len(purchase.label)
    trainer.forget("u3")
    assert len(shadow.compared_kinds[1].label) < before


@pytest.mark.parametrize(("serving", "common"), [((), []), (("purchase",), ["purchase"]), (KINDS, [*KINDS])])
def test_kinds_that_both_releases_predict_are_compared_whatever_else_either_does(
    serving: tuple[str, ...], common: list[str]
) -> None:
    shadow = ShadowEvaluation(release(1, 2, KINDS), release(1, 1, serving), rows_needed=10_000)
    learned(shadow)
    assert [one.kind for one in shadow.compared_kinds] == common
    assert len(shadow.compared) > 50
