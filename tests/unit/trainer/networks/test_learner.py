"""What a step does to ids beyond the gradient."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.factories.feeding import through_bytes
from tests.factories.samples import DIM, SMALL_MODEL, make_catalogue
from trainer.networks.ciubm import CiUBM
from trainer.networks.collate import Collated, collate
from trainer.networks.config import LearnerConfig, TreesConfig
from trainer.networks.learner import Learner
from trainer.networks.losses import NonFiniteLoss
from trainer.networks.trees import TreeShare
from trainer.samples.rows import Impression


def test_an_id_that_gets_anothers_row_does_not_get_its_momentum() -> None:
    catalogue = make_catalogue(16)
    config = SMALL_MODEL.model_copy(update={"id_rows": 8, "id_admit_after": 1})
    learner = Learner(config, LearnerConfig(), vector_width=DIM, seed=0)

    def step(items: range) -> np.ndarray:
        """Learn from these items twice; the momentum of the rows of the table."""
        rows = [Impression("e", 0, n, 0, f"u{n}", n, (), (), False, False, n % 2) for n in items]
        collated = collate(rows, None, catalogue, history_length=5)
        for _ in range(2):
            learner.step(collated.batch, collated.labels_B, None)
        return np.abs(learner.snapshot().arrays["sparse/0/exp_avg"]).sum(1)[1:]

    assert (step(range(1, 9)) > 0).all()
    before = learner.model.id_table.key_SW.clone()
    collated = collate(
        [Impression("e", 0, n, 0, "u", n, (), (), False, False, 1) for n in range(9, 12)], None, catalogue,
        history_length=5,
    )  # fmt: skip
    learner.step(collated.batch, collated.labels_B, None)
    reassigned = (learner.model.id_table.key_SW != before).flatten().numpy()
    for name in ("exp_avg", "exp_avg_sq"):
        moments = np.abs(learner.snapshot().arrays[f"sparse/0/{name}"]).sum(1)[1:]
        assert reassigned.sum() == 3
        assert not moments[reassigned].any() and (moments[~reassigned] > 0).all()


def learned_batch() -> Collated:
    rows = [Impression("e", 0, n, n // 4, f"u{n // 4}", n + 1, (3, 5), (0, 0), False, False, n % 2) for n in range(12)]
    return collate(rows, None, make_catalogue(16), history_length=5)


def test_a_release_has_the_running_average_of_the_dense_weights_and_the_id_table_as_it_is() -> None:
    collated = learned_batch()
    config = LearnerConfig(learning_rate=0.05, average_steps=3.0)
    learner = Learner(SMALL_MODEL, config, vector_width=DIM, seed=0)
    expected = learner.model.projection.weight.detach().clone()
    for step in range(1, 60):
        learner.step(collated.batch, collated.labels_B, None)
        kept = min(0.5 ** (1 / 3), step / (step + 10))
        expected = kept * expected + (1 - kept) * learner.model.projection.weight.detach()
        if step == 30:  # a restart changes nothing
            state, learner = learner.snapshot(), Learner(SMALL_MODEL, config, vector_width=DIM, seed=1)
            learner.restore(through_bytes(state))
    released, now = learner.released(), learner.model.state_dict()
    torch.testing.assert_close(released["projection.weight"], expected)
    assert set(released) == set(now) and not torch.equal(released["projection.weight"], now["projection.weight"])
    assert torch.equal(released["id_table.embedding.weight"], now["id_table.embedding.weight"])


def test_without_an_average_a_release_has_the_weights_of_the_last_step() -> None:
    collated = learned_batch()
    learner = Learner(SMALL_MODEL, LearnerConfig(average_steps=0), vector_width=DIM, seed=0)
    for _ in range(3):
        learner.step(collated.batch, collated.labels_B, None)
    released = learner.released()
    assert all(torch.equal(released[name], tensor) for name, tensor in learner.model.state_dict().items())


@pytest.mark.parametrize("average_steps", [0.0, 20.0])
def test_a_release_stays_as_it_was_while_more_is_learned(average_steps: float) -> None:
    collated = learned_batch()
    learner = Learner(SMALL_MODEL, LearnerConfig(average_steps=average_steps), vector_width=DIM, seed=0)
    learner.step(collated.batch, collated.labels_B, None)
    released, again = learner.released(), learner.released()
    learner.step(collated.batch, collated.labels_B, None)
    assert all(torch.equal(released[name], tensor) for name, tensor in again.items())
    now = learner.released()
    assert any(not torch.equal(released[name], tensor) for name, tensor in now.items())
    assert not {tensor.data_ptr() for tensor in released.values()} & {tensor.data_ptr() for tensor in now.values()}


def test_averaging_changes_nothing_of_what_is_learned() -> None:
    collated = learned_batch()
    found = []
    for half_life in (0.0, 20.0):
        learner = Learner(SMALL_MODEL, LearnerConfig(average_steps=half_life), vector_width=DIM, seed=0)
        found.append([learner.step(collated.batch, collated.labels_B, None).probabilities_B for _ in range(4)])
    np.testing.assert_array_equal(found[0], found[1])


def collated_rows() -> Collated:
    rows = [Impression("e", 0, n, 0, f"u{n}", n, (n + 1, n + 2), (0, 0), False, False, n % 2) for n in range(1, 9)]
    return collate(rows, None, make_catalogue(16), history_length=5)


def test_dense_weights_decay_and_move_by_a_bounded_gradient_and_ids_by_their_own_rate() -> None:
    config = LearnerConfig(learning_rate=0.01, id_learning_rate=0.03, weight_decay=0.5, max_gradient_norm=1e-9)
    learner, batch = Learner(SMALL_MODEL, config, vector_width=DIM, seed=0), collated_rows()
    before = {name: tensor.detach().clone() for name, tensor in learner.model.named_parameters()}
    learner.step(batch.batch, batch.labels_B, None)
    after = dict(learner.model.named_parameters())
    apart = {"id_table.embedding.weight", "interest.weight", "interest.bias"}
    assert torch.equal(after["interest.weight"], before["interest.weight"])  # there was no contrastive term
    for name in before.keys() - apart:
        # Adam moves a weight by its rate unless the gradient is about as small as its epsilon
        torch.testing.assert_close(after[name].detach(), before[name] * (1 - 0.01 * 0.5), rtol=0, atol=1.5e-3)
    shared = (after["id_table.embedding.weight"] - before["id_table.embedding.weight"]).detach()[0]
    torch.testing.assert_close(shared.abs(), torch.full_like(shared, 0.03), rtol=1e-2, atol=0)


def test_a_learner_that_is_restored_to_where_nothing_was_learned_has_no_momentum() -> None:
    one, other = (Learner(SMALL_MODEL, LearnerConfig(), vector_width=DIM, seed=seed) for seed in (0, 1))
    batch = collated_rows()
    for _ in range(3):
        other.step(batch.batch, batch.labels_B, None)
    other.restore(one.snapshot())
    for each in (one, other):
        for _ in range(2):
            each.step(batch.batch, batch.labels_B, None)
    weights = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_trees_are_part_of_the_answer_and_of_a_release_but_teach_the_network_nothing() -> None:
    collated = learned_batch()
    with_trees = SMALL_MODEL.model_copy(update={"trees": TreesConfig(count=3, depth=2, leaf_rows=2, first_rows=24)})
    bare = SMALL_MODEL.model_copy(update={"trees": TreesConfig(count=0)})
    learner, alone = (Learner(config, LearnerConfig(), vector_width=DIM, seed=0) for config in (with_trees, bare))
    for step in range(1, 5):
        trees = learner.model.trees
        with torch.no_grad():
            logits, numbers, _ = alone.model.network(collated.batch)
            expected = torch.lerp(logits, trees(numbers), trees.share) if step > 2 else logits
            assert step != 3 or trees.share == 0.5
        report, other = (each.step(collated.batch, collated.labels_B, None) for each in (learner, alone))
        np.testing.assert_allclose(report.probabilities_B, torch.sigmoid(expected.double()).numpy(), atol=1e-6)
        assert report.loss == other.loss and trees.fitted == (step > 1)
    for name, weight in alone.released().items():
        assert torch.equal(learner.released()[name], weight), name
    assert torch.equal(learner.released()["trees.value_TL"], learner.model.trees.value_TL)
    again = Learner(with_trees, LearnerConfig(), vector_width=DIM, seed=9)
    again.restore(through_bytes(learner.snapshot()))
    for _ in range(4):
        reports = [each.step(collated.batch, collated.labels_B, None).probabilities_B for each in (learner, again)]
        np.testing.assert_array_equal(*reports)


def test_a_row_that_an_id_was_admitted_to_is_in_the_next_snapshot_of_what_changed() -> None:
    catalogue = make_catalogue(600)
    config = SMALL_MODEL.model_copy(update={"id_rows": 1_024, "id_admit_after": 1})
    learner = Learner(config, LearnerConfig(), vector_width=DIM, seed=0)

    def step(items: range) -> None:
        rows = [Impression("e", 0, n, 0, f"u{n}", n, (), (), False, False, n % 2) for n in items]
        collated = collate(rows, None, catalogue, history_length=5)
        learner.step(collated.batch, collated.labels_B, None)

    step(range(1, 9))
    before = learner.snapshot().frozen()
    rows_before = learner.snapshot().arrays["model/id_table.embedding.weight"].copy()
    step(range(500, 560))
    copy = learner.snapshot().frozen({"": before.copies[""].held}).copies[""]
    rows = learner.snapshot().arrays["model/id_table.embedding.weight"]
    changed = np.flatnonzero((rows != rows_before).any(1))
    assert len(changed) >= 50 and set(changed.tolist()) <= set(copy.numbers.tolist())
    assert len(copy.numbers) < 4 * len(changed)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0] * 6])
def test_trees_get_the_weights_of_the_rows_and_the_seed_of_the_learner(weights: list[float] | None) -> None:
    collated = learned_batch()
    config = SMALL_MODEL.model_copy(update={"trees": TreesConfig(count=3, depth=2, leaf_rows=2, first_rows=24)})
    learner = Learner(config, LearnerConfig(), vector_width=DIM, seed=5)
    given = None if weights is None else torch.tensor(weights)
    learner.step(collated.batch, collated.labels_B, None, weights_B=given)
    kept = through_bytes(learner.snapshot()).part("trees")
    assert kept.values["seed"] == 5 and kept.arrays["rows.weight"].tolist() == (weights or [1.0] * 12)
    assert kept.arrays["rows.label"].tolist() == collated.labels_B.tolist()
    learner.step(collated.batch, collated.labels_B, None, in_time=(0.5,), weights_B=given)
    late = through_bytes(learner.snapshot()).part("trees").arrays["rows.weight"][12:]
    taken, before = collated.labels_B.numpy() > 0, np.array(weights or [1.0] * 12)
    assert (late[taken] == before[taken]).all() and (late[~taken] < before[~taken]).all() and late.min() > 0


def test_trees_are_weighed_beside_the_averaged_weights_every_eighth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    collated = learned_batch()
    config = SMALL_MODEL.model_copy(update={"trees": TreesConfig(count=3, depth=2, leaf_rows=2, first_rows=24)})
    learner = Learner(config, LearnerConfig(learning_rate=0.05, average_steps=4), vector_width=DIM, seed=0)
    judged: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def judge(
        self: TreeShare, logits: torch.Tensor, trees: torch.Tensor, labels: torch.Tensor, _: object
    ) -> torch.Tensor:
        judged.append((logits, trees, labels))
        return torch.tensor(0.125)

    monkeypatch.setattr(TreeShare, "judge", judge)
    for step in range(20):
        released = CiUBM(config, vector_width=DIM, seed=1)
        released.load_state_dict(learner.released())
        with torch.no_grad():
            expected, numbers, _ = released.eval().network(collated.batch)
        before = len(judged)
        learner.step(collated.batch, collated.labels_B, None)
        assert len(judged) - before == (step in (8, 16))
        if len(judged) > before:
            torch.testing.assert_close(judged[-1][0], expected)
            torch.testing.assert_close(judged[-1][1], released.trees(numbers))
            assert torch.equal(judged[-1][2], collated.labels_B)
    assert learner.model.trees.share == 0.125 == learner.released()["trees.share"]


def test_a_frozen_projection_is_that_of_the_snapshot_in_releases_too() -> None:
    config = SMALL_MODEL.model_copy(update={"refresh_projection": False})
    one, other = (Learner(config, LearnerConfig(), vector_width=DIM, seed=seed) for seed in (0, 1))
    other.restore(through_bytes(one.snapshot()))
    assert torch.equal(other.released()["projection.weight"], one.model.projection.weight)


def test_a_loss_that_is_none_leaves_what_trees_weigh_as_it_is() -> None:
    collated = learned_batch()
    config = SMALL_MODEL.model_copy(update={"trees": TreesConfig(count=3, depth=2, leaf_rows=2, first_rows=24)})
    learner = Learner(config, LearnerConfig(), vector_width=DIM, seed=0)
    for _ in range(8):  # the ninth step weighs the trees
        learner.step(collated.batch, collated.labels_B, None)
    before = learner.snapshot().part("trees").values["share"]
    broken = replace(collated.batch, dense_BF=torch.full_like(collated.batch.dense_BF, torch.nan))
    with pytest.raises(NonFiniteLoss):
        learner.step(broken, collated.labels_B, None)
    assert learner.snapshot().part("trees").values["share"] == before
    learner.step(collated.batch, collated.labels_B, None)
    assert learner.snapshot().part("trees").values["share"] != before
