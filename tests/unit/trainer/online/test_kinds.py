"""Clicks, carts and purchases with outputs of their own: on a stream of known probabilities, and row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from schemas.behaviours import Behaviour, BehaviourKind
from tests.factories.feeding import finish, is_balanced, observe_all, pump, through_bytes
from tests.factories.samples import DAY0, behaviour, make_catalogue, make_trainer, small_config
from trainer.networks.ciubm import CtrBatch
from trainer.networks.collate import KindTargets, collate, weighed_by_value
from trainer.networks.losses import log_reached, outcome_loss
from trainer.online.config import TrainerConfig
from trainer.online.kinds import KindScores, RecentKinds, TakesByKind
from trainer.online.trainer import OnlineTrainer
from trainer.provenance.journal import Segment
from trainer.provenance.rebuild import Rebuild
from trainer.samples.join_rules import JoinRules
from trainer.samples.rows import Impression, learned_as

KINDS = ("cart", "purchase")
CLICK, CART, PURCHASE = BehaviourKind.CLICK, BehaviourKind.CART, BehaviourKind.PURCHASE
IMPRESSIONS, ITEMS = 40_000, 8


def chances(item: int) -> tuple[float, float, float]:
    """Probability that an item is clicked, then put into the cart, then bought."""
    return 0.25 + 0.05 * item, 0.9 - 0.05 * item, 0.8


def delayed_log(seed: int) -> tuple[list[Behaviour], list[tuple[str, float, float]]]:
    """Exposures eight seconds apart; clicks after seconds, carts after minutes, purchases after hours. Also the takes:
    kind, and the seconds of exposure and take.
    """
    rng = np.random.default_rng(seed)
    events, takes = [], []
    for n in range(IMPRESSIONS):
        user, number = f"u{int(rng.integers(3_000))}", int(rng.integers(ITEMS))
        item, shown = f"i{number}", 8.0 * n
        events.append(behaviour(f"x{n}", user=user, item=item, second=shown))
        delays = (rng.uniform(1, 4), rng.uniform(120, 480), rng.uniform(3_600, 10_800))
        for kind, chance, delay in zip(("click", "cart", "purchase"), chances(number), delays, strict=True):
            if rng.random() >= chance:
                break
            known: dict[str, Any] = {"user": user, "item": item, "exposure_id": f"x{n}"}
            events.append(behaviour(f"{kind}{n}", kind, second=shown + delay, **known))
            takes.append((kind, shown, shown + delay))
    return sorted(events, key=lambda event: event.occurred_at), takes


class Served:
    """What releases of the second half of the log would have answered, and what is true."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer
        self.found: list[np.ndarray] = []
        self.true: list[tuple[float, float, float]] = []

    def observe(self, rows: Sequence[Impression], batch: CtrBatch) -> None:
        if rows[0].second - DAY0 < 8 * IMPRESSIONS / 2:
            return
        released = self.trainer._variants._learners["ciubm"]._averaged
        first = [not row.correction for row in rows]
        with torch.no_grad():
            self.found.append(released.probabilities(batch).numpy()[first])
        items = [self.trainer.catalogue.item_id(row.item) for row in rows if not row.correction]
        self.true += [chances(int(item[1:])) for item in items]

    def calibrations(self) -> list[float]:
        """Predicted over true probability of each output."""
        ratios: list[float] = (np.concatenate(self.found).mean(0) / np.cumprod(self.true, axis=1).mean(0)).tolist()
        return ratios


def config_of(**over: Any) -> TrainerConfig:
    model = small_config().model.model_copy(update={"kinds": KINDS})
    return small_config(model=model, batch_rows=64, lateness_seconds=1, **over)


