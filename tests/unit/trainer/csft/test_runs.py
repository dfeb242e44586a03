"""Whole runs of pre-training and of C-SFT against the same steps taken one by one, towers included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.factories.csft import (
    Computed,
    Gain,
    make_csft_trainer,
    make_features,
    make_fusion,
    make_numbers,
    make_pairs,
)
from trainer.csft.config import CsftConfig, PretrainConfig
from trainer.csft.pairs import HardNegatives, batches
from trainer.csft.pretrain import pretrain
from trainer.csft.run import learn, padded
from trainer.csft.trainer import CsftReport, take_counts
from trainer.csft.workers import Workers


def world() -> tuple[Any, Any, Gain]:
    features, towers = make_features(), Gain()
    fusion = make_fusion(features)
    return fusion, Computed(padded(fusion, features), towers), towers


def assert_same(one: nn.Module, other: nn.Module, away: float = 1e-5) -> None:
    """Where a gradient is next to nothing, Adam makes a step of its rounding: so the mean counts."""
    for (name, ours), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert float((ours - theirs).float().abs().mean()) < away, name


def found_by(left: Tensor, right: Tensor, temperature: float) -> Tensor:
    cosines, own = left @ right.T / temperature, torch.arange(len(left))
    return (F.cross_entropy(cosines, own) + F.cross_entropy(cosines.T, own)) / 2


def test_an_alignment_is_so_many_steps_of_items_with_both_sides() -> None:
    config = PretrainConfig(
        epochs=2, batch_items=11, temperature=0.03, missing_weight=0.7, weight_decay=0.5, learning_rate=5e-3, seed=3
    )
    fusion, items, towers = world()
    run = pretrain(config, fusion, items, towers=towers, tower_learning_rate=0.02)

    expected, same_items, same_towers = world()
    both = torch.nonzero(items.has_text_N & items.has_image_N).flatten().numpy()
    groups = [{"params": list(expected.parameters())}, {"params": [same_towers.gain]}]
    optimiser, rng = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.5), np.random.default_rng(3)
    per_epoch, step = len(both) // 11, 0
    norms: list[float] = []
    for _ in range(2):
        order, aligned = rng.permutation(both), []
        for start in range(0, 11 * per_epoch, 11):
            rate = 0.5 * (1 + np.cos(np.pi * step / (2 * per_epoch)))
            for group, peak in zip(optimiser.param_groups, (5e-3, 0.02), strict=True):
                group["lr"] = peak * rate
            batch = same_items.select(torch.from_numpy(order[start : start + 11]))
            text_hidden = torch.from_numpy(rng.random(11) < 0.5)
            whole = expected(batch)
            part = expected(batch, drop_text_N=text_hidden, drop_image_N=~text_hidden)
            aligned.append(found_by(whole.image_ND, whole.title_ND, 0.03))
            optimiser.zero_grad()
            (aligned[-1] + 0.7 * found_by(part.fused_ND, whole.fused_ND, 0.03)).backward()
            norms.append(float(nn.utils.clip_grad_norm_([*expected.parameters(), same_towers.gain], 5.0)))
            optimiser.step()
            expected.centre_on(batch, momentum=0.9)
            step += 1
    with torch.no_grad():
        expected.centre_on(same_items.select(torch.arange(1, 61)))
    assert per_epoch > 2 and max(norms) > 5, "some gradients are too long"
    assert run.alignment_loss == pytest.approx(float(torch.stack(aligned).mean().detach()), rel=1e-4)
    assert_same(fusion, expected, away=2e-4)
    assert_same(towers, same_towers, away=2e-4)
    assert towers.gain != 1 and towers.still == 1


CSFT = CsftConfig(batch_pairs=50, epochs=2, seed=9, shuffle_seconds=64.0, time_negatives=8, log_q_strength=1.0)


def test_a_run_is_one_step_for_each_batch_of_each_epoch() -> None:
    fusion, items, towers = world()
    usable = np.arange(61) % 5 > 0
    pairs = [  # every other has a hard negative of its category
        replace(pair, passed_over=pair.passed_over if n % 2 else ())
        for n, pair in enumerate(make_pairs(make_numbers())[:120])
    ]
    steps: list[tuple[CsftReport, int]] = []
    run = learn(
        CSFT, fusion, items, make_numbers(), pairs, usable=usable, towers=towers, tower_learning_rate=0.02,
        on_step=lambda report, total: steps.append((report, total)), workers=Workers(),
    )  # fmt: skip

    expected, same_items, same_towers = world()
    hashes = items.category_N2[:, 0].numpy()
    category = np.array([-1 if one < 0 else sorted(set(hashes.tolist())).index(one) for one in hashes])
    trainer = make_csft_trainer(
        CSFT, expected, same_items, make_numbers(), pairs, total_steps=6, workers=Workers(), towers=same_towers,
        tower_learning_rate=0.02, counts=take_counts([pair.take for pair in pairs]),
        hard_negatives=HardNegatives(category, usable=usable), catalogue=np.flatnonzero(usable),
    )  # fmt: skip
    rng = np.random.default_rng([9, 1])

    def epoch() -> Iterator[CsftReport]:
        for batch in batches(pairs, size=50, rng=rng, shuffle_seconds=64.0):
            report = trainer.step(batch)
            assert report is not None
            yield report

    first, second = list(epoch()), list(epoch())
    trainer.finish()
    assert [report for report, _ in steps] == [*first, *second] and {total for _, total in steps} == {6}
    assert (run.steps, run.pairs, run.last) == (6, 120, second[-1]) and len(second) == 3
    assert run.loss_share == pytest.approx(np.mean([report.loss_share for report in second]))
    assert_same(fusion, expected)
    assert_same(towers, same_towers)
