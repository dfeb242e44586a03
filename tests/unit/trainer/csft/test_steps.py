"""One step of C-SFT: rates, bounds, what enters the bank and when it is drawn from, and what follows a step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from encoders.fusion import FusionInput
from tests.factories.csft import (
    Computed,
    Gain,
    make_csft_trainer,
    make_features,
    make_fusion,
    make_numbers,
    make_pairs,
)
from trainer.csft.config import CsftConfig
from trainer.csft.pairs import Pair
from trainer.csft.run import padded
from trainer.csft.trainer import CsftTrainer
from trainer.csft.workers import Workers
from trainer.networks.losses import NonFiniteLoss

QUIET = CsftConfig(
    batch_pairs=16, drop_image=0.0, drop_text=0.0, drop_features=0.0, drop_attributes=0.0, anchor_drop=0.0,
    hard_negatives=False, warmup_share=0.3, weight_decay=0.2, learning_rate=3e-3, temperature_learning_rate=0.04,
)  # fmt: skip


def changed(**settings: Any) -> CsftConfig:
    return CsftConfig.model_validate(QUIET.model_dump() | settings)


def trainer_of(config: CsftConfig, **more: Any) -> tuple[CsftTrainer, list[Pair]]:
    features = make_features()
    fusion = make_fusion(features)
    items = more.pop("items", None) or padded(fusion, features)
    pairs = make_pairs(make_numbers())
    return make_csft_trainer(config, fusion, items, make_numbers(), pairs, workers=Workers(), **more), pairs


def with_towers() -> tuple[CsftTrainer, list[Pair], Gain]:
    features, towers = make_features(), Gain()
    items = Computed(padded(make_fusion(features), features), towers)
    trainer, pairs = trainer_of(QUIET, items=items, towers=towers, tower_learning_rate=0.02)
    return trainer, pairs, towers


@pytest.mark.parametrize(
    ("at", "rate"),
    [
        (0, 1 / 3),
        (1, 2 / 3),
        (2, 1.0),
        (3, 1.0),
        (5, 0.5 * (1 + math.cos(math.pi * 2 / 7))),
        (9, 0.5 * (1 + math.cos(math.pi * 6 / 7))),
        (10, 0.02),
        (14, 0.02),
    ],
)
def test_a_step_is_adams_at_a_rate_that_rises_to_its_peak_and_falls_as_a_cosine(at: int, rate: float) -> None:
    (trainer, pairs, towers), (twin, _, same_towers) = with_towers(), with_towers()
    for one in (trainer, twin):
        one.restore({**one.snapshot(), "steps": at})
    report = trainer.step(pairs[:16])
    assert report is not None and report.step == trainer.steps == at + 1
    batch = twin._plan(pairs[:16])
    assert batch is not None
    _, loss = twin._loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    weights = list(twin.fusion.parameters())
    groups = [
        {"params": weights, "lr": 3e-3 * rate, "weight_decay": 0.2},
        {"params": [twin.log_temperature], "lr": 0.04 * rate, "weight_decay": 0.0},
        {"params": [same_towers.gain], "lr": 0.02 * rate, "weight_decay": 0.2},
    ]
    nn.utils.clip_grad_norm_([*weights, same_towers.gain], 5.0)
    torch.optim.AdamW(groups).step()
    for ours, theirs in zip(trainer.fusion.parameters(), weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trainer.log_temperature, twin.log_temperature)
    torch.testing.assert_close(towers.gain, same_towers.gain)
    assert trainer.log_temperature.item() != pytest.approx(math.log(0.1)) and towers.still == 1


def test_gradients_are_cut_to_their_bound_together_with_those_of_the_towers() -> None:
    features, towers = make_features(), Gain()
    items = Computed(padded(make_fusion(features), features), towers)
    trainer, pairs = trainer_of(changed(max_gradient_norm=1e-3), items=items, towers=towers)
    for start in (0, 16):  # the gradients of one step are not added to those of the next
        trainer.step(pairs[start : start + 16])
    norms = [p.grad.norm() for p in (*trainer.fusion.parameters(), towers.gain) if p.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_temperature_is_learned_where_that_is_asked_and_inside_its_bounds() -> None:
    fixed, pairs = trainer_of(changed(learn_temperature=False))
    fixed.step(pairs[:16])
    assert fixed.log_temperature.item() == pytest.approx(math.log(0.1))
    bound, _ = trainer_of(changed(min_temperature=0.0999, max_temperature=0.1001, temperature_learning_rate=0.5))
    bound.step(pairs[:16])
    assert math.log(0.0999) - 1e-6 <= bound.log_temperature.item() <= math.log(0.1001) + 1e-6
    with torch.no_grad():
        bound.log_temperature.fill_(3.0)
    assert bound.temperature.item() == pytest.approx(0.1001)


def test_what_is_hidden_depends_on_the_seed() -> None:
    found = []
    for seed in (1, 1, 2):
        trainer, pairs = trainer_of(changed(seed=seed, drop_features=0.5))
        report = trainer.step(pairs[:16])
        assert report is not None
        found.append(report.loss)
    assert found[0] == found[1] != found[2]


def test_a_picture_or_a_text_is_hidden_where_the_other_is_there_and_features_are_scaled_up_for_those_hidden() -> None:
    trainer, pairs = trainer_of(changed(seed=4, drop_image=0.3, drop_text=0.25, drop_attributes=0.5, drop_features=0.5))
    seen: list[tuple[FusionInput, dict[str, Tensor]]] = []

    def note(_: nn.Module, given: tuple[FusionInput], hidden: dict[str, Tensor]) -> None:
        seen.append((given[0], hidden))

    trainer.fusion.register_forward_pre_hook(note, with_kwargs=True)
    trainer.step(pairs[:40])
    ((given, hidden),) = seen
    drawn = torch.rand(len(given), generator=torch.Generator().manual_seed(4))
    both = given.has_text_N & given.has_image_N
    assert torch.equal(hidden["drop_image_N"], both & (drawn < 0.3))
    assert torch.equal(hidden["drop_text_N"], both & (drawn > 0.75))
    for alone in (given.has_text_N & ~both, given.has_image_N & ~both):
        assert (drawn[alone] < 0.3).any() and (drawn[alone] > 0.75).any(), "what is alone could have been hidden"
    items = padded(make_fusion(make_features()), make_features())
    for scaled, rows in ((given.text_NR, items.text_NR), (given.image_NR, items.image_NR)):
        known = {round(float(value), 4) for value in (2 * rows).flatten()}
        assert {round(float(value), 4) for value in scaled.flatten()} <= known | {0.0, -0.0}
    kept, bare = (given.words_NA >= 0).any(1), (given.words_NA == -1).all(1)
    assert (kept | bare).all() and 0.2 < bare.float().mean() < 0.8


def test_a_loss_that_is_no_number_changes_no_weight() -> None:
    trainer, pairs = trainer_of(QUIET)
    trainer.step(pairs[:16])
    before = [p.clone() for p in trainer.fusion.parameters()]
    with torch.no_grad():
        trainer.log_temperature.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="loss is nan at step 1; lower the learning rate"):
        trainer.step(pairs[16:32])
    assert all(torch.equal(one, other) for one, other in zip(trainer.fusion.parameters(), before, strict=True))
    assert trainer.steps == 1


def test_without_masks_earlier_takes_of_a_user_are_negatives() -> None:
    losses = []
    for masks in (True, False):
        trainer, pairs = trainer_of(changed(masks=masks))
        report = trainer.step([pair for pair in pairs if pair.row.user_id in ("u0", "u1", "u2")])
        assert report is not None
        losses.append(report.loss)
    assert losses[1] > losses[0] + 1e-3


# ---- the bank --------------------------------------------------------------------------------------------------------


def candidates(config: CsftConfig, steps: int, size: int = 12) -> tuple[list[int], list[list[Pair]]]:
    trainer, pairs = trainer_of(config)
    parts = [pairs[start : start + size] for start in range(0, size * steps, size)]
    reports = [trainer.step(part) for part in parts]
    return [report.candidates for report in reports if report is not None], parts


def items_of(*pairs: Pair) -> int:
    return len({pair.row.item for pair in pairs})


@pytest.mark.parametrize("of", ["space_negatives", "time_negatives"])
def test_memory_is_drawn_from_after_its_share_of_the_steps(of: str) -> None:
    found, parts = candidates(changed(**{of: 60}, window_takes=1_000, bank_warmup_share=0.2), 3)
    alone = [items_of(*part) for part in parts]
    assert found[:2] == alone[:2] and found[2] > alone[2]


def test_a_take_leaves_the_bank_by_its_steps() -> None:
    found, (one, two, three, four) = candidates(changed(time_negatives=200, bank_warmup_share=0.0, bank_steps=1), 4)
    # the newest take is still in the window, and moves on with the first of the next step
    assert found[1] == items_of(*one[:-1], *two)
    assert found[3] == items_of(one[-1], *two, *three[:-1], *four)


def test_a_take_leaves_the_bank_by_its_age() -> None:
    found, (one, two, three, four) = candidates(
        changed(time_negatives=200, bank_warmup_share=0.0, bank_seconds=20.0), 4
    )
    now = max(pair.row.second for pair in four)
    young = [pair for pair in (*one, *two, *three[:-1]) if pair.row.second >= now - 20]
    assert len(young) < 24 and found[3] == items_of(*young, *four)


def test_a_bank_of_stored_rows_keeps_what_has_a_vector_as_the_slower_encoder_sees_it() -> None:
    config = changed(time_negatives=60, bank_rows="stored", momentum=0.75, bank_takes=100)
    trainer, pairs = trainer_of(config)
    before = {name: value.clone() for name, value in trainer.fusion.state_dict().items()}
    pairs[3].row.item = 61  # an item beyond the table
    make_numbers().number("i61")
    trainer.step(pairs[:12])
    state, now = trainer.snapshot(), trainer.fusion.state_dict()
    for name, slow in state["momentum"].items():
        if slow.is_floating_point():
            torch.testing.assert_close(slow, 0.75 * before[name] + 0.25 * now[name])
    stored = state["memory"]
    expected = [pair.row.item for pair in pairs[:12] if pair.row.item != 61]
    assert stored["items"][:12].tolist() == [*expected, 0] and stored["steps"][:11].tolist() == [1] * 11
    slower = make_fusion(make_features())
    slower.load_state_dict(state["momentum"])
    views = slower.embed(padded(slower, make_features()))
    rows = torch.stack([views.image_ND, views.title_ND, views.fused_ND], 1)[expected].flatten(1)
    np.testing.assert_allclose(stored["vectors"][:11], rows.numpy(), atol=1e-5)


# ---- centring --------------------------------------------------------------------------------------------------------


def test_a_step_moves_the_means_by_its_share_and_the_end_is_centred_on_all_items() -> None:
    far, pairs = trainer_of(changed(centre_momentum=0.0))
    near, _ = trainer_of(changed(centre_momentum=0.9))
    still, _ = trainer_of(changed(centred=False))
    before = far.fusion.means_3D.clone()
    for trainer in (far, near, still):
        trainer.step(pairs[:16])
    torch.testing.assert_close(near.fusion.means_3D, 0.9 * before + 0.1 * far.fusion.means_3D)
    assert torch.equal(still.fusion.means_3D, before) and not torch.allclose(far.fusion.means_3D, before)
    items = padded(near.fusion, make_features())
    near.finish()
    found = near.fusion.means_3D.clone()
    near.fusion.centre_on(items.select(torch.arange(1, 61)))
    torch.testing.assert_close(found, near.fusion.means_3D)


class Asked(Computed):
    """Items that note which rows of them are wanted."""

    def __init__(self) -> None:
        super().__init__(padded(make_fusion(make_features()), make_features()), Gain())
        self.rows: list[list[int]] = []

    def select(self, rows: Tensor) -> FusionInput:
        self.rows.append(rows.tolist())
        return super().select(rows)


def test_a_step_centres_on_a_few_items_of_the_catalogue_drawn_anew() -> None:
    items = Asked()
    trainer, pairs = trainer_of(QUIET, items=items, catalogue=np.arange(1, 61, 3))
    for start in (0, 16):
        trainer.step(pairs[start : start + 16])
    _, first, _, second = items.rows
    assert len(first) == len(second) == 256 and first != second
    assert set(first) | set(second) <= set(range(1, 61, 3)) and len(set(first)) > 10


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bank", ["projected", "stored"])
def test_a_snapshot_stays_as_it_was_and_the_steps_after_it_can_be_taken_again(bank: str) -> None:
    features, towers = make_features(), Gain()
    items = Computed(padded(make_fusion(features), features), towers)
    config = changed(time_negatives=6, bank_rows=bank, momentum=0.5, drop_features=0.2, bank_warmup_share=0.0)
    trainer, pairs = trainer_of(config, items=items, towers=towers, tower_learning_rate=0.02)

    def two_steps() -> list[Any]:
        reports = [trainer.step(pairs[start : start + 16]) for start in (40, 56)]
        return [*reports, float(towers.gain.detach()), float(trainer.log_temperature.detach())]

    for start in (0, 16):
        trainer.step(pairs[start : start + 16])
    kept = trainer.snapshot()
    assert kept["towers"].keys() == {"gain"}
    found = two_steps()
    trainer.restore(kept)
    assert trainer.steps == 2 and two_steps() == found
    trainer.restore(kept)
    assert two_steps() == found
