from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.factories.neural import ITEMS, WIDTH, more_padding, random_world, world
from trainer.metrics import auc
from trainer.networks.ciubm import CiUBM, CtrBatch
from trainer.networks.config import CiUBMConfig
from trainer.networks.id_table import IdTable
from trainer.networks.numeric import KNOTS, CrossLayers, NumericEmbedding
from trainer.offline import registry
from trainer.offline.neural.base import TRIALS, NeuralModel
from trainer.offline.neural.columns import ColumnBatches
from trainer.offline.neural.din import VectorDin, cosines
from trainer.offline.neural.fitting import FitSettings, fit
from trainer.offline.neural.sata import SataNetwork, nearest
from trainer.offline.neural.simtier import TIERS, Make, SimTierFeatures, TaobaoNetwork

NAMES = ("ciubm", "din", "din-vectors", "din-vectors-similarities", "simtier", "make", "simtier-make", "sa-ta", "dmf")
ROWS = [(4, [3, 1, 2]), (5, [6]), (6, [1, 2, 3, 4, 5]), (7, [2, 2])]


def network_of(name: str, *, dense_width: int = 3) -> nn.Module:
    """A network whose ids have rows of their own, far apart."""
    model = registry.create(name)
    assert isinstance(model, NeuralModel)
    torch.manual_seed(2)
    network = model.build({}, vector_width=WIDTH, dense_width=dense_width, seed=2)
    for table in network.modules():
        if isinstance(table, IdTable):
            for _ in range(3):
                table.admit(torch.from_numpy(world(ROWS).items.hashes_I2))
            assert table.admitted == ITEMS
            nn.init.normal_(table.embedding.weight)
    return network.eval()


def batch_of(rows: list[tuple[int, list[int]]], **over: object) -> CtrBatch:
    data = world(rows, **over)  # type: ignore[arg-type]
    return ColumnBatches(data, history_length=10).batch(np.arange(len(rows)))


def members(network: nn.Module, batch: CtrBatch) -> np.ndarray:
    with torch.no_grad():
        return network.members(batch).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_padded_history_changes_nothing(name: str) -> None:
    network, batch = network_of(name), batch_of(ROWS, without_vector=(2,))
    logits = members(network, batch)
    np.testing.assert_allclose(members(network, more_padding(batch)), logits, atol=1e-5)
    alone = replace(batch, history_BL=batch.history_BL[1:2, :1], target_B=batch.target_B[1:2])
    alone = replace(alone, dense_BF=batch.dense_BF[1:2])
    np.testing.assert_allclose(members(network, alone), logits[1:2], atol=1e-5)
    assert np.ptp(logits[:, 0]) > 1e-4, "rows differ, so that equality above says something"


@pytest.mark.parametrize("name", NAMES)
def test_padding_row_of_the_tables_is_never_read(name: str) -> None:
    network, batch = network_of(name), batch_of(ROWS)
    other = replace(batch, hashes_U2=batch.hashes_U2.clone(), vectors_UV=batch.vectors_UV.clone())
    other.hashes_U2[0] = torch.from_numpy(world(ROWS).items.hashes_I2[3])
    other.vectors_UV[0] = 1.0
    np.testing.assert_allclose(members(network, other), members(network, batch), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "din"])
def test_vectors_matter_to_all_but_din(name: str) -> None:
    network, batch = network_of(name), batch_of(ROWS)
    other = replace(batch, vectors_UV=batch.vectors_UV.roll(1, dims=1) * torch.linspace(0.5, 1.5, WIDTH))
    din = network_of("din")
    assert not np.allclose(members(network, other), members(network, batch), atol=1e-5)
    assert np.array_equal(members(din, other), members(din, batch))


@pytest.mark.parametrize("name", NAMES)
def test_each_model_learns_predicts_probabilities_and_repeats_itself(name: str) -> None:
    train, test = random_world(400), random_world(200, seed=5)
    trial = {"epochs": 2, "batch_rows": 64, "learning_rate": 1e-2}
    first, second = registry.create(name), registry.create(name)
    for model in (first, second):
        model.fit(train, test, seed=3, trial=trial)
    scores = first.predict(test)
    np.testing.assert_array_equal(scores, second.predict(test))
    assert scores.shape == (200,) and (scores > 0).all() and (scores < 1).all()
    assert isinstance(first, NeuralModel) and first.report is not None
    assert first.report.losses[-1] < first.report.losses[0]
    assert len(first.report.validation_gauc) == 2


def test_ciubm_finds_what_din_cannot_see() -> None:
    train, test = random_world(1500), random_world(400, seed=5)
    test = test.select(test.rows.encoder_N == 0)  # labels are made from version 0
    train = train.select(train.rows.encoder_N == 0)
    found = {}
    for name in ("ciubm", "din"):
        model = registry.create(name)
        model.fit(train, None, seed=1, trial={"epochs": 4, "batch_rows": 32, "learning_rate": 5e-3})
        found[name] = auc(test.rows.label_N.astype(np.int64), model.predict(test))
    assert found["ciubm"] > 0.85, found


