"""CiUBM of the comparison: the columns of the stream, and trees fitted on its newest rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.factories.neural import random_world
from trainer.networks.ciubm import CiUBM
from trainer.networks.trees import fit_trees
from trainer.offline.neural.ciubm import Ciubm, WithoutTrees
from trainer.offline.neural.columns import ColumnBatches

TREES = {"count": 8, "depth": 3, "leaves": 6, "leaf_rows": 5, "rows": 600, "first_rows": 600}
TRIAL: dict[str, Any] = {"epochs": 1, "batch_rows": 64}


def fitted(model: Ciubm, seed: int = 3, **trees: int) -> tuple[Ciubm, CiUBM]:
    trial = TRIAL if isinstance(model, WithoutTrees) else TRIAL | {"trees": TREES | trees}
    model.fit(random_world(800), None, seed=seed, trial=trial)
    assert isinstance(model.network, CiUBM)
    return model, model.network


def test_trees_learn_from_the_newest_rows_and_share_the_answer_with_the_same_network() -> None:
    (model, network), (alone, bare) = fitted(Ciubm()), fitted(WithoutTrees())
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), bare.parameters(), strict=True))
    train, test = random_world(800), random_world(200, seed=5)
    columns = ColumnBatches(train, history_length=50, left_out=Ciubm.left_out)
    with torch.no_grad():
        numbers = network.network(columns.batch(np.arange(200, 800)))[1].numpy()
    labels = train.rows.label_N[200:].astype(np.float32)
    forest = fit_trees(network.config.trees, numbers, labels, seed=3)
    assert forest is not None and network.trees.fitted
    np.testing.assert_allclose(network.trees.trimmed().value_TL.numpy(), forest.value_TL, atol=1e-6)
    asked = ColumnBatches(test, history_length=50, left_out=Ciubm.left_out).batch(np.arange(200))
    with torch.no_grad():
        logits, numbers, _ = bare.network(asked)
        expected = torch.sigmoid((0.5 * logits + 0.5 * network.trees(numbers)).double()).numpy()
    np.testing.assert_allclose(model.predict(test), expected, atol=1e-6)
    np.testing.assert_allclose(alone.predict(test), torch.sigmoid(logits.double()).numpy(), atol=1e-6)


def test_rows_of_a_folder_are_in_any_order_and_the_newest_are_those_of_the_last_seconds() -> None:
    _, network = fitted(Ciubm())
    order = np.random.default_rng(0).permutation(800)
    shuffled = Ciubm()
    shuffled.fit(random_world(800).select(order), None, seed=3, trial=TRIAL | {"trees": TREES})
    assert isinstance(shuffled.network, CiUBM)
    assert torch.equal(shuffled.network.trees.feature_TN, network.trees.feature_TN)
    torch.testing.assert_close(shuffled.network.trees.value_TL, network.trees.value_TL)


@pytest.mark.parametrize("labels", [0, 1])
def test_without_both_labels_the_network_answers_alone(labels: int) -> None:
    train = random_world(800)
    train.rows.label_N[:] = labels
    model = Ciubm()
    model.fit(train, None, seed=0, trial=TRIAL | {"trees": TREES})
    assert isinstance(model.network, CiUBM) and not model.network.trees.fitted
