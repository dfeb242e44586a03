"""The training loop of the neural click models, with a network so small that its steps are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.factories.neural import random_world
from trainer.metrics import log_loss, user_auc
from trainer.networks.ciubm import CtrBatch
from trainer.networks.id_table import IdTable
from trainer.networks.losses import NonFiniteLoss
from trainer.offline.neural import fitting
from trainer.offline.neural.columns import ColumnBatches
from trainer.offline.neural.fitting import FitSettings, fit, predict, ranking_loss


class Line(nn.Module):
    """A line through the dense features and the ids, which notes how it is used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.ids = IdTable(16, 1, admit_after=1)
        self.was_training: list[bool] = []
        self.gradients: list[Tensor] = []
        self.weight.register_hook(self.gradients.append)

    def members(self, batch: CtrBatch) -> Tensor:
        self.was_training.append(self.training)
        logits_BK: Tensor = (batch.dense_BF @ self.weight)[:, None] + self.ids(batch.hashes_U2)[batch.target_B]
        return logits_BK


def fitted(rows: int = 64, *, validation: ColumnBatches | None = None, **settings: float) -> tuple[Line, list[float]]:
    data = random_world(rows)
    shown = replace(data.rows, user_N=np.arange(rows) // 4, second_N=np.zeros(rows, np.int64))  # four at a time
    columns = ColumnBatches(replace(data, rows=shown), history_length=5)
    network = Line(columns.dense_NF.shape[1])
    nn.init.zeros_(network.ids.embedding.weight)
    chosen = {"epochs": 1, "batch_rows": rows} | settings
    report = fit(network, columns, validation, FitSettings(**chosen), seed=0)  # type: ignore[arg-type]
    return network, report.losses


def test_each_epoch_trains_although_the_rows_between_them_are_scored() -> None:
    network, _ = fitted(epochs=2, validation=ColumnBatches(random_world(20, seed=5), history_length=5))
    assert network.was_training == [True, False, True, False]


def test_the_loss_of_an_epoch_is_the_mean_over_its_rows() -> None:
    _, losses = fitted(60, epochs=2, batch_rows=16, learning_rate=0.0, id_learning_rate=0.0, weight_decay=0.0)
    assert losses == pytest.approx([math.log(2)] * 2)


def test_the_ranking_term_counts_by_its_weight() -> None:
    plain, some, whole = (fitted(group_weight=weight)[0].gradients[0] for weight in (0.0, 0.25, 1.0))
    assert (whole - plain).abs().max() > 1e-3
    torch.testing.assert_close(some - plain, 0.25 * (whole - plain))


def test_gradients_are_no_longer_than_they_may_be() -> None:
    network, _ = fitted(max_gradient_norm=1e-4)
    assert network.gradients[0].norm() > 1e-3
    assert network.weight.grad is not None and network.weight.grad.norm() <= 1.001e-4


def test_the_moments_of_a_row_that_an_id_is_given_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr(fitting, "forget_rows", lambda _, rows: forgotten.extend(rows.tolist()))
    network, _ = fitted(batch_rows=16)
    assert network.ids.admitted > 1 and len(forgotten) >= network.ids.admitted


# ---- step sizes ------------------------------------------------------------------------------------------------------


class Idle(nn.Module):
    """One weight without a gradient, so that all that moves it is its decay."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def members(self, batch: CtrBatch) -> Tensor:
        return (self.weight * 0).expand(len(batch.dense_BF), 1)


def test_the_rate_rises_over_its_share_of_the_steps_and_falls_to_nothing_at_the_last() -> None:
    network, columns = Idle(), ColumnBatches(random_world(15), history_length=5)
    settings = FitSettings(epochs=2, batch_rows=4, learning_rate=0.5, weight_decay=0.25, warm_up=0.25)
    fit(network, columns, None, settings, seed=0)
    rates = [0.001, 0.501]  # of eight steps, the last of each epoch with three rows
    rates += [0.5 * (1 + math.cos(math.pi * done)) for done in (0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6)]
    assert network.weight.item() == pytest.approx(math.prod(1 - 0.5 * rate * 0.25 for rate in rates), rel=1e-5)


def test_weights_and_ids_have_step_sizes_of_their_own() -> None:
    network, _ = fitted(warm_up=0.0, learning_rate=0.25, id_learning_rate=0.5, weight_decay=0.0)
    # the first step of Adam is as long as its rate, whatever the gradient; before it all ids share row 0
    torch.testing.assert_close(network.weight.detach().abs(), torch.full((3,), 0.25), rtol=1e-3, atol=0)
    assert abs(network.ids.embedding.weight[0].item()) == pytest.approx(0.5, rel=1e-3)


def test_gradients_of_ids_are_as_long_as_they_are() -> None:
    network, _ = fitted(max_gradient_norm=1e-4)
    assert network.ids.embedding.weight.grad is not None
    assert network.ids.embedding.weight.grad.coalesce().values().norm() > 1e-3


class TwoTables(Line):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.more = IdTable(16, 1, admit_after=1)

    def members(self, batch: CtrBatch) -> Tensor:
        return super().members(batch) + self.more(batch.hashes_U2)[batch.target_B]


def test_ids_are_admitted_to_every_table() -> None:
    columns = ColumnBatches(random_world(20), history_length=5)
    network = TwoTables(columns.dense_NF.shape[1])
    fit(network, columns, None, FitSettings(epochs=1, batch_rows=20), seed=0)
    assert network.ids.admitted == network.more.admitted > 1


# ---- losses and scores -----------------------------------------------------------------------------------------------


def test_positives_are_ranked_among_what_their_user_was_shown_at_that_time() -> None:
    plain, ranked = (fitted(group_weight=weight)[0].gradients[0] for weight in (0.0, 1.0))
    data = random_world(64)
    numbers, labels = ColumnBatches(data, history_length=5).dense_NF, data.rows.label_N
    total = np.zeros(numbers.shape[1])
    for row in np.flatnonzero(labels):
        shown = row // 4 * 4 + np.arange(4)
        total += numbers[shown].mean(0) - numbers[row]
    np.testing.assert_allclose((ranked - plain).numpy(), total / labels.sum(), rtol=1e-4, atol=1e-6)


def test_ranking_far_from_nought_or_without_positives_is_a_number() -> None:
    far, groups = torch.full((4, 1), -500.0), torch.tensor([0, 0, 1, 1])
    assert ranking_loss(far, torch.tensor([1.0, 0, 0, 0]), groups).item() == pytest.approx(math.log(2))
    assert ranking_loss(-far, torch.tensor([1.0, 0, 1, 0]), groups).item() == pytest.approx(math.log(2))
    assert ranking_loss(far, torch.zeros(4), groups).item() == 0


def test_a_loss_that_is_no_number_ends_the_run_in_its_epoch() -> None:
    data = random_world(8)
    data.rows.dense_NF[3] = np.nan
    columns = ColumnBatches(data, history_length=5)
    with pytest.raises(NonFiniteLoss, match=r"loss is nan in epoch 1$"):
        fit(Line(3), columns, None, FitSettings(batch_rows=8), seed=0)


class TwoHeads(nn.Module):
    def members(self, batch: CtrBatch) -> Tensor:
        one_B = batch.dense_BF[:, 0]
        return torch.stack([one_B, 3 * one_B + 2], dim=1)


def test_scores_are_the_mean_probability_of_the_heads_in_the_order_of_the_rows() -> None:
    data = random_world(50)
    x = data.rows.dense_NF[:, 0].astype(np.float64)
    expected = (1 / (1 + np.exp(-x)) + 1 / (1 + np.exp(-3 * x - 2))) / 2
    found = predict(TwoHeads(), ColumnBatches(data, history_length=5), batch_rows=16)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_validation_is_reported_as_the_network_scores_it() -> None:
    data = random_world(90, seed=4)
    users = np.where(np.arange(90) < 60, 1, 2)  # of whom one has twice as many rows
    validation = ColumnBatches(replace(data, rows=replace(data.rows, user_N=users)), history_length=5)
    columns = ColumnBatches(random_world(64), history_length=5)
    network = Line(columns.dense_NF.shape[1])
    report = fit(network, columns, validation, FitSettings(epochs=2, batch_rows=16, learning_rate=0.1), seed=0)
    labels, scores = data.rows.label_N.astype(np.int64), predict(network, validation)
    per_user = user_auc(users, labels, scores)
    assert len(report.validation_losses) == len(report.validation_gauc) == 2 and np.ptp(per_user.auc) > 0
    assert report.validation_losses[-1] == pytest.approx(log_loss(labels, scores))
    assert report.validation_gauc[-1] == pytest.approx((2 * per_user.auc[0] + per_user.auc[1]) / 3)
