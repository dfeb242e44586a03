"""The training loop of the neural click models, with a network so small that its steps are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.factories.neural import random_world
from trainer.networks.ciubm import CtrBatch
from trainer.networks.id_table import IdTable
from trainer.offline.neural import fitting
from trainer.offline.neural.columns import ColumnBatches
from trainer.offline.neural.fitting import FitSettings, fit


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
