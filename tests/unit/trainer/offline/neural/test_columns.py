from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.factories.neural import ITEMS, random_world, world
from trainer.offline.data import Histories, history_matrix
from trainer.offline.neural.columns import ColumnBatches
from trainer.offline.neural.fitting import ranking_loss


def test_a_batch_says_of_each_row_what_its_columns_say() -> None:
    data = random_world(40)
    batches = ColumnBatches(data, history_length=4)
    rows = np.array([31, 2, 17, 5])
    batch = batches.batch(rows)
    items, expected = data.items, history_matrix(data, rows, 4)
    assert tuple(batch.history_BL.shape) == expected.shape
    for place, row in enumerate(rows):
        version, target = data.rows.encoder_N[row], data.rows.item_N[row]
        seen = batch.target_B[place]
        assert batch.hashes_U2[seen].tolist() == items.hashes_I2[target].tolist()
        np.testing.assert_array_equal(batch.vectors_UV[seen].numpy(), items.vectors_EIV[version, target])
        for column, item in enumerate(expected[place]):
            at = batch.history_BL[place, column]
            assert (int(at) == 0) == (item == 0)
            assert batch.hashes_U2[at].tolist() == items.hashes_I2[item].tolist()
            np.testing.assert_array_equal(batch.vectors_UV[at].numpy(), items.vectors_EIV[version if item else 0, item])
        assert batch.dense_BF[place].tolist() == [*data.rows.dense_NF[row], *items.attributes_IA[target]]


def test_two_encoder_versions_in_one_batch_never_mix_and_each_item_stands_once_per_version() -> None:
    data = world([(1, [2]), (1, [2]), (3, [1])], encoder=[0, 1, 1])
    batch = ColumnBatches(data, history_length=5).batch(np.arange(3))
    assert len(batch.hashes_U2) == 1 + 2 + 3
    assert batch.target_B[0] != batch.target_B[1] and batch.target_B[1] == batch.history_BL[2, 0]
    np.testing.assert_array_equal(batch.vectors_UV[batch.target_B[1]].numpy(), data.items.vectors_EIV[1, 1])


def test_scratch_is_clean_again_after_each_batch() -> None:
    batches = ColumnBatches(random_world(30), history_length=5)
    first = batches.batch(np.arange(10))
    batches.batch(np.arange(10, 30))
    again = batches.batch(np.arange(10))
    assert torch.equal(first.history_BL, again.history_BL) and torch.equal(first.hashes_U2, again.hashes_U2)


def test_an_epoch_names_every_row_once_and_differs_from_the_next() -> None:
    batches = ColumnBatches(random_world(101), history_length=5)
    rng = np.random.default_rng(0)
    first, second = (np.concatenate(list(batches.epoch(16, rng))) for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(101))
    assert first.tolist() != second.tolist()
    assert sorted(np.concatenate(list(batches.in_order(7))).tolist()) == list(range(101))


def test_what_one_person_was_shown_at_one_time_shares_a_group() -> None:
    data = world([(n % ITEMS + 1, [1]) for n in range(6)], users=[4, 9, 4, 9, 9, 5])
    batches = ColumnBatches(data, history_length=5)
    groups = batches.groups(np.arange(6)).tolist()
    assert groups[0] == groups[2] and groups[1] == groups[3] == groups[4] and len(set(groups)) == 3


def test_left_out_features_are_not_in_the_batch() -> None:
    data = world([(1, [2]), (2, [1])], names=("takes", "cosine mean", "cosine known"))
    assert ColumnBatches(data, history_length=5, left_out=("cosine",)).batch(np.arange(2)).dense_BF.shape == (2, 2)
    assert ColumnBatches(data, history_length=5).batch(np.arange(2)).dense_BF.shape == (2, 4)


def test_no_rows_make_no_batches() -> None:
    batches = ColumnBatches(random_world(5).select(np.zeros(0, np.int64)), history_length=5)
    assert not list(batches.epoch(4, np.random.default_rng(0))) and not list(batches.in_order(4))


