"""The anchors, weights and hard negatives of a batch, number by number."""

from __future__ import annotations

import numpy as np

from schemas.behaviours import BehaviourKind
from trainer.csft.config import CsftConfig
from trainer.csft.pair_batches import PairBatch, pair_batch
from trainer.csft.pairs import AnchorKind, HardNegatives, Pair
from trainer.negatives.sampler import ContrastivePlan
from trainer.samples.rows import Impression

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
