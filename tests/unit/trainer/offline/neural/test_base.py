"""What a neural model does with a trial, a seed and its columns, and what each ablation of CiUBM leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.factories.neural import WIDTH, random_world, world
from trainer.networks.ciubm import CiUBM, CtrBatch
from trainer.networks.config import CiUBMConfig, TreesConfig
from trainer.offline import registry
from trainer.offline.neural.base import NeuralModel
from trainer.offline.neural.ciubm import Ciubm
from trainer.offline.neural.columns import ColumnBatches


class Noted(nn.Module):
    """A line through the numbers, which notes the width of the vectors it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.vector_widths: set[int] = set()

    def members(self, batch: CtrBatch) -> Tensor:
        self.vector_widths.add(batch.vectors_UV.shape[1])
        return (batch.dense_BF @ self.weight)[:, None]


class Lines(NeuralModel):
    left_out = ("age", "target ")

    def build(self, settings: Mapping[str, Any], *, vector_width: int, dense_width: int, seed: int) -> nn.Module:
        self.asked = dict(settings), vector_width, dense_width, seed
        return Noted(dense_width)


class Blind(Lines):
    content = False


STILL = {"epochs": 3, "batch_rows": 8, "learning_rate": 0.0, "weight_decay": 0.0}


def fitted(model: Lines, seed: int = 5, *, validated: bool = False) -> Noted:
    validation = random_world(12, seed=1) if validated else None
    model.fit(random_world(20), validation, seed=seed, trial=STILL | {"wide": True})
    assert isinstance(model.network, Noted)
    return model.network


def test_a_trial_is_of_settings_of_the_run_and_of_the_network() -> None:
    model = Lines()
    fitted(model)
    assert model.asked == ({"wide": True}, WIDTH, 1, 5), "of takes, age and the price of the target one is left"
    assert model.report is not None and len(model.report.losses) == 3
    assert model.report.validation_losses == model.report.validation_gauc == []
    fitted(model, validated=True)
    assert model.report is not None and len(model.report.validation_gauc) == 3


def test_the_seed_alone_decides_where_weights_begin_and_the_global_generator_stays_where_it_was() -> None:
    torch.manual_seed(77)
    before = torch.random.get_rng_state()
    weight = fitted(Lines()).weight.detach()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(weight, torch.randn(1))
    assert not torch.equal(fitted(Lines(), seed=6).weight, weight)


@pytest.mark.parametrize(("model", "width"), [(Lines(), WIDTH), (Blind(), 0)], ids=["content", "blind"])
def test_a_network_is_given_vectors_only_where_it_reads_them(model: Lines, width: int) -> None:
    network = fitted(model)
    data = random_world(9, seed=2)
    np.testing.assert_allclose(
        model.predict(data), 1 / (1 + np.exp(-data.rows.dense_NF[:, 0] * network.weight.item())), rtol=1e-6
    )
    assert network.vector_widths == {width}


# ---- ablations of CiUBM ----------------------------------------------------------------------------------------------

SIMILARITY_PARTS = ("similarity_features", "bilinear_interest", "content_in_attention", "raw_similarities")


@pytest.mark.parametrize(
    ("name", "off", "numbers"),
    [
        ("ciubm", (), 2),
        ("ciubm-without-ids", ("target_id", "id_interest", "fusion_interest"), 2),
        (
            "ciubm-without-content",
            (*SIMILARITY_PARTS, "content_interest", "fusion_interest", "target_content"),
            1,
        ),
        ("ciubm-without-fusion", ("fusion_interest",), 2),
        ("ciubm-without-similarities", SIMILARITY_PARTS, 1),
    ],
)
def test_an_ablation_leaves_out_its_parts_whatever_the_trial_says(
    name: str, off: tuple[str, ...], numbers: int
) -> None:
    model = registry.create(name)
    assert isinstance(model, Ciubm)
    trial = dict.fromkeys((*SIMILARITY_PARTS, "target_id", "target_content"), True) | {"cross_layers": 1}
    network = model.build(trial, vector_width=WIDTH, dense_width=3, seed=0)
    assert network.config == CiUBMConfig(**(trial | dict.fromkeys(off, False)))
    data = world([(1, [2])], names=("takes", "cosine mean", "has vector"))
    assert ColumnBatches(data, history_length=5, left_out=model.left_out).dense_NF.shape == (1, numbers)


def test_plain_heads_have_no_crosses_and_networks_alone_no_trees() -> None:
    trial = {"cross_layers": 3, "trees": {"count": 5}}
    plain, alone = (registry.create(f"ciubm-{name}") for name in ("plain-head", "without-trees"))
    assert isinstance(plain, Ciubm) and isinstance(alone, Ciubm)
    made = [one.build(trial, vector_width=WIDTH, dense_width=3, seed=0) for one in (plain, alone)]
    assert all(isinstance(one, CiUBM) for one in made)
    assert [one.config.cross_layers for one in made] == [0, 3]
    assert [one.config.trees.count for one in made] == [5, 0] and made[1].config.trees == TreesConfig(count=0)
