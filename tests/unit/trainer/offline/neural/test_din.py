"""The id model that the peers of CiUBM extend, part by part as in loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.factories.neural import world
from trainer.networks.ciubm import CtrBatch
from trainer.networks.config import CiUBMConfig, TreesConfig
from trainer.offline.neural.base import CATEGORIES
from trainer.offline.neural.columns import ColumnBatches
from trainer.offline.neural.din import Din, DinSimilarities, PeerNetwork, Shape, Tower, VectorDin, cosines

ROWS = [(4, [3, 1, 2]), (5, [6]), (6, [1, 2, 3, 4, 5]), (7, [])]


def batch_of(*, without_vector: tuple[int, ...] = ()) -> CtrBatch:
    return ColumnBatches(world(ROWS, without_vector=without_vector), history_length=10).batch(np.arange(len(ROWS)))


def peer(**shape: float) -> PeerNetwork:
    """Ids of the batch have rows of their own."""
    torch.manual_seed(1)
    network = PeerNetwork(dense_width=3, extra_width=0, shape=Shape(**shape))  # type: ignore[arg-type]
    for _ in range(2):
        network.id_table.admit(batch_of().hashes_U2)
    nn.init.normal_(network.id_table.embedding.weight)
    return network.eval()


def activated(layer: nn.Module, x: Tensor) -> Tensor:
    linear, slope, _ = layer  # type: ignore[misc]
    h = linear.weight @ x + linear.bias
    return torch.where(h > 0, h, slope.weight * h)


def test_a_tower_is_normalised_crossed_with_its_input_and_layered() -> None:
    torch.manual_seed(0)
    tower = Tower(6, hidden=(5, 4), cross_layers=2).eval()
    x = 3 * torch.randn(3, 6) + 1
    with torch.no_grad():
        tower.norm.weight.uniform_(0.5, 1.5)
        hidden, logits = tower.hidden(x), tower(x)
        for b in range(3):
            away = x[b] - x[b].mean()
            first = h = away / torch.sqrt((away**2).mean() + 1e-5) * tower.norm.weight + tower.norm.bias
            for down, up in tower.crosses:  # type: ignore[misc]
                h = h + first * (up.weight @ (down.weight @ h) + up.bias)
            one = activated(tower.layers[0], h)
            two = activated(tower.layers[1], one)
            torch.testing.assert_close(hidden[0][b], one)
            torch.testing.assert_close(hidden[1][b], two)
            torch.testing.assert_close(logits[b], tower.last.weight @ two + tower.last.bias)


def test_hidden_units_are_dropped_in_training_alone() -> None:
    tower = peer(dropout=0.5).tower
    x = torch.randn(1, tower.norm.normalized_shape[0])
    one, two = tower.train().hidden(x), tower.hidden(x)
    assert not torch.equal(one[0], two[0]) and 0.2 < float((one[0] == 0).float().mean()) < 0.8
    assert torch.equal(tower.eval()(x), tower(x))


def test_a_peer_reads_target_numbers_and_attended_history() -> None:
    network, batch = peer(cross_layers=1), batch_of()
    assert len(network.tower.crosses) == 1 and len(peer().tower.crosses) == 0
    assert batch.category_U is not None
    unit = network.attention
    with torch.no_grad():
        found = network.members(batch)
        ids = network.id_table(batch.hashes_U2) + network.category_table.weight[batch.category_U]
        numbers = network.numeric(batch.dense_BF)
        for b in range(len(ROWS)):
            t, total, length = ids[batch.target_B[b]], torch.zeros(ids.shape[1]), 0
            for at in filter(None, batch.history_BL[b].tolist()):
                h = ids[at]
                hidden = F.prelu(unit.first(torch.cat([h, t, h - t, h * t])), unit.activation.weight)
                total, length = total + unit.second(hidden) * h, length + 1
            expected = network.tower(torch.cat([t, numbers[b], total / math.sqrt(max(length, 1))])[None])
            torch.testing.assert_close(found[b : b + 1], expected, rtol=1e-4, atol=1e-5)


def test_categories_beyond_the_table_share_its_rows() -> None:
    network, batch = peer(), batch_of()
    assert batch.category_U is not None
    with torch.no_grad():
        found = network.members(batch)
        beyond = replace(batch, category_U=batch.category_U + 3 * CATEGORIES)
        assert torch.equal(network.members(beyond), found)
        assert not torch.allclose(network.members(replace(batch, category_U=batch.category_U + 1)), found)


def test_ids_are_forgotten_in_training_alone_and_new_ones_wait_for_their_second_batch() -> None:
    network, batch = peer(id_dropout=0.9), batch_of()
    with torch.no_grad():
        kept = network.members(batch)
        assert torch.equal(network.members(batch), kept) and torch.equal(peer().members(batch), kept)
        assert not torch.equal(network.train().members(batch), kept)
    table = PeerNetwork(dense_width=3, extra_width=0, shape=Shape()).id_table
    table.admit(batch.hashes_U2)
    assert table.admitted == 0
    table.admit(batch.hashes_U2)
    assert table.admitted == len(batch.hashes_U2) - 1, "all but padding"


def test_a_cosine_is_known_where_both_items_have_a_vector() -> None:
    data, batch = world(ROWS, without_vector=(2, 5)), batch_of(without_vector=(2, 5))
    similarity, known = cosines(batch)
    vectors = data.items.vectors_EIV[0]
    for b, (target, history) in enumerate(ROWS):
        newest_first = [*reversed(history), 0, 0, 0, 0, 0][: similarity.shape[1]]
        assert known[b].tolist() == [item not in (0, 2, 5) and target != 5 for item in newest_first]
        expected = [vectors[item] @ vectors[target] for item in newest_first]  # zero where one of them has none
        np.testing.assert_allclose(similarity[b].numpy(), expected, atol=1e-6)


def test_similarities_are_three_times_the_highest_the_mean_the_recent_and_the_newest() -> None:
    network = DinSimilarities().build({}, vector_width=8, dense_width=3, seed=0)
    assert isinstance(network, VectorDin)
    batch = batch_of(without_vector=(2,))
    found = network.extras(batch)[2].detach().numpy()
    similarity, known = (one.numpy() for one in cosines(batch))
    for b in range(len(ROWS)):
        places = np.flatnonzero(known[b])
        if not len(places):
            assert not found[b].any()
            continue
        own, weight = similarity[b, places], 0.5 ** (places / 8)
        expected = [own.max(), own.mean(), own @ weight / weight.sum(), similarity[b, 0]]
        np.testing.assert_allclose(found[b], 3 * np.array(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("settings", "crosses"), [({}, 0), ({"cross_layers": 2, "dropout": 0.1}, 2)])
def test_din_is_ciubm_on_ids_alone_without_trees_shaped_by_its_trial(settings: dict[str, float], crosses: int) -> None:
    network = Din().build(settings, vector_width=0, dense_width=3, seed=0)
    own = CiUBMConfig(cross_layers=crosses, dropout=settings.get("dropout", 0.0), trees=TreesConfig(count=0))
    assert network.config == own.without_content() and not own.without_content().uses_content
