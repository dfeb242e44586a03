"""Every number of a collated batch, and the terms of a step's loss."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from schemas.behaviours import BehaviourKind
from tests.factories.samples import DIM, SMALL_MODEL, make_catalogue
from trainer.negatives.sampler import ContrastivePlan
from trainer.networks.ciubm import CiUBM, CtrBatch
from trainer.networks.collate import Collated, collate, dense_columns, newest_first
from trainer.networks.config import LearnerConfig
from trainer.networks.learner import Learner
from trainer.networks.losses import NonFiniteLoss, fake_negative_weights, info_nce
from trainer.samples.rows import Impression

PLAN = ContrastivePlan(
    rows=np.array([0, 2]), positives=np.array([7, 9]), candidates=np.array([4, 9, 12]),
    allowed=np.array([[True, False, True], [True, True, False]]),
    log_q=np.array([-1, -2, -3], np.float32), positive_log_q=np.array([-4, -5], np.float32),
)  # fmt: skip


def row(item: int, history: tuple[int, ...], label: int = 0, **more: Any) -> Impression:
    return Impression("e", 0, 0, 0, "u", item, history, (0,) * len(history), False, False, label, **more)


ROWS = [row(7, (1, 2, 3), 1), row(8, ()), row(9, (4, 5, 6, 4), 1)]


@pytest.fixture(name="batch")
def make_batch() -> Collated:
    catalogue = make_catalogue(12)
    catalogue.delete_item("i8")
    return collate(ROWS, PLAN, catalogue, history_length=3)


def test_every_place_of_a_batch_leads_to_its_item(batch: Collated) -> None:
    catalogue, items = make_catalogue(12), batch.items_U
    catalogue.delete_item("i8")
    assert items.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12]
    np.testing.assert_array_equal(batch.batch.vectors_UV.numpy(), catalogue.vectors(items))
    np.testing.assert_array_equal(batch.batch.hashes_U2.numpy(), catalogue.hashes(items))
    assert batch.batch.has_vector_U.tolist() == [n not in (0, 8) for n in items]
    assert items[batch.batch.target_B].tolist() == [7, 8, 9]
    assert items[batch.batch.history_BL].tolist() == [[3, 2, 1], [0, 0, 0], [4, 6, 5]]
    told = batch.batch.dense_BF.numpy()[:, [0, 1, -1]]  # length of the history, whether there is one, the vector
    np.testing.assert_allclose(told, [[np.log(4), 1, 1], [0, 0, 0], [np.log(4), 1, 1]], atol=1e-3)
    assert batch.labels_B.tolist() == [1, 0, 1] and batch.weights_B is None
    term = batch.contrastive
    assert term is not None
    assert (items[term.positives_P].tolist(), items[term.candidates_K].tolist()) == ([7, 9], [4, 9, 12])
    assert term.rows_P.tolist() == [0, 2] and term.allowed_PK.tolist() == PLAN.allowed.tolist()
    assert term.candidate_log_q_K.tolist() == [-1, -2, -3] and term.positive_log_q_P.tolist() == [-4, -5]


def test_an_upgrade_weighs_nothing_beside_rows_that_weigh_one() -> None:
    rows = [*ROWS, row(3, (), 1, correction=True, taken_before=BehaviourKind.CLICK), row(3, (), 1, correction=True)]
    collated = collate(rows, None, make_catalogue(12), history_length=3)
    assert collated.weights_B is not None and collated.weights_B.tolist() == [1, 1, 1, 0, 1]


def test_histories_are_padded_to_the_longest_within_the_length() -> None:
    assert newest_first([(1, 2), (3,)], 9).tolist() == [[2, 1], [3, 0]]
    assert newest_first([(), ()], 9).tolist() == [[0], [0]] and newest_first([], 9).shape == (0, 1)
    found = dense_columns(np.array([[1, 2], [3, 4]], np.float32), np.array([True, False]))
    assert found.dtype == np.float32 and found.tolist() == [[1, 2, 1], [3, 4, 0]]


def test_a_batch_on_another_device_has_every_column(batch: Collated) -> None:
    moved = replace(batch.batch, category_U=torch.arange(11)).to(torch.device("cpu"))
    for one in fields(moved):
        assert torch.equal(
            getattr(moved, one.name), getattr(replace(batch.batch, category_U=torch.arange(11)), one.name)
        )


@pytest.mark.parametrize("in_time", [1.0, 0.6])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 1.0]])
def test_the_weighted_click_loss_moves_the_network_and_the_contrastive_term_a_space_of_its_own(
    batch: Collated, in_time: float, weights: list[float] | None
) -> None:
    config = LearnerConfig(temperature=0.3, log_q_strength=0.4, weight_decay=0.0)
    learner, twin = (Learner(SMALL_MODEL, config, vector_width=DIM, seed=1) for _ in range(2))
    given = None if weights is None else torch.tensor(weights)
    report = learner.step(batch.batch, batch.labels_B, batch.contrastive, in_time=(in_time,), weights_B=given)
    model, term = twin.model, batch.contrastive
    assert term is not None and report.contrastive_loss is not None
    content = model.interest_space(batch.batch.vectors_UV, batch.batch.has_vector_U)
    logits = model(batch.batch)
    weight = torch.ones(3) if given is None else given
    weight = weight * fake_negative_weights(torch.sigmoid(logits), batch.labels_B, in_time)
    click = F.binary_cross_entropy_with_logits(logits, batch.labels_B, weight)
    contrastive = info_nce(
        anchors(model, batch.batch, [0, 2]), content[term.positives_P],
        content[term.candidates_K], term.allowed_PK, temperature=0.3, positive_log_q_P=0.4 * term.positive_log_q_P,
        candidate_log_q_K=0.4 * term.candidate_log_q_K,
    )  # fmt: skip
    assert report.loss == pytest.approx(float(click.detach()), rel=1e-5)
    assert report.contrastive_loss == pytest.approx(float(contrastive.detach()), rel=1e-5)
    click.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in model.interest.parameters())
    dense = {n: p for n, p in model.named_parameters() if not n.startswith(("id_table", "interest"))}
    torch.nn.utils.clip_grad_norm_(dense.values(), config.max_gradient_norm)
    contrastive.backward()  # type: ignore[no-untyped-call]
    dense |= {f"interest.{n}": p for n, p in model.interest.named_parameters()}
    moved = dict(learner.model.named_parameters())
    for name, parameter in dense.items():  # the first step of Adam is its rate against the sign of the gradient
        clear = parameter.grad.abs() > 1e-5  # type: ignore[union-attr]
        step = (moved[name] - parameter).detach()[clear]
        expected = -config.learning_rate * parameter.grad.sign()[clear]  # type: ignore[union-attr]
        torch.testing.assert_close(step, expected, rtol=1e-2, atol=1e-6)


def anchors(model: CiUBM, batch: CtrBatch, rows: list[int]) -> torch.Tensor:
    """By loops: the mean of each history, half as much for what is `recency_half_life_items` older."""
    half_life = model.config.recency_half_life_items
    sums = [
        sum(batch.vectors_UV[item] * 2 ** (-age / half_life) for age, item in enumerate(history) if item)
        for history in batch.history_BL[rows].tolist()
    ]
    means = [F.normalize(torch.as_tensor(one), dim=0) for one in sums]
    return torch.stack([F.normalize(model.interest(mean), dim=0) for mean in means])


@pytest.mark.parametrize("over", [{"contrastive": False}, {}])
def test_switched_off_or_without_a_plan_there_is_no_contrastive_term(batch: Collated, over: dict[str, bool]) -> None:
    learner = Learner(SMALL_MODEL, LearnerConfig(**over), vector_width=DIM, seed=1)
    term = batch.contrastive if over else None
    before = learner.model.interest.weight.detach().clone()
    assert learner.step(batch.batch, batch.labels_B, term).contrastive_loss is None
    assert torch.equal(learner.model.interest.weight, before)


def test_no_score_depends_on_the_contrastive_term(batch: Collated) -> None:
    one, other = (Learner(SMALL_MODEL, LearnerConfig(contrastive=on), vector_width=DIM, seed=1) for on in (True, False))
    for _ in range(4):
        reports = [each.step(batch.batch, batch.labels_B, batch.contrastive) for each in (one, other)]
        np.testing.assert_array_equal(reports[0].probabilities_B, reports[1].probabilities_B)
    released = one.released(), other.released()
    differing = {name for name in released[0] if not torch.equal(released[0][name], released[1][name])}
    assert differing == {"interest.weight", "interest.bias"}
    assert torch.equal(released[0]["interest.weight"], one.model.interest.weight)


def test_a_term_that_is_not_finite_ends_the_step_before_any_weight_changes(batch: Collated) -> None:
    learner = Learner(SMALL_MODEL, LearnerConfig(), vector_width=DIM, seed=1)
    with torch.no_grad():
        learner.model.interest.bias.fill_(torch.nan)
    before = {name: one.clone() for name, one in learner.model.state_dict().items()}
    with pytest.raises(NonFiniteLoss, match="contrastive term"):
        learner.step(batch.batch, batch.labels_B, batch.contrastive)
    after = learner.model.state_dict()
    assert all(torch.equal(one, after[name]) for name, one in before.items() if name != "interest.bias")


def test_weights_and_snapshots_of_before_the_space_of_interest_are_taken_up(batch: Collated) -> None:
    one, other = (Learner(SMALL_MODEL, LearnerConfig(), vector_width=DIM, seed=1) for _ in range(2))
    one.step(batch.batch, batch.labels_B, None)
    state = one.snapshot()
    del state.values["interest"]
    for name in [name for name in state.arrays if "interest" in name]:
        del state.arrays[name]
    other.restore(state)
    assert torch.equal(other.model.projection.weight, one.model.projection.weight)
    assert other.model.interest.weight.any()
    other.step(batch.batch, batch.labels_B, batch.contrastive)


def test_a_restored_learner_takes_the_same_next_steps_as_the_one_it_came_from(batch: Collated) -> None:
    one, other = (Learner(SMALL_MODEL, LearnerConfig(), vector_width=DIM, seed=seed) for seed in (1, 2))
    for _ in range(3):
        one.step(batch.batch, batch.labels_B, batch.contrastive)
    state = one.snapshot()
    kept = {name: array.copy() for name, array in state.arrays.items()}
    other.restore(state)
    for _ in range(2):
        reports = [each.step(batch.batch, batch.labels_B, batch.contrastive) for each in (one, other)]
        np.testing.assert_array_equal(reports[0].probabilities_B, reports[1].probabilities_B)
    weights = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(np.array_equal(array, kept[name]) for name, array in state.arrays.items())  # a copy
    with pytest.raises(ValueError, match="do not fit"):
        Learner(SMALL_MODEL, LearnerConfig(), vector_width=DIM + 1, seed=1).restore(state)
