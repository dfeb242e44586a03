"""What a candidate that is better than the serving release in one way, and worse in another, is measured against."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from schemas.errors import Misconfigured
from tests.factories.releases import make_manifest
from tests.factories.samples import SMALL_MODEL, make_catalogue
from trainer.features.config import FeatureConfig
from trainer.networks.ciubm import CiUBM
from trainer.networks.collate import collate
from trainer.online.gate import ComparedRows, GateConfig, Opponents, judge
from trainer.online.shadow_evaluation import Release, ShadowEvaluation
from trainer.samples.rows import Impression

BOTH = Opponents("r000002-0", "r000001-0")


def compared(rows: int = 6_000) -> ComparedRows:
    """All give the same good, calibrated scores."""
    rng = np.random.default_rng(0)
    probability = rng.beta(2, 4, rows)
    return ComparedRows(
        user=np.array([f"u{n}" for n in rng.integers(200, size=rows)]),
        label=(rng.random(rows) < probability).astype(np.int64),
        retaken=np.zeros(rows, bool),
        candidate=probability,
        serving=probability.copy(),
        best=probability.copy(),
    )


def blurred(scores: np.ndarray, strength: float) -> np.ndarray:
    """Noisier in order."""
    return np.clip(scores + np.random.default_rng(9).normal(scale=strength, size=len(scores)), 0.01, 0.99)


def strict(**over: float) -> GateConfig:
    known = {"trial_rows": 1, "min_takes": 10**6, "log_loss_margin": 0.0, "gauc_margin": 0.0}
    return GateConfig.model_validate(known | over)


def test_order_and_level_are_each_measured_against_the_best_release_where_the_serving_one_is_better() -> None:
    rows = compared()
    ordered_worse = replace(rows, candidate=blurred(rows.best, 0.1), serving=blurred(rows.best, 0.09) ** 1.5)
    decision = judge(ordered_worse, strict(gauc_margin=0.005), against=BOTH)
    assert decision.figures["ciubm_logloss"] < decision.figures["serving_logloss"]  # type: ignore[operator]
    (reason,) = decision.reasons
    assert reason.startswith("GAUC") and "the best release r000001-0" in reason
    loses_more = replace(rows, candidate=rows.best**1.5, serving=blurred(rows.best, 0.12))
    decision = judge(loses_more, strict(log_loss_margin=0.03), against=BOTH)
    assert decision.figures["ciubm_gauc"] > decision.figures["serving_gauc"]  # type: ignore[operator]
    (reason,) = decision.reasons
    assert reason.startswith("log-loss") and "the best release r000001-0" in reason and "3.0% above" in reason


def test_retakes_are_judged_by_their_level() -> None:
    rows = compared()
    again = np.arange(len(rows)) % 2 == 0
    inflated = replace(rows, candidate=np.where(again, 0.99, rows.candidate), retaken=again)
    (reason,) = judge(inflated, GateConfig(trial_rows=1), against=BOTH).reasons
    assert "predicted per take" in reason


def test_rows_whose_only_takes_are_retakes_tell_nothing_apart() -> None:
    rows = compared()
    rows = replace(rows, retaken=rows.label == 1)
    decision = judge(rows, strict(), against=BOTH)
    assert decision.passed and any("one label only" in remark for remark in decision.remarks)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_candidate_without_finite_scores_leaves_the_best_release_where_it_was(broken: float) -> None:
    rows = compared()
    rows.candidate[-1] = broken
    decision = judge(rows, strict(), against=BOTH)
    assert not decision.passed and decision.best == "r000001-0" and not decision.figures
    rows.candidate[-1], rows.serving[0] = 0.5, broken
    decision = judge(rows, strict(), against=BOTH)
    assert decision.passed and decision.best is None and "r000002-0 gives scores" in decision.remarks[0]


def release(seed: int, release_id: str) -> Release:
    config = {"model": SMALL_MODEL.model_dump(mode="json"), "features": FeatureConfig().model_dump(mode="json")}
    manifest = make_manifest(1).model_copy(update={"release_id": release_id, "config": config, "last_event_at": None})
    return CiUBM(SMALL_MODEL, vector_width=8, seed=seed).state_dict(), manifest


def shadow() -> ShadowEvaluation:
    return ShadowEvaluation(release(1, "r2"), release(2, "r1"), rows_needed=3)


@pytest.mark.parametrize("place", ["serving", "best"])
def test_a_release_that_reads_other_features_is_not_compared(place: str) -> None:
    of = {"serving": release(2, "r1"), "best": release(3, "r0")}
    weights, manifest = of[place]
    of[place] = weights, manifest.model_copy(update={"features": "0" * 16})
    with pytest.raises(Misconfigured, match="reads other features"):
        ShadowEvaluation(release(1, "r2"), of["serving"], of["best"])


def observe(evaluation: ShadowEvaluation, *users: str) -> None:
    rows = [Impression("e", 0, n, n, user, 1, (), (), False, False) for n, user in enumerate(users)]
    evaluation.observe(rows, collate(rows, None, make_catalogue(3), history_length=2).batch)


def test_an_evaluation_that_scored_nothing_yet_begins_after_a_restart() -> None:
    again = shadow()
    again.restore(shadow().snapshot())
    assert not len(again.compared) and not again.complete
    observe(again, "a", "b", "c")
    assert again.complete and again.compared.user.tolist() == ["a", "b", "c"]


def test_others_are_scored_instead_of_a_user_who_is_forgotten_after_the_end() -> None:
    evaluation = shadow()
    observe(evaluation, "gone")
    observe(evaluation, "a", "gone")
    assert evaluation.complete
    evaluation.forget("gone")
    assert not evaluation.complete
    again = shadow()
    again.restore(evaluation.snapshot())
    for each in (evaluation, again):
        observe(each, "b", "c")
        assert each.complete and each.compared.user.tolist() == ["a", "b", "c"]


def test_nothing_is_dropped_while_releases_are_compared() -> None:
    config = SMALL_MODEL.model_copy(update={"dropout": 0.5, "id_dropout": 0.5})
    weights = CiUBM(config, vector_width=8, seed=1).state_dict()
    known = release(1, "r1")[1]
    manifest = known.model_copy(update={"config": known.config | {"model": config.model_dump(mode="json")}})
    shadow = ShadowEvaluation((weights, manifest), (weights, manifest))
    rows = [Impression("e", 0, n, n, "u", 1 + n % 3, (2, 3), (0, 0), False, False) for n in range(9)]
    shadow.observe(rows, collate(rows, None, make_catalogue(3), history_length=2).batch)
    np.testing.assert_array_equal(shadow.compared.candidate, shadow.compared.serving)


def test_rows_keep_their_label_and_whether_their_item_was_taken_before_also_after_a_restart() -> None:
    evaluation = shadow()
    rows = [
        Impression("e", 0, n, n, "u", 1, (), (), retaken, False, label, correction=correction)
        for n, (retaken, label, correction) in enumerate([(True, 0, False), (False, 1, True), (False, 1, False)])
    ]
    evaluation.observe(rows, collate(rows, None, make_catalogue(3), history_length=2).batch)
    again = shadow()
    again.restore(evaluation.snapshot())
    for each in (evaluation, again):
        assert each.compared.retaken.tolist() == [True, False] and each.compared.label.tolist() == [0, 1]
