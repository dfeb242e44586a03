"""The anchors, weights and hard negatives of a batch, number by number."""

from __future__ import annotations

import math

import numpy as np
import pytest

from schemas.behaviours import BehaviourKind
from tests.factories.csft import make_csft_trainer, make_features, make_fusion, make_numbers, make_pairs
from trainer.csft.config import CsftConfig
from trainer.csft.pair_batches import PairBatch, pair_batch
from trainer.csft.pairs import AnchorKind, HardNegatives, Pair, batches
from trainer.csft.run import padded
from trainer.csft.trainer import take_counts
from trainer.csft.workers import Workers
from trainer.negatives.sampler import ContrastivePlan
from trainer.samples.rows import Impression, Take

NOBODY = np.zeros(0, np.int64)
PLAN = ContrastivePlan(NOBODY, NOBODY, NOBODY, np.zeros((0, 0), bool), np.zeros(0, np.float32), np.zeros(0, np.float32))


def pair(
    anchor: tuple[int, ...],
    kind: BehaviourKind = BehaviourKind.PURCHASE,
    *,
    by: AnchorKind = AnchorKind.TRIGGER_ITEM,
    passed_over: tuple[int, ...] = (),
) -> Pair:
    row = Impression("e", 0, 0, 0, "u", 20, anchor, (0,) * len(anchor), False, False, label=1, taken_as=kind)
    return Pair(row, by, anchor, passed_over)


def batch_of(*pairs: Pair, **settings: object) -> PairBatch:
    hard = HardNegatives(np.full(31, -1), usable=np.ones(31, bool))
    config = CsftConfig.model_validate({"anchor_drop": 0.0, "anchor_items": 3, "anchor_decay": 0.5} | settings)
    return pair_batch(pairs, PLAN, config, hard, np.random.default_rng(0))


def test_the_newest_items_are_the_anchor_newest_first_and_weigh_most() -> None:
    batch = batch_of(pair((1, 2, 3, 4, 5)), pair((6, 7)))
    assert batch.anchors_PA.tolist() == [[5, 4, 3], [7, 6, 0]]
    assert batch.anchor_weights_PA.tolist() == [[1.0, 0.5, 0.25], [1.0, 0.5, 0.0]]


def test_a_shortened_anchor_is_one_of_the_newest_items_with_full_weight() -> None:
    batch = batch_of(*[pair((1, 2, 3, 4, 5))] * 40, anchor_drop=0.999)
    assert set(batch.anchors_PA[:, 0].tolist()) == {3, 4, 5} and not batch.anchors_PA[:, 1:].any()
    assert batch.anchor_weights_PA[:, 0].tolist() == [1.0] * 40


def test_views_weights_and_hard_negatives_are_those_of_each_pair() -> None:
    batch = batch_of(
        pair((25,), BehaviourKind.CLICK, by=AnchorKind.QUERY_IMAGE),
        pair((26,), BehaviourKind.CART, by=AnchorKind.QUERY_TEXT, passed_over=(9,)),
        pair((1,)),
    )
    assert batch.anchor_views_P.tolist() == [0, 1, 2]
    assert batch.weights_P.tolist() == [0.25, 0.5, 1.0]
    assert batch.hard_P.tolist() == [0, 9, 0]
    assert not batch_of(pair((1,), passed_over=(9,)), hard_negatives=False).hard_P.any()


def at(second: int, offset: int) -> Pair:
    row = Impression("e", 0, offset, second, "u", 1, (), (), False, False, label=1)
    return Pair(row, AnchorKind.QUERY_TEXT, (1,), ())


def test_a_pass_shuffles_inside_blocks_of_time_and_gives_each_pair_once() -> None:
    pairs = [at(second, n) for n, second in enumerate((0, 9, 3, 10, 19, 12, 11, 25, 20, 99))]

    def one_pass(seed: int) -> list[list[int]]:
        made = batches(pairs, size=4, rng=np.random.default_rng(seed), shuffle_seconds=10)
        return [[pair.row.offset for pair in batch] for batch in made]

    orders = set()
    for seed in range(20):
        found = one_pass(seed)
        assert [len(batch) for batch in found] == [4, 4, 2]
        flat = [offset for batch in found for offset in batch]
        assert [set(flat[:3]), set(flat[3:7]), set(flat[7:9]), flat[9]] == [{0, 1, 2}, {3, 4, 5, 6}, {7, 8}, 9]
        orders.add(tuple(flat))
    assert len(orders) > 10 and one_pass(3) == one_pass(3)
    assert list(batches([], size=4, rng=np.random.default_rng(0), shuffle_seconds=10)) == []


def test_the_step_size_rises_over_the_warm_up_and_falls_as_a_cosine_to_its_floor() -> None:
    features = make_features()
    fusion, numbers = make_fusion(features), make_numbers()
    config = CsftConfig(learning_rate=0.01, warmup_share=0.2, learn_temperature=False)
    trainer = make_csft_trainer(config, fusion, padded(fusion, features), numbers, make_pairs(numbers)[:4])
    rates = []
    for step in (0, 1, 2, 6, 10, 30):
        trainer.steps = step
        trainer._set_learning_rate()
        rates.append(trainer._optimiser.param_groups[0]["lr"])
    half = 0.5 * (1 + math.cos(math.pi * 0.5))
    np.testing.assert_allclose(rates, [0.005, 0.01, 0.01, 0.01 * half, 0.0002, 0.0002])


@pytest.mark.parametrize("rows", [0, 1, 5, 7])
def test_the_shares_of_workers_are_all_rows_once_and_as_alike_as_can_be(rows: int) -> None:
    shares = [list(range(rows))[Workers(rank, 3).share_of(rows)] for rank in range(3)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_takes_of_a_closed_span_are_counted_without_decay() -> None:
    counts = take_counts([Take(0, "u", 1), Take(10**9, "u", 2), Take(10**9, "v", 1)])
    shares = np.exp(counts.log_q(np.array([1, 2])))
    np.testing.assert_allclose(shares, np.array([2.15, 1.15]) / 3.15, rtol=1e-3)