def test_each_kind_is_calibrated_however_late_it_comes_and_every_take_is_accounted_for() -> None:
    log, takes = delayed_log(1)
    learner = {"contrastive": False, "learning_rate": 1e-3}
    trainer = make_trainer(config_of(purchase_correction_seconds=9_000.0, learner=learner))
    served = Served(trainer)
    trainer.observers.append(served)
    last_shown = max(place for place, event in enumerate(log) if event.kind == "exposure")
    for offset, event in enumerate(log):
        trainer.intake.observe(0, offset, event)
        if offset == last_shown:  # afterwards only takes come, and no impression that was not taken
            pump(trainer)
            take, cart, purchase = served.calibrations()
    finish(trainer)
    progress, counts = trainer.progress, trainer.intake.counts
    assert is_balanced(counts) and counts.pending == 0 and counts.received == len(log) == counts.trained
    in_time = {kind: sum(one == kind and at - shown <= 5 for one, shown, at in takes) for kind in ("click", *KINDS)}
    windows = {"click": 3_600, "cart": 6 * 3_600, "purchase": 9_000}
    known = {
        kind: sum(one == kind and at - shown <= 5 + windows[kind] for one, shown, at in takes)
        for kind in ("click", *KINDS)
    }
    of_kind = {kind: sum(one == kind for one, _, _ in takes) for kind in ("click", *KINDS)}
    # all of a kind were known in time, or corrected their row, or are counted as too late (whole seconds decide)
    for kind in ("click", *KINDS):
        found = progress.taken[BehaviourKind(kind)]
        assert found.on_time == in_time[kind] and abs(found.on_time + found.late - known[kind]) <= 3, kind
    learned = sum(one.on_time + one.late for one in map(progress.taken.__getitem__, (CLICK, CART, PURCHASE)))
    assert learned + trainer.intake.takes_too_late == sum(of_kind.values()) and trainer.intake.takes_too_late > 300
    # purchases beyond their window are never learned
    in_window = known["purchase"] / of_kind["purchase"]
    assert take == pytest.approx(1, abs=0.05) and cart == pytest.approx(1, abs=0.05)
    assert purchase / in_window == pytest.approx(1, abs=0.05)


def test_what_the_kinds_say_of_rows_and_what_was_predicted_is_in_metrics_and_comes_back_from_a_snapshot() -> None:
    log, _ = delayed_log(2)
    trainer, again = make_trainer(config_of()), make_trainer(config_of())
    observe_all(trainer, log[:6_000])
    pump(trainer)
    metrics = trainer.candidate().metrics
    assert metrics["cart_calibration"] == pytest.approx(1.1, abs=0.35) and metrics["purchase_auc"] is not None
    again.restore(through_bytes(trainer.snapshot()))
    for each in (trainer, again):
        for offset, event in enumerate(log[6_000:8_000], 6_000):
            each.intake.observe(0, offset, event)
        pump(each)
    assert again.candidate().metrics == trainer.candidate().metrics
    assert again.progress.rows_sha256 == trainer.progress.rows_sha256
    assert again.progress.taken.snapshot() == trainer.progress.taken.snapshot()
    for name, weight in again.candidate().weights.items():
        assert torch.equal(weight, trainer.candidate().weights[name]), name


@pytest.mark.parametrize("over", [{}, {"kinds": KINDS}, {"value_weight": 0.5}])
def test_as_what_a_row_was_taken_is_part_of_its_hash_where_a_model_learns_it(over: dict[str, Any]) -> None:
    log, _ = delayed_log(3)
    learner = {"value_weight": over.get("value_weight", 0.0)}
    model = small_config().model.model_copy(update={"kinds": over.get("kinds", ())})
    config = small_config(model=model, batch_rows=64, lateness_seconds=1, learner=learner)
    trainer = make_trainer(config)
    observe_all(trainer, log[:2_000])
    pump(trainer)
    segment = Segment.from_state(through_bytes(trainer.journal.segment().to_state()))
    assert segment.kinds is bool(over)
    rebuild = Rebuild(segment, JoinRules.of(config, [0]))
    for offset, event in enumerate(log[:2_000]):
        rebuild.observe(0, offset, event)
    rebuild.advance()
    assert rebuild.verify(trainer.journal.segment().root).verified
    said = [learned_as(row(level, value=value), kinds=segment.kinds) for level, value in ((2, 0.0), (3, 0.0), (3, 1.5))]
    assert len(set(said)) == (3 if over else 1)


def row(
    level: int = 0, before: int = 0, *, correction: bool = False, value: float = 0.0, user: str = "u"
) -> Impression:
    kinds = [None, CLICK, CART, PURCHASE]
    return Impression(
        "e", 0, 0, DAY0, user, 1, (), (), False, False, label=int(level > 0), taken_as=kinds[level], value=value,
        correction=correction, taken_before=kinds[before],
    )  # fmt: skip


ROWS = [
    row(), row(1), row(2), row(3), row(1, correction=True), row(2, correction=True), row(3, correction=True),
    row(2, 1, correction=True), row(3, 1, correction=True), row(3, 2, correction=True),
]  # fmt: skip
LABELS = [[0, 0], [0, 0], [1, 0], [1, 1], [0, 0], [1, 0], [1, 1], [1, 0], [1, 1], [1, 1]]
WEIGHTS = [[1, 1], [1, 1], [1, 1], [1, 1], [0, 0], [1, 0], [1, 1], [1, 0], [1, 1], [0, 1]]


