"""C-SFT as a whole on a small synthetic world."""

import numpy as np
import pytest
import torch

from tests.factories.csft import make_csft_trainer, make_features, make_fusion, make_numbers, make_pairs
from trainer.csft import health
from trainer.csft.config import CsftConfig
from trainer.csft.pairs import AnchorKind, Pair
from trainer.csft.run import learn, padded
from trainer.csft.workers import Workers
from trainer.samples.rows import Impression

BASE = CsftConfig(batch_pairs=32, epochs=3, learning_rate=3e-3, time_negatives=16, bank_takes=50, bank_warmup_share=0.0)


def world(noise=1.0):
    features = make_features(noise=noise)
    fusion = make_fusion(features)
    return fusion, padded(fusion, features), make_numbers(), make_pairs(make_numbers())


def run(config=BASE, noise=1.0, **kwargs):
    torch.manual_seed(0)
    fusion, items, numbers, pairs = world(noise)
    result = learn(config, fusion, items, numbers, pairs, usable=np.arange(len(items)) > 0, **kwargs)
    return fusion, items, result


def same_group_recall(fusion, items):
    vectors = fusion.embed(items).fused_ND.numpy()[1:]
    near = np.argsort(-(vectors @ vectors.T), axis=1)[:, 1:6]
    return float((near % 6 == np.arange(60)[:, None] % 6).mean())


def test_training_brings_what_is_taken_together_close():
    untrained, items, _, _ = world(noise=4.0)
    before = same_group_recall(untrained, items)
    fusion, items, result = run(noise=4.0)
    assert result.last is not None and result.steps > 10
    assert same_group_recall(fusion, items) > before + 0.1


def assert_resumed_alike(config, checkpoint):
    states = []
    whole, _, _ = run(config, checkpoint=states.append)
    resumed, _, _ = run(config, resume_from=states[checkpoint])
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_run_that_was_cut_and_resumed_ends_in_the_same_bits():
    assert_resumed_alike(BASE, checkpoint=0)


def test_a_momentum_bank_is_part_of_the_checkpoint_too():
    assert_resumed_alike(BASE.model_copy(update={"bank_rows": "stored", "momentum": 0.9}), checkpoint=1)


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("bank", [8, 4096])
def test_the_bank_does_not_collapse_the_space_anywhere_in_the_documented_range(rate, bank):
    config = BASE.model_copy(update={"learning_rate": rate, "bank_takes": bank, "time_negatives": bank})
    fusion, items, _ = run(config)
    shape = health.geometry(fusion.embed(items).fused_ND.numpy()[1:])
    assert shape.mean_pairwise_cosine < 0.3


def trainer_of(config):
    fusion, items, numbers, pairs = world()
    return make_csft_trainer(config, fusion, items, numbers, pairs, workers=Workers()), fusion, items, pairs


def three_steps(trainer, fusion, pairs):
    """The last step's report, and of each pass through the heads whether it has a gradient."""
    graded = []
    fusion.register_forward_hook(lambda module, args, views: graded.append(views.fused_ND.requires_grad))
    reports = [trainer.step(pairs[start : start + 32]) for start in (0, 32, 64)]
    return reports[-1], graded


def test_gradient_reaches_queries_and_positives_and_not_a_stored_bank():
    config = BASE.model_copy(update={"bank_rows": "stored", "momentum": 0.9, "anchor_drop": 0.0})
    trainer, fusion, _, pairs = trainer_of(config)
    report, graded = three_steps(trainer, fusion, pairs)
    # one pass of today's heads a step, over the batch's own items; the bank's rows come from the slower encoder
    assert graded == [True, True, True]
    assert report.candidates > 32 and all(p.grad is None for p in trainer._momentum.parameters())