def test_ranking_loss_matches_loops() -> None:
    torch.manual_seed(1)
    logits, labels = torch.randn(7, 2), torch.tensor([1.0, 0, 1, 0, 0, 0, 1])
    groups = [0, 0, 1, 1, 1, 2, 1]
    total = 0.0
    for k in range(2):
        for i in range(7):
            if labels[i]:
                group = [float(logits[j, k].exp()) for j in range(7) if groups[j] == groups[i]]
                total -= float(logits[i, k]) - float(np.log(sum(group)))
    found = ranking_loss(logits, labels, torch.tensor(groups))
    np.testing.assert_allclose(float(found), total / (3 * 2), rtol=1e-5)


def test_batches_of_an_epoch_hold_rows_of_about_one_length_of_history() -> None:
    data = random_world(160)
    batches = ColumnBatches(data, history_length=8)
    lengths = [batches._lengths_N[rows] for rows in batches.epoch(16, np.random.default_rng(0))]
    spans = sorted((int(one.min()), int(one.max())) for one in lengths)
    assert len({length for span in spans for length in span}) > 2
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_an_epoch_is_of_whole_batches_in_random_order_that_hold_whole_groups() -> None:
    rows = [(n % ITEMS + 1, [1] * (1 + n // 4 % 5)) for n in range(96)]
    data = world(rows, users=[n // 4 for n in range(96)])
    batches = ColumnBatches(data, history_length=8)
    epoch = list(batches.epoch(8, np.random.default_rng(0)))
    assert [len(one) for one in epoch] == [8] * 12
    # of one length are 16 or 20 rows, so that no batch ends inside a group of four
    assert all(np.bincount(data.rows.user_N[one])[data.rows.user_N[one]].tolist() == [4] * 8 for one in epoch)
    lengths = [int(batches.data.rows.history_stop_N[one[0]] - data.rows.history_start_N[one[0]]) for one in epoch]
    assert lengths != sorted(lengths), "the short histories do not come first"


@pytest.mark.parametrize(("rows", "sizes"), [(33, [1, 16, 16]), (32, [16, 16]), (1, [1])])
def test_the_last_batch_holds_what_is_left(rows: int, sizes: list[int]) -> None:
    batches = ColumnBatches(random_world(rows), history_length=5)
    for pass_ in (batches.epoch(16, np.random.default_rng(0)), batches.in_order(16)):
        assert sorted(len(one) for one in pass_) == sizes


def test_rows_in_order_rise_by_what_is_read_of_their_histories() -> None:
    batches = ColumnBatches(world([(1, [2] * 9), (1, [2] * 3), (1, [2] * 5), (1, [])]), history_length=5)
    assert np.concatenate(list(batches.in_order(2))).tolist() == [3, 1, 0, 2], "nine and five are both cut to five"
    assert np.concatenate(list(batches.in_order(2, np.array([2, 0])))).tolist() == [2, 0]
    again = world([(1, [2, 3, 2, 3, 2]), (1, [4, 5, 6])])
    again = replace(again, histories=Histories.of(np.array([0] * 5 + [1] * 3), again.histories.item_T, np.arange(8)))
    assert np.concatenate(list(ColumnBatches(again, history_length=5).in_order(2))).tolist() == [0, 1], "two items"


def test_padding_is_one_row_whatever_version_a_row_is_of() -> None:
    batch = ColumnBatches(world([(1, [2]), (3, [1, 2])], encoder=[1, 0]), history_length=5).batch(np.arange(2))
    assert batch.history_BL[0, 1] == 0 and batch.hashes_U2[0].tolist() == [0, 0]
    assert (batch.history_BL == 0).tolist() == [[False, True], [False, False]]


def test_groups_of_a_batch_are_numbered_from_nought() -> None:
    data = world([(1, [2])] * 4, users=[7, 3, 7, 9])
    batches = ColumnBatches(data, history_length=5)
    assert batches.groups(np.array([3])).tolist() == [0]
    assert batches.groups(np.array([2, 3, 0])).tolist() == [0, 1, 0]


def test_without_content_vectors_have_no_width() -> None:
    data = random_world(6)
    batch = ColumnBatches(data, history_length=5, content=False).batch(np.arange(6))
    whole = ColumnBatches(data, history_length=5).batch(np.arange(6))
    assert batch.vectors_UV.shape == (len(whole.vectors_UV), 0) and torch.equal(batch.hashes_U2, whole.hashes_U2)