def test_a_late_take_counts_once_in_the_outputs_that_it_is_new_to_and_in_no_other() -> None:
    targets = KindTargets.of(ROWS, KINDS)
    assert targets.labels_BK.tolist() == LABELS and targets.weights_BK.tolist() == WEIGHTS
    alone = KindTargets.of(ROWS, ("purchase",))
    assert alone.labels_BK[:, 0].tolist() == [one[1] for one in LABELS]
    scores = KindScores.of(ROWS, KINDS, np.zeros((len(ROWS), 2)))
    assert scores.labels.tolist() == [[bool(x) for x in one] for one in LABELS]
    assert scores.new.tolist() == [[bool(x) for x in one] for one in WEIGHTS]
    counts = TakesByKind()
    counts.add(ROWS)
    assert counts.snapshot() == {"click": (3, 3), "cart": (2, 4), "purchase": (1, 3)}
    assert counts[PURCHASE].in_time == 1 / 4 and TakesByKind()[CART].in_time == 1.0


def test_takes_weigh_by_what_they_are_worth_in_the_last_output_alone() -> None:
    rows = [row(1, value=9.0), row(3, value=9.0), row(3, value=0.25), row(3), row(3, value=1e9), row(0)]
    catalogue = make_catalogue(3)
    collated = weighed_by_value(
        collate(rows, None, catalogue, history_length=3, kinds=KINDS), rows, usual=1.0, power=0.5
    )
    assert collated.kinds is not None and collated.weights_B is None
    assert collated.kinds.weights_BK[:, 0].tolist() == [1] * 6
    assert collated.kinds.weights_BK[:, 1].tolist() == [1, 3, 0.5, 1, 10, 1]
    plain = weighed_by_value(collate(rows, None, catalogue, history_length=3), rows, usual=1.0, power=0.5)
    assert plain.weights_B is not None and plain.weights_B.tolist() == [3, 3, 0.5, 1, 10, 1]
    unknown = weighed_by_value(collate(rows, None, catalogue, history_length=3), rows, usual=0.0, power=0.5)
    assert unknown.weights_B is not None and unknown.weights_B.tolist() == [1] * 6


def test_an_outcome_learns_of_its_own_step_and_moves_nothing_before_it() -> None:
    logits = torch.tensor([0.3, -2.0], requires_grad=True)
    steps = torch.tensor([[0.5, -1.0], [2.0, 0.0]], requires_grad=True)
    log_p = log_reached(logits, steps)
    expected = torch.sigmoid(torch.cat([logits[:, None], steps], dim=1)).cumprod(1)[:, 1:]
    torch.testing.assert_close(log_p.exp(), expected)
    (gradient,) = torch.autograd.grad(log_p[:, 1].sum(), steps, retain_graph=True)
    assert gradient[:, 0].tolist() == [0, 0] and gradient[:, 1].all()
    assert torch.autograd.grad(log_p.sum(), logits, allow_unused=True)[0] is None
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    by_hand = torch.nn.functional.binary_cross_entropy(expected, labels, reduction="none").mean(0).sum()
    torch.testing.assert_close(outcome_loss(log_p, labels, torch.ones(2, 2)), by_hand)
    surely = outcome_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1))
    never = outcome_loss(torch.full((1, 1), -1e4), torch.ones(1, 1), torch.ones(1, 1))
    assert torch.isfinite(surely) and torch.isfinite(never)


def test_running_metrics_of_a_kind_forget_users_and_come_back() -> None:
    recent, again = RecentKinds(KINDS, rows=6), RecentKinds(KINDS, rows=6)
    recent.add([row(3, user="a"), row(user="a"), row(2, user="b")], np.full((3, 2), 0.5))
    found = recent.metrics()
    assert found["cart_calibration"] == 1.5 / 2 and found["purchase_calibration"] == 1.5 and found["cart_auc"] == 0.5
    recent.add([row(3, 1, correction=True, user="a")], np.full((1, 2), 0.9))
    assert recent.metrics()["purchase_calibration"] == 1.5 / 2, "observed, but not predicted a second time"
    again.restore(through_bytes(recent.snapshot()))
    assert again.metrics() == recent.metrics()
    recent.forget("a")
    assert recent.metrics()["cart_calibration"] == 0.5 and recent.metrics()["purchase_calibration"] is None
    recent.add([row(user="c")] * 6, np.zeros((6, 2)))
    assert recent.metrics()["cart_calibration"] is None
    again.restore(None)
    assert again.metrics() == {}


@pytest.mark.parametrize("wrong", [("purchase", "cart"), ("cart", "cart"), ("click",)])
def test_kinds_out_of_order_are_refused(wrong: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="cart"):
        small_config(model=small_config().model.model_dump() | {"kinds": wrong})