def test_a_stored_row_counts_the_less_the_older_it_is():
    def losses(half_life):
        config = BASE.model_copy(update={"bank_rows": "stored", "bank_age_half_life_steps": half_life})
        trainer, _, _, pairs = trainer_of(config)
        return [trainer.step(pairs[start : start + 32]).loss for start in (0, 32, 64)]

    # the second step sees rows of the first alone, stored just now; at the third they are a step old
    long, short, shorter = losses(1e6), losses(0.5), losses(0.05)
    assert long[:2] == short[:2] == shorter[:2]
    assert long[2] > short[2] > shorter[2]


def test_a_projected_bank_learns_like_the_rest_of_the_batch():
    trainer, fusion, _, pairs = trainer_of(BASE)
    report, graded = three_steps(trainer, fusion, pairs)
    assert graded == [True, True, True]
    assert report.candidates > len({pair.row.item for pair in pairs[64:96]})


def test_stored_rows_pass_through_the_noise_of_the_batch():
    noisy = BASE.model_copy(update={"bank_rows": "stored", "drop_features": 0.5, "drop_image": 0.0, "drop_text": 0.0})
    trainer, _, items, pairs = trainer_of(noisy)
    trainer.step(pairs[:32])
    stored, _ = trainer._memory.bank.newest_rows(np.array([pairs[31].row.item]), step=1)
    clean = trainer._momentum(items.select(torch.tensor([pairs[31].row.item]))).fused_ND
    assert not np.allclose(stored.reshape(3, -1)[2], clean.numpy()[0], atol=1e-3)


@pytest.mark.parametrize(("share", "hides"), [(0.0, False), (0.99, True)])
def test_attributes_are_hidden_in_training_alone_so_that_items_without_any_are_trained(share, hides):
    trainer, fusion, items, pairs = trainer_of(BASE.model_copy(update={"drop_attributes": share}))
    seen = []
    fusion.register_forward_pre_hook(lambda module, given: seen.append(given[0].words_NA))
    trainer.step(pairs[:32])
    assert len(seen) == 1 and (items.words_NA >= 0).any(1).float().mean() > 0.5
    assert bool((seen[0] >= 0).any(1).float().mean() < 0.2) is hides


def test_temperature_stays_inside_its_bounds():
    config = BASE.model_copy(update={"learning_rate": 1e-2, "min_temperature": 0.19, "max_temperature": 0.21})
    _, _, result = run(config)
    assert 0.19 - 1e-6 <= result.last.temperature <= 0.21 + 1e-6


def test_scl_trains_each_modality_with_its_own_view():
    fusion, items, result = run(BASE.as_scl().model_copy(update={"bank_takes": 50, "time_negatives": 16}))
    assert set(result.last.levels) == {"image", "title"}
    assert torch.isfinite(fusion.embed(items).fused_ND).all()


@pytest.mark.parametrize("query", [b"photo", "words"])
def test_a_search_of_a_user_without_a_past_is_learned(query):
    features = make_features()
    fusion, numbers = make_fusion(features), make_numbers()
    name = "query_image" if isinstance(query, bytes) else "query_text"
    rows = [Impression("e", 0, n, n, f"u{n}", n, (), (), False, False, label=1, **{name: query}) for n in range(1, 9)]
    pairs = [Pair(one, AnchorKind(name), (30 + one.item,), ()) for one in rows]
    config = BASE.model_copy(update={"batch_pairs": 8, "epochs": 1})
    before = fusion.embed(padded(fusion, features)).fused_ND
    result = learn(config, fusion, padded(fusion, features), numbers, pairs, usable=np.arange(61) > 0)
    assert result.last is not None and result.last.pairs == result.pairs == 8
    assert not torch.equal(before, fusion.embed(padded(fusion, features)).fused_ND)


def test_without_a_usable_pair_nothing_happens():
    fusion, items, numbers, _ = world()
    before = {name: value.clone() for name, value in fusion.state_dict().items()}
    result = learn(BASE, fusion, items, numbers, [], usable=np.arange(len(items)) > 0)
    assert result.steps == 0 and result.last is None
    assert all(torch.equal(before[n], v) for n, v in fusion.state_dict().items() if n != "means_3D")
