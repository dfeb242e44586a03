"""DMF and QARM: attention over buckets of similarity, and codes in place of vectors."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.factories.neural import random_world, world
from trainer.metrics import auc
from trainer.networks.ciubm import CtrBatch, gathered
from trainer.offline.neural.columns import ColumnBatches
from trainer.offline.neural.din import cosines
from trainer.offline.neural.dmf import BUCKETS, DmfNetwork, buckets
from trainer.offline.neural.qarm import CENTROIDS, LEVELS, Qarm, QarmNetwork, ResidualKMeans

ROWS = [(4, [3, 1, 2]), (5, [6]), (6, [1, 2, 3, 4, 5]), (7, [])]


def test_decoupled_attention_adds_a_buckets_embedding_to_key_and_value_as_in_loops() -> None:
    torch.manual_seed(3)
    network = DmfNetwork(dense_width=3).eval()
    batch = ColumnBatches(world(ROWS, without_vector=(2,)), history_length=10).batch(np.arange(len(ROWS)))
    ids = torch.randn(len(batch.hashes_U2), network.query.in_features)
    with torch.no_grad():
        found = network.interest(batch, ids, ids[batch.target_B]).numpy()
        similarity, known = cosines(batch)
        for b in range(len(ROWS)):
            query, weights, values = network.query(ids[batch.target_B[b]]), [], []
            for at, cosine, is_known in zip(batch.history_BL[b], similarity[b], known[b], strict=True):
                if at == 0:
                    continue
                bucket = min(int((float(cosine) + 1) / 2 * BUCKETS), BUCKETS - 1) + 1 if is_known else 0
                key = network.key(ids[at]) + network.bucket_key.weight[bucket]
                weights.append(math.exp(float(query @ key) / math.sqrt(len(query))))
                values.append((network.value(ids[at]) + network.bucket_value.weight[bucket]).numpy())
            expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights) if weights else 0.0
            np.testing.assert_allclose(found[b], expected, rtol=1e-4, atol=1e-5)


def test_the_outermost_cosines_have_buckets_and_unknown_ones_their_own() -> None:
    cosine = torch.tensor([[-1.0, 1.0, 0.0, 0.5]])
    known = torch.tensor([[True, True, True, False]])
    assert buckets(cosine, known).tolist() == [[1, BUCKETS, BUCKETS // 2 + 1, 0]]


def test_each_level_of_codes_takes_the_nearest_centroid_of_what_the_levels_before_left() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 8)).astype(np.float32)
    books = ResidualKMeans(vectors, seed=1)
    codes = books.codes(vectors)
    assert codes.shape == (500, LEVELS)
    for row in range(20):
        rest = vectors[row].copy()
        for level in range(LEVELS):
            distance = ((books._books[level] - rest) ** 2).sum(1)
            assert codes[row, level] == distance.argmin()
            rest = rest - books._books[level][codes[row, level]]
    left = [vectors - sum(books._books[at][codes[:, at]] for at in range(level)) for level in range(LEVELS + 1)]
    sizes = [float((one**2).sum()) for one in left]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.3 * sizes[0]


def test_codes_are_those_of_the_oldest_encoder_whatever_the_row_is_served_by() -> None:
    data = random_world(300)
    model = Qarm()
    model.fit(data, None, seed=0, trial={"epochs": 1, "batch_rows": 64})
    scores = model.predict(data)
    vectors = data.items.vectors_EIV.copy()
    vectors[1:] = np.roll(vectors[1:], 1, axis=2)
    newer = replace(data.items, vectors_EIV=vectors)
    np.testing.assert_array_equal(model.predict(replace(data, items=newer)), scores)
    assert scores.shape == (300,) and len(np.unique(scores)) > 100


def test_qarm_learns_from_content_without_reading_a_vector() -> None:
    train, test = random_world(1500), random_world(400, seed=5)
    model = Qarm()
    model.fit(train, None, seed=1, trial={"epochs": 4, "batch_rows": 32, "learning_rate": 5e-3})
    assert auc(test.rows.label_N.astype(np.int64), model.predict(test)) > 0.6


def test_an_item_without_a_vector_has_no_codes() -> None:
    torch.manual_seed(1)
    network = QarmNetwork(dense_width=3).eval()
    batch = ColumnBatches(world([(4, [3, 1])]), history_length=10).batch(np.arange(1))
    batch = replace(
        batch, vectors_UV=torch.zeros(len(batch.hashes_U2), LEVELS), has_vector_U=batch.has_vector_U & False
    )
    target, interest = network.extras(batch)
    assert not target.any() and not interest.any()
    assert gathered(network.code_table.weight, batch.history_BL).any()


def test_an_item_is_the_sum_of_its_codes_of_each_level_and_the_history_is_attended() -> None:
    torch.manual_seed(1)
    network = QarmNetwork(dense_width=3).eval()
    batch = ColumnBatches(world(ROWS), history_length=10).batch(np.arange(len(ROWS)))
    codes = torch.randint(0, CENTROIDS, (len(batch.hashes_U2), LEVELS))
    batch = replace(batch, vectors_UV=codes.float(), has_vector_U=torch.arange(len(codes)) > 0)
    unit = network.code_attention
    with torch.no_grad():
        target, interest = network.extras(batch)
        table = network.code_table.weight.view(LEVELS, CENTROIDS, -1)
        own = [sum(table[level, code] for level, code in enumerate(row)) for row in codes.tolist()]
        for b in range(len(ROWS)):
            t, total = own[batch.target_B[b]], torch.zeros(len(own[1]))
            seen = [own[at] for at in batch.history_BL[b].tolist() if at]
            for h in seen:
                hidden = F.prelu(unit.first(torch.cat([h, t, h - t, h * t])), unit.activation.weight)
                total += unit.second(hidden) * h
            torch.testing.assert_close(target[b], t)
            torch.testing.assert_close(interest[b], total / max(1, len(seen)) ** 0.5, rtol=1e-4, atol=1e-5)


class SeenBatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[CtrBatch] = []

    def members(self, batch: CtrBatch) -> Tensor:
        self.seen.append(batch)
        return self.weight.expand(len(batch.target_B), 1)


class NotedQarm(Qarm):
    def build(self, settings: object, *, vector_width: int, dense_width: int, seed: int) -> nn.Module:
        return SeenBatches()


def test_books_are_of_what_was_shown_and_has_a_vector_in_the_oldest_version() -> None:
    rows = [(n % 6 + 1, [7, 8]) for n in range(12)]
    data = world(rows, labels=[n % 2 for n in range(12)], encoder=[1] * 12)
    has = data.items.has_vector_EI
    has[0, [2, 9]], has[1, [3, 8]] = False, False
    data.items.vectors_EIV[0, [2, 9]] = 0
    model = NotedQarm()
    model.fit(data, None, seed=4, trial={"epochs": 1})
    model.predict(data)
    vectors = data.items.vectors_EIV[0]
    expected = ResidualKMeans(vectors[[1, 3, 4, 5, 6]], seed=4).codes(vectors)
    assert isinstance(model.network, SeenBatches) and len(model.network.seen) == 2
    number = {tuple(hashes): item for item, hashes in enumerate(data.items.hashes_I2.tolist())}
    for batch in model.network.seen:
        items = [number[tuple(one)] for one in batch.hashes_U2.tolist()]
        assert sorted(items) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
        assert batch.vectors_UV.tolist() == expected[items].tolist()
        assert batch.has_vector_U.tolist() == has[0, items].tolist()


def test_books_depend_on_the_seed() -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    one, same, other = (ResidualKMeans(vectors, seed=seed).codes(vectors) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
