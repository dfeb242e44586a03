"""The promotion gate lets nothing through that is worse than the serving release, judged on the same unseen rows."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from schemas.errors import Misconfigured
from tests.factories.feeding import pump
from tests.factories.releases import make_manifest
from tests.factories.samples import SMALL_MODEL, click_log, make_catalogue, make_trainer, small_config
from trainer.metrics import log_loss
from trainer.networks.ciubm import CiUBM
from trainer.networks.collate import collate
from trainer.online.gate import NO_ROWS, ComparedRows, GateConfig, Opponents, judge
from trainer.online.shadow_evaluation import Release, ShadowEvaluation, not_finite
from trainer.online.trainer import OnlineTrainer
from trainer.samples.rows import Impression

CONFIG = GateConfig(trial_rows=1_000)
BEST = "r000002-0123456789ab"


def compared(rows: int = 6_000, *, seed: int = 0, users: int = 200) -> ComparedRows:
    """Both sides give the same good, calibrated scores."""
    rng = np.random.default_rng(seed)
    probability = rng.beta(2, 4, rows)
    return ComparedRows(
        user=np.array([f"u{n}" for n in rng.integers(users, size=rows)]),
        label=(rng.random(rows) < probability).astype(np.int64),
        retaken=np.zeros(rows, bool),
        candidate=probability,
        serving=probability.copy(),
        best=probability.copy(),
    )


def only(release_id: str, rows_behind: int = 0) -> Opponents:
    """The serving release is the best so far."""
    return Opponents(release_id, release_id, rows_behind)


@pytest.fixture
def rows() -> ComparedRows:
    return compared()


def blurred(scores: np.ndarray, strength: float) -> np.ndarray:
    """Noisier in order, the same in the mean."""
    noisy = np.clip(scores + np.random.default_rng(9).normal(scale=strength, size=len(scores)), 0.01, 0.99)
    return np.clip(noisy * scores.mean() / noisy.mean(), 0.001, 0.999)


def test_an_equal_candidate_passes_with_its_figures() -> None:
    decision = judge(compared(), CONFIG, against=only("r000001-0"))
    assert decision.passed and not decision.reasons and not decision.remarks
    assert decision.rows == 6_000 and decision.against == "r000001-0" and decision.best is None
    assert decision.figures["ciubm_gauc"] == decision.figures["serving_gauc"]
    assert decision.figures["ciubm_calibration"] == pytest.approx(1, abs=0.1)


def test_a_better_candidate_passes_and_the_same_two_the_other_way_round_do_not(rows: ComparedRows) -> None:
    better = replace(rows, serving=blurred(rows.serving, 0.2))
    assert judge(better, CONFIG, against=only("r")).passed
    worse = judge(replace(better, candidate=better.serving, serving=better.candidate), CONFIG, against=only("r"))
    assert not worse.passed
    assert any("GAUC" in reason for reason in worse.reasons) and any("log-loss" in reason for reason in worse.reasons)


def test_a_little_worse_is_within_the_margin_and_without_margin_is_not(rows: ComparedRows) -> None:
    rows = replace(rows, candidate=blurred(rows.candidate, 0.02))
    assert judge(rows, CONFIG, against=only("r")).passed
    assert not judge(
        rows, CONFIG.model_copy(update={"gauc_margin": 0.0, "log_loss_margin": 0.0}), against=only("r")
    ).passed


@pytest.mark.parametrize("factor", [0.5, 1.6])
def test_a_candidate_off_its_level_is_refused_though_it_orders_as_well(rows: ComparedRows, factor: float) -> None:
    lax = CONFIG.model_copy(update={"log_loss_margin": 10.0})
    decision = judge(replace(rows, candidate=rows.candidate * factor), lax, against=only("r"))
    assert [reason for reason in decision.reasons if "predicted per take" in reason] == decision.reasons != []


def test_when_behaviour_jumps_the_less_wrong_of_the_two_may_answer(rows: ComparedRows) -> None:
    decision = judge(
        replace(rows, candidate=rows.candidate * 0.6, serving=rows.serving * 0.3), CONFIG, against=only("r")
    )
    assert decision.passed and any("farther off" in remark for remark in decision.remarks)


def test_few_rows_are_compared_too_and_said_to_be_few() -> None:
    few = judge(compared(999), CONFIG, against=only("r000001-0"))
    assert few.passed and "compared on 999 rows only, MIM_GATE__TRIAL_ROWS asks for 1000" in few.remarks[0]
    assert few.figures and not judge(compared(1_000), CONFIG, against=only("r")).remarks  # the bound itself is enough
    terrible = replace(compared(999), candidate=np.full(999, 1e-9))
    assert not judge(terrible, CONFIG, against=only("r000001-0")).passed


@pytest.mark.parametrize("count", [0, 999])
def test_a_candidate_that_learned_less_needs_a_full_comparison(count: int) -> None:
    rows = compared(count) if count else NO_ROWS
    decision = judge(rows, CONFIG, against=only("r000001-0", 700))
    assert not decision.passed
    assert f"on {count} rows only" in decision.reasons[0] and "700 rows fewer than r000001-0" in decision.reasons[0]
    assert "mimstream models promote" in decision.reasons[0]
    assert judge(rows, CONFIG, against=only("r000001-0")).passed
    assert judge(compared(1_000), CONFIG, against=only("r000001-0", 700)).passed


def test_the_first_release_passes_and_says_that_nothing_was_compared() -> None:
    decision = judge(NO_ROWS, CONFIG, against=None)
    assert decision.passed and "nothing was compared" in decision.remarks[0]


def test_releases_that_each_lose_less_than_the_margin_do_not_add_up(rows: ComparedRows) -> None:
    both = Opponents("r000002-0", "r000001-0")
    worse, worst = blurred(rows.candidate, 0.05), blurred(rows.candidate, 0.07)
    assert judge(replace(rows, candidate=worse), CONFIG, against=only("r")).passed
    assert judge(replace(rows, candidate=worst, serving=worse), CONFIG, against=only("r")).passed
    decision = judge(replace(rows, candidate=worst, serving=worse), CONFIG, against=both)
    assert not decision.passed and all("the best release r000001-0" in reason for reason in decision.reasons)
    assert decision.figures["best_gauc"] == pytest.approx(decision.figures["serving_gauc"] + 0.0096, abs=1e-3)
    # what is better than the serving release is no loss, however far the best one is ahead
    assert judge(replace(rows, candidate=worse, serving=worst), CONFIG, against=both).passed
    worse, worst = blurred(rows.candidate, 0.2), blurred(rows.candidate, 0.22)
    reasons = judge(replace(rows, candidate=worse), CONFIG, against=only("r")).reasons
    assert any("GAUC" in reason for reason in reasons) and any("log-loss" in reason for reason in reasons)
    assert judge(replace(rows, candidate=worse, serving=worst), CONFIG, against=both).passed


def test_the_best_release_stays_the_best_until_a_candidate_is_as_good_in_order_and_level(rows: ComparedRows) -> None:
    both, worse = Opponents("r000002-0", "r000001-0"), blurred(rows.candidate, 0.03)
    assert judge(replace(rows, candidate=worse, serving=worse), CONFIG, against=both).best == "r000001-0"
    assert judge(replace(rows, candidate=worse), CONFIG, against=only("r000002-0")).best == "r000002-0"
    assert judge(replace(rows, serving=worse), CONFIG, against=both).best is None
    off = replace(rows, candidate=rows.candidate * 0.97)  # ordered as well, a little off in level
    assert judge(off, CONFIG, against=both).best == "r000001-0"
    assert judge(NO_ROWS, CONFIG, against=both).best == "r000001-0"  # nothing was compared: it stays


def test_what_is_not_finite_is_refused_first_release_or_not(rows: ComparedRows) -> None:
    broken = rows.candidate.copy()
    broken[17] = np.nan
    assert "1 of 6000 scores" in judge(replace(rows, candidate=broken), CONFIG, against=only("r")).reasons[0]
    weights = {"a": torch.tensor([1.0, float("inf")]), "b": torch.ones(2), "n": torch.tensor([3])}
    assert not_finite(weights) == ["a"]
    assert not judge(NO_ROWS, CONFIG, against=None, not_finite=not_finite(weights)).passed


def test_a_broken_serving_release_keeps_nothing_out(rows: ComparedRows) -> None:
    assert judge(replace(rows, serving=np.full(len(rows), np.nan)), CONFIG, against=only("r")).passed


def test_retakes_say_nothing_about_order(rows: ComparedRows) -> None:
    half = np.arange(len(rows)) % 2 == 0
    spoilt = np.where(half, rows.candidate.mean(), rows.candidate)
    assert not judge(replace(rows, candidate=spoilt), CONFIG, against=only("r")).passed
    assert judge(replace(rows, candidate=spoilt, retaken=half), CONFIG, against=only("r")).passed


def test_what_may_be_chance_refuses_no_candidate() -> None:
    rows = compared(1_000, users=150)
    lucky = replace(rows, candidate=blurred(rows.candidate, 0.05))
    assert judge(lucky, CONFIG, against=only("r")).passed
    many = compared(60_000, users=300)
    assert not judge(replace(many, candidate=blurred(many.candidate, 0.12)), CONFIG, against=only("r")).passed


def release(seed: int, *, until: float | None = None, release_id: str = "r000001-0123456789ab") -> Release:
    last_event_at = None if until is None else datetime.fromtimestamp(until, UTC)
    config = {"model": SMALL_MODEL.model_dump(mode="json")}
    known = {"release_id": release_id, "config": config, "last_event_at": last_event_at}
    manifest = make_manifest(1).model_copy(update=known)
    return CiUBM(SMALL_MODEL, vector_width=8, seed=seed).state_dict(), manifest


def make_shadow(*, rows_needed: int = 10_000, until: float | None = None) -> ShadowEvaluation:
    candidate = release(small_config().seed, release_id="r000002-0123456789ab")  # what the learner itself starts from
    return ShadowEvaluation(candidate, release(3, until=until), rows_needed=rows_needed)


def run(shadow: ShadowEvaluation | None = None) -> OnlineTrainer:
    trainer = make_trainer()
    trainer.shadow = shadow
    for offset, event in enumerate(click_log(120)[0]):
        trainer.intake.observe(0, offset, event)
        pump(trainer)
    return trainer


def test_a_shadow_evaluation_changes_nothing_of_what_is_learned() -> None:
    ours, theirs = run().candidate(), run(make_shadow(rows_needed=50)).candidate()
    assert ours.rows_sha256 == theirs.rows_sha256
    assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in ours.weights)


def test_both_sides_score_the_same_rows_and_neither_learns() -> None:
    trainer = run(make_shadow())
    rows = trainer.shadow.compared
    scored = trainer.progress.drain_scores()
    np.testing.assert_array_equal(rows.label, np.concatenate([part.label for part in scored]))
    learner = np.concatenate([part.scores["ciubm"] for part in scored])
    np.testing.assert_allclose(rows.candidate[:8], learner[:8])  # before the first step they are the same
    assert not np.allclose(rows.candidate[-8:], learner[-8:])
    assert not np.allclose(rows.candidate, rows.serving)


def test_only_rows_that_neither_has_learned_from_are_compared() -> None:
    seconds = sorted({int(event.occurred_at.timestamp()) for event in click_log(120)[0]})
    until = seconds[len(seconds) // 2]
    trainer = run(make_shadow(until=until))
    scored = trainer.progress.drain_scores()
    later = sum(int((part.occurred_at > until).sum()) for part in scored)
    assert 0 < len(trainer.shadow.compared) == later < sum(map(len, scored))


def test_a_shadow_evaluation_ends_by_itself_and_goes_on_after_a_restart() -> None:
    trainer, other = make_trainer(), make_trainer()
    trainer.shadow, other.shadow = make_shadow(rows_needed=60), make_shadow(rows_needed=60)
    log = click_log(120)[0]
    for offset, event in enumerate(log):
        for one in (trainer, other):
            one.intake.observe(0, offset, event)
            pump(one)
        if offset == len(log) // 3:
            assert 0 < len(trainer.shadow.compared) < 60
            again = make_shadow(rows_needed=60)
            again.restore(trainer.shadow.snapshot())
            trainer.shadow = again
    assert trainer.shadow.complete and 60 <= len(trainer.shadow.compared) < 60 + 8
    for name in ("user", "label", "candidate", "serving", "best"):
        np.testing.assert_array_equal(getattr(trainer.shadow.compared, name), getattr(other.shadow.compared, name))
    with pytest.raises(ValueError, match="not of"):
        ShadowEvaluation(release(1), release(3), rows_needed=60).restore(trainer.shadow.snapshot())


def test_a_user_who_is_forgotten_is_in_no_shadow_evaluation_and_in_no_snapshot_of_it() -> None:
    trainer = run(make_shadow())
    assert "u3" in trainer.shadow.compared.user
    trainer.forget("u3")
    assert "u3" not in trainer.shadow.compared.user and len(trainer.shadow.compared)
    assert "u3" not in trainer.shadow.snapshot().texts("user")


def test_a_late_take_that_corrects_a_row_is_no_second_row() -> None:
    trainer = make_trainer()
    trainer.shadow = make_shadow()
    for offset, event in enumerate(click_log(120, late_takes=2)[0]):
        trainer.intake.observe(0, offset, event)
        pump(trainer)
    assert trainer.progress.corrected > 10
    assert len(trainer.shadow.compared) == trainer.progress.rows - trainer.progress.corrected


def test_the_best_release_scores_the_same_rows_also_after_a_restart() -> None:
    sides = (release(small_config().seed, release_id="r000003-0123456789ab"), release(3), release(4, release_id=BEST))
    trainer = run(ShadowEvaluation(*sides, rows_needed=60))
    rows = trainer.shadow.compared
    assert not np.allclose(rows.best, rows.serving) and trainer.shadow.against.best == BEST
    again = ShadowEvaluation(*sides, rows_needed=60)
    again.restore(trainer.shadow.snapshot())
    np.testing.assert_array_equal(again.compared.best, rows.best)
    with pytest.raises(ValueError, match="not of"):
        ShadowEvaluation(*sides[:2], rows_needed=60).restore(trainer.shadow.snapshot())


def test_a_snapshot_of_a_version_that_compared_two_releases_goes_on() -> None:
    state = run(make_shadow()).shadow.snapshot()
    del state.arrays["best"], state.values["best"]
    again = make_shadow()
    again.restore(state)
    np.testing.assert_array_equal(again.compared.best, again.compared.serving)


def test_a_release_of_another_version_cannot_be_in_shadow_evaluation() -> None:
    weights, manifest = release(1)
    with pytest.raises(Misconfigured, match="this version"):
        ShadowEvaluation(({}, manifest), (weights, manifest), rows_needed=5)


def ranked(takes: int, *, users: int = 100, level: float = 1.0) -> ComparedRows:
    """Of each user one row taken and one not, scored in that order; `takes` in all are judged."""
    user = np.array([f"u{n}" for n in range(users) for _ in range(2)] + ["one label"] * (takes - users))
    label = np.array([1, 0] * users + [1] * (takes - users))
    score = np.where(label == 1, 0.75, 0.25)
    score = level * score * label.sum() / score.sum()
    return ComparedRows(user, label, np.zeros(len(label), bool), score, score.copy(), score.copy())


LAX = GateConfig(trial_rows=1, log_loss_margin=100.0)


@pytest.mark.parametrize(("users", "compared"), [(100, True), (99, False)])
def test_order_is_compared_from_the_least_number_of_users_on(users: int, compared: bool) -> None:
    decision = judge(ranked(120, users=users), LAX, against=only("r"))
    assert ("ciubm_gauc" in decision.figures) == compared
    assert any("99 users with both labels" in remark for remark in decision.remarks) != compared


@pytest.mark.parametrize(("takes", "judged"), [(100, True), (99, False)])
def test_the_level_is_judged_from_the_least_number_of_takes_on(takes: int, judged: bool) -> None:
    decision = judge(ranked(takes, users=50), LAX, against=only("r"))
    assert ("ciubm_calibration" in decision.figures) == judged
    assert ("99 takes, calibration needs 100" in decision.remarks) != judged


@pytest.mark.parametrize(("level", "passed"), [(0.7, True), (0.69, False), (1.4, True), (1.41, False)])
def test_the_bounds_of_the_level_are_inside(level: float, passed: bool) -> None:
    rows = ranked(200)
    rows = replace(rows, candidate=rows.candidate * level)
    exact = {"calibration_low": 0.7 - 1e-12, "calibration_high": 1.4 + 1e-12}
    assert judge(rows, LAX.model_copy(update=exact), against=only("r")).passed == passed


@pytest.mark.parametrize(("ours", "theirs", "passed"), [(0.5, 0.5, True), (0.5, 1.99, False), (0.5, 2.01, True)])
def test_of_two_that_are_off_their_level_the_one_less_off_in_proportion_may_answer(
    ours: float, theirs: float, passed: bool
) -> None:
    rows = ranked(200)
    other = replace(rows, candidate=rows.candidate * ours, serving=rows.serving * theirs, best=rows.best * 9)
    assert judge(other, LAX, against=Opponents("r", "b")).passed == passed


@pytest.mark.parametrize(("rows_behind", "passed"), [(0, True), (1, False)])
def test_few_rows_are_enough_for_a_candidate_that_learned_no_less(rows_behind: int, passed: bool) -> None:
    config = LAX.model_copy(update={"trial_rows": 10_000})
    assert judge(ranked(200), config, against=only("r", rows_behind)).passed == passed


def test_a_best_release_that_is_not_finite_keeps_nothing_out(rows: ComparedRows) -> None:
    decision = judge(
        replace(rows, best=np.full(len(rows), np.inf)), CONFIG, against=Opponents("r000002-0", "r000001-0")
    )
    assert decision.passed and decision.best is None


def test_rows_of_one_label_say_nothing_of_order_and_leave_the_best_where_it_was() -> None:
    alike = replace(ranked(200), label=np.zeros_like(ranked(200).label))
    decision = judge(alike, LAX, against=Opponents("r000002-0", "r000001-0"))
    assert decision.best == "r000001-0" and any("one label only" in remark for remark in decision.remarks)


def passes_with(ours: np.ndarray | float, theirs: float, margin: float) -> bool:
    label = np.arange(400) % 2
    scores = [np.where(label, np.exp(-loss), 1 - np.exp(-loss)) for loss in (ours, theirs, theirs)]
    both = ComparedRows(np.full(400, "u"), label, np.zeros(400, bool), *scores)
    return judge(both, GateConfig(trial_rows=1, log_loss_margin=margin, min_takes=10**6), against=only("r")).passed


def test_the_margin_of_the_loss_is_a_share_of_it() -> None:
    assert [passes_with(loss, 0.2, margin=0.1) for loss in (0.19, 0.219, 0.221)] == [True, True, False]


@pytest.mark.parametrize(("deviations", "passed"), [(1.5, True), (2.2, False)])
def test_a_loss_is_worse_beyond_chance_from_two_standard_deviations_on(deviations: float, passed: bool) -> None:
    losses = 1 + 0.01 * deviations + np.where(np.arange(400) // 2 % 2, 0.2, -0.2)  # 0.2 / sqrt(400) is 0.01
    assert passes_with(losses, 1.0, margin=0.0) == passed


@pytest.mark.parametrize(("candidate", "serving", "behind"), [(10, 25, 15), (25, 10, 0)])
def test_how_much_less_a_candidate_learned_is_told(candidate: int, serving: int, behind: int) -> None:
    sides = []
    for seed, rows in ((1, candidate), (3, serving)):
        weights, manifest = release(seed)
        sides.append((weights, manifest.model_copy(update={"rows_trained": rows})))
    assert ShadowEvaluation(*sides).against.rows_behind == behind


@pytest.mark.parametrize(
    ("ends", "seen"), [((3, 5), [6, 7]), ((5, 3), [6, 7]), ((None, 6), [7]), ((None, None), [4, 5, 6, 7])]
)
def test_rows_count_that_are_later_than_what_either_side_learned(
    ends: tuple[float | None, float | None], seen: list[int]
) -> None:
    shadow = ShadowEvaluation(release(1, until=ends[0]), release(3, until=ends[1]), rows_needed=2)
    rows = [Impression("e", 0, n, n, f"u{n}", 1, (), (), False, False) for n in (4, 5, 6, 7)]
    batch = collate(rows, None, make_catalogue(3), history_length=2).batch
    shadow.observe(rows, batch)
    assert shadow.compared.user.tolist() == [f"u{n}" for n in seen]
    assert shadow.complete == (len(seen) >= 2)
    shadow.observe(rows, batch)
    assert len(shadow.compared) == (2 if len(seen) == 1 else len(seen))
    np.testing.assert_array_equal(shadow.compared.best, shadow.compared.serving)


def test_the_figures_are_those_of_the_plain_definitions(rows: ComparedRows) -> None:
    figures = judge(rows, CONFIG, against=only("r")).figures
    assert figures["serving_logloss"] == pytest.approx(log_loss(rows.label, rows.serving))
    assert figures["serving_calibration"] == pytest.approx(rows.serving.sum() / rows.label.sum())