def test_every_model_and_every_ablation_is_tuned_by_the_same_eight_trials() -> None:
    for name in (*NAMES, *registry.ABLATIONS):
        model = registry.create(name)
        assert tuple(model.trials) == TRIALS, name
        for trial in model.trials:
            chosen = {key: value for key, value in trial.items() if key not in FitSettings.__dataclass_fields__}
            model.build(chosen, vector_width=WIDTH, dense_width=3, seed=0)
    assert len(TRIALS) == 8 == len({str(trial) for trial in TRIALS})


# ---- what is particular to each ------------------------------------------------------------------------------------


def test_din_with_vectors_attends_to_content_as_in_loops() -> None:
    network, batch = network_of("din-vectors"), batch_of(ROWS, without_vector=(2,))
    assert isinstance(network, VectorDin)
    target, interest = network.vectors(batch)
    unit = network.vectors.attention
    for b in range(len(ROWS)):
        total, length = np.zeros(target.shape[1]), 0
        t = target[b]
        for at in filter(None, batch.history_BL[b].tolist()):
            length += 1
            projected = network.vectors.projection(batch.vectors_UV[at])
            h = projected / projected.norm().clamp(min=1e-12) * batch.has_vector_U[at]
            hidden = unit.activation(unit.first(torch.cat([h, t, h - t, h * t])))
            total += float(unit.second(hidden).detach()) * h.detach().numpy()
        np.testing.assert_allclose(interest[b].detach().numpy(), total / math.sqrt(length), atol=1e-4)


def test_simtier_counts_cosines_per_tier_as_in_loops() -> None:
    batch = batch_of(ROWS, without_vector=(2,))
    features = SimTierFeatures()
    with torch.no_grad():
        features.scale.fill_(1.5)
    found = features(*cosines(batch)).detach().numpy()
    data = world(ROWS, without_vector=(2,))
    for b, (target, history) in enumerate(ROWS):
        counts = [0] * TIERS
        for item in history:
            if item != 2:
                cosine = float(data.items.vectors_EIV[0, item] @ data.items.vectors_EIV[0, target])
                counts[math.floor(10 * cosine) + 10] += 1
        np.testing.assert_allclose(found[b], 1.5 * np.log1p(counts), rtol=1e-5)


def test_make_trains_content_alone_first_and_then_hands_over_interest_hidden_outputs_and_logit() -> None:
    model = Make()
    network = model.build({}, vector_width=WIDTH, dense_width=3, seed=0).eval()
    assert isinstance(network, TaobaoNetwork) and network.content is not None
    batch, content = batch_of(ROWS), network.content
    interest, one, two, logit = content.knowledge(batch)
    assert torch.equal(interest, content.vectors(batch)[1])
    np.testing.assert_allclose(logit.detach().numpy(), content.members(batch).detach().numpy())
    flowing = content.tower.norm(torch.cat(content.vectors(batch), dim=1))
    np.testing.assert_allclose(one.detach().numpy(), content.tower.layers[0](flowing).detach().numpy())
    np.testing.assert_allclose(two.detach().numpy(), content.tower.layers[1](one).detach().numpy())

    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    columns = ColumnBatches(random_world(64), history_length=5)
    fit(content, columns, None, FitSettings(epochs=1, batch_rows=16), seed=0)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("content.") for name in changed)
    model.network = network
    model.learn(columns, None, FitSettings(epochs=1, batch_rows=16), seed=0)
    now = network.state_dict()
    assert not torch.equal(now["tower.last.weight"], before["tower.last.weight"])


def test_make_is_a_longer_run_of_content_without_ranking_and_then_one_of_all() -> None:
    columns, settings = ColumnBatches(random_world(64), history_length=5), FitSettings(epochs=1, batch_rows=16)
    learned, expected = (Make().build({}, vector_width=WIDTH, dense_width=3, seed=0) for _ in range(2))
    expected.load_state_dict(learned.state_dict())
    model = Make()
    model.network = learned
    model.learn(columns, None, settings, seed=6)
    assert isinstance(expected, TaobaoNetwork) and expected.content is not None
    fit(expected.content, columns, None, replace(settings, epochs=4, group_weight=0.0), seed=6)
    fit(expected, columns, None, settings, seed=7)
    for (name, ours), theirs in zip(learned.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_sata_weighs_by_id_by_content_and_by_both_as_in_loops() -> None:
    network, batch = network_of("sa-ta"), batch_of(ROWS, without_vector=(2,))
    assert isinstance(network, SataNetwork)
    with torch.no_grad():
        network.balance_3.copy_(torch.tensor([0.7, 1.3, -0.4]))
    ids = network.id_table(batch.hashes_U2) + network.category_table(batch.category_U)
    found = network.interest(batch, ids, ids[batch.target_B]).detach().numpy()
    similarity, _ = cosines(batch)
    for b in range(len(ROWS)):
        target = ids[batch.target_B[b]]
        weights, values = [], []
        for at, cosine in zip(batch.history_BL[b].tolist(), similarity[b].tolist(), strict=True):
            if at == 0:
                continue
            affinity = float((network.query(target) @ network.key(ids[at])).detach()) / math.sqrt(len(target))
            weights.append(math.exp(0.7 * affinity + 1.3 * cosine / 0.1 - 0.4 * affinity * cosine / 0.1))
            values.append(network.value(ids[at]).detach().numpy())
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        np.testing.assert_allclose(found[b], expected, rtol=2e-3, atol=1e-4)


def test_search_unit_keeps_the_nearest_and_never_padding() -> None:
    similarity = torch.tensor([[0.1, 0.9, -0.5, 0.0], [0.2, 0.0, 0.0, 0.0]])
    known = torch.tensor([[True, True, True, False], [True, False, False, False]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert nearest(similarity, known, mask, 2).tolist() == [[True, True, False, False], [True, True, False, False]]
    assert nearest(similarity, known, mask, 3).tolist()[0] == [True, True, True, False]
    assert nearest(similarity, known, mask, 3).tolist()[1] == [True, True, False, False]
    assert torch.equal(nearest(similarity, known, mask, 9), mask)


def test_what_the_search_unit_leaves_out_and_what_has_no_vector_is_in_no_tier() -> None:
    batch = batch_of([(6, [1, 2, 3, 4, 5]), (7, [])], without_vector=(2, 3))
    network = SataNetwork(dense_width=3, kept=4).eval()
    (found,) = network.extras(batch)
    similarity, _ = cosines(batch)
    # the newest first, so that items 2 and 3 are in the middle; of those without a vector one is kept and not counted
    counts = np.zeros(TIERS)
    for cosine in similarity[0, [0, 1, 4]].tolist():
        counts[math.floor(10 * cosine) + 10] += 1
    np.testing.assert_allclose(found[0].detach().numpy(), np.log1p(counts), rtol=1e-5)
    assert not found[1].any()
    fewer = SataNetwork(dense_width=3, kept=2).eval()
    (found,) = fewer.extras(batch)
    counts = np.zeros(TIERS)
    for cosine in sorted(similarity[0, [0, 1, 4]].tolist())[-2:]:
        counts[math.floor(10 * cosine) + 10] += 1
    np.testing.assert_allclose(found[0].detach().numpy(), np.log1p(counts), rtol=1e-5)
    ids = torch.randn(len(batch.hashes_U2), network.query.in_features)
    assert not network.interest(batch, ids, ids[batch.target_B])[1].any(), "there is no history"


# ---- parts of CiUBM -------------------------------------------------------------------------------------------------


def test_numbers_are_linear_between_knots_and_constant_beyond_the_outermost() -> None:
    torch.manual_seed(0)
    embedding = NumericEmbedding(2, width=3)
    found = embedding(torch.tensor([[-16.0, 16.0], [-900.0, 7e9]]))
    assert torch.equal(found[0], found[1])
    low, between, high = (embedding(torch.tensor([[x, 0.0]]))[0] for x in (4.0, 4.5, 6.0))
    torch.testing.assert_close(between, 0.75 * low + 0.25 * high)
    assert torch.equal(low[3:], high[3:]) and not torch.equal(low[:3], high[:3])
    assert list(KNOTS) == sorted(set(KNOTS)) and 0 in KNOTS


def test_cross_layers_match_loops() -> None:
    torch.manual_seed(0)
    crosses = CrossLayers(5, layers=2, rank=2)
    x = torch.randn(6, 5)
    h = x
    for down, up in crosses.layers:
        h = x * (h @ down.weight.T @ up.weight.T + up.bias) + h
    torch.testing.assert_close(crosses(x), h)
    assert torch.equal(CrossLayers(5, layers=0, rank=2)(x), x)


def test_forgotten_ids_read_the_shared_row_in_training_only() -> None:
    config = CiUBMConfig(id_dropout=0.9, id_admit_after=1).without_content()
    network = CiUBM(config, vector_width=WIDTH, dense_width=3, seed=0)
    batch = batch_of(ROWS)
    network.id_table.admit(batch.hashes_U2)
    nn.init.normal_(network.id_table.embedding.weight)
    with torch.no_grad():
        assert torch.equal(network.eval()(batch), network(batch))
        assert not torch.equal(network.train()(batch), network.eval()(batch))
