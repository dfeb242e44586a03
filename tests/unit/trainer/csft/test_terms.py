"""The loss of C-SFT and of the alignment term by term, and what a run centres on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.factories.csft import make_csft_trainer, make_features, make_fusion, make_numbers, make_pairs
from trainer.csft import health
from trainer.csft.config import CsftConfig, PretrainConfig
from trainer.csft.pairs import AnchorKind
from trainer.csft.pretrain import pretrain
from trainer.csft.run import _category_numbers, learn, padded, with_padding
from trainer.csft.workers import Workers

QUIET = CsftConfig(
    batch_pairs=12, drop_image=0.0, drop_text=0.0, drop_features=0.0, drop_attributes=0.0, anchor_drop=0.0,
    image_level=0.3, title_level=0.2, anchor_items=2, temperature=0.2, log_q_strength=0.4,
)  # fmt: skip


def world() -> tuple[Any, Any, Any]:
    features = make_features()
    fusion = make_fusion(features)
    return fusion, padded(fusion, features), features


def unit(row: Any) -> Any:
    return row / np.linalg.norm(row)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"anchor_view": "same"},
        {"hard_loss": "triplet", "triplet_weight": 0.7, "triplet_margin": 0.4},
        {"hard_negatives": False, "nested_level": 0.0, "image_level": 0.0},
        {"fused_level": 0.0, "max_logit_bytes": 1 << 16},
        {"bank_rows": "stored", "time_negatives": 16, "bank_warmup_share": 0.0, "bank_age_half_life_steps": 0.8},
    ],
    ids=["fused", "same", "triplet", "plain", "sides", "stored"],
)
def test_each_level_is_the_mean_over_its_pairs_by_their_weights(settings: dict[str, Any]) -> None:
    config = CsftConfig.model_validate(QUIET.model_dump() | settings)
    fusion, items, _ = world()
    every = make_pairs(make_numbers())
    pairs = [replace(pair, anchor_kind=list(AnchorKind)[n % 3]) for n, pair in enumerate(every[100:112])]
    pairs[3] = replace(pairs[3], anchor=(4,))  # a picture that asks, and is not there
    for place, kind in enumerate(("click", "cart", "purchase")):
        pairs[place].row.taken_as = type(pairs[0].kind)(kind)
    trainer = make_csft_trainer(config, fusion, items, make_numbers(), pairs, workers=Workers())
    for start in (60, 72) if config.time_negatives else ():  # the bank holds rows of two ages
        trainer.step(every[start : start + 12])
    batch = trainer._plan(pairs)
    assert batch is not None and len(batch.plan.rows) > 5
    levels, total = trainer._loss(batch)
    views = fusion.embed(items)
    rows = {"image": views.image_ND.numpy(), "title": views.title_ND.numpy(), "fused": views.fused_ND.numpy()}
    temperature, places = float(trainer.temperature.detach()), list(rows)
    sums, plan = dict.fromkeys([*rows, "fused_8"], 0.0), batch.plan
    weights = np.array([config.weight_of(pairs[i].kind) for i in plan.rows])
    for p, i in enumerate(plan.rows):
        anchor = pairs[i].anchor[-2:][::-1]
        for name in sums:
            own = rows[name.partition("_")[0]]
            asking = own if config.anchor_view == "same" else rows[places[pairs[i].view]]
            cut: Any = (lambda row: unit(row[:8])) if name == "fused_8" else (lambda row: row)
            asked = sum(0.7**n * asking[item] for n, item in enumerate(anchor))
            if not np.abs(asked).sum():
                continue
            query = cut(unit(asked))
            positive = cut(own[plan.positives[p]])
            if not np.abs(own[plan.positives[p]]).sum():
                continue

            def logit(row: Any, correction: float, query: Any = query, cut: Any = cut) -> float:
                return float(query @ cut(row)) / temperature - 0.4 * correction

            def seen(item: int, own: Any = own, name: str = name) -> tuple[Any, float]:
                if config.bank_rows == "projected" or item in plan.positives:
                    return own[item], 0.0
                stored, age = trainer._memory.bank.newest_rows(np.array([item]), step=2)
                return stored.reshape(3, -1)[places.index(name.partition("_")[0])], float(age[0])

            aim = logit(own[plan.positives[p]], plan.positive_log_q[p])
            others = [
                logit(row, plan.log_q[k]) - math.log(2) * age / 0.8
                for k, (row, age) in enumerate(map(seen, plan.candidates))
                if plan.allowed[p, k] and np.abs(row).sum()
            ]
            hard = int(batch.hard_P[p])
            hinge = 0.0
            if hard and np.abs(own[hard]).sum():
                if config.hard_loss == "info_nce":
                    others.append(logit(own[hard], plan.positive_log_q[p]))
                else:
                    hinge = 0.7 * max(0.0, 0.4 + float(query @ cut(own[hard])) - float(query @ positive))
            loss = math.log(sum(math.exp(one) for one in [aim, *others])) - aim + hinge
            sums[name] += loss * weights[p] / weights.sum()
    used = {"image": config.image_level, "title": config.title_level, "fused": config.fused_level}
    used["fused_8"] = config.nested_level if config.fused_level else 0.0
    expected = {name: sums[name] for name, weight in used.items() if weight}
    assert {name: float(value) for name, value in levels.items()} == pytest.approx(expected, rel=1e-3)
    assert float(total.detach()) == pytest.approx(sum(used[name] * value for name, value in expected.items()), rel=1e-3)


def test_a_report_counts_candidates_and_gives_the_fused_loss_as_a_share_of_chance() -> None:
    fusion, items, _ = world()
    pairs = make_pairs(make_numbers())[100:112]
    trainer = make_csft_trainer(QUIET, fusion, items, make_numbers(), pairs, workers=Workers())
    report = trainer.step(pairs)
    assert report is not None and (report.step, trainer.steps) == (1, 1)
    assert report.pairs == 12 and report.candidates == len({pair.row.item for pair in pairs})
    assert report.loss_share == pytest.approx(report.levels["fused"] / math.log(report.candidates + 1))
    whole = 0.3 * report.levels["image"] + 0.2 * report.levels["title"] + report.levels["fused"]
    assert report.loss == pytest.approx(whole + 0.25 * report.levels["fused_8"], rel=1e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_a_run_ends_centred_on_what_is_usable_and_on_nothing_else(centred: bool) -> None:
    fusion, items, _ = world()
    usable = np.arange(61) % 3 == 1
    before = fusion.means_3D.clone()
    learn(QUIET.model_copy(update={"centred": centred}), fusion, items, make_numbers(), [], usable=usable)
    found = fusion.means_3D.clone()
    fusion.centre_on(items.select(torch.from_numpy(np.flatnonzero(usable))))
    torch.testing.assert_close(found, fusion.means_3D if centred else before)
    assert not torch.allclose(fusion.means_3D, before, atol=1e-3)


def test_padding_is_an_item_without_content_and_categories_are_numbered_where_there_is_one() -> None:
    _, items, features = world()
    first = with_padding(features).select(np.arange(1))
    assert not (first.text_NT.any() or first.image_NI.any() or first.has_text_N.any() or first.has_image_N.any())
    assert (first.words_NA == -1).all() and (first.category_N2 == -1).all()
    assert np.isnan([first.year_N, first.price_N]).all() and len(items) == 61
    numbers = _category_numbers(items)
    assert numbers[0] == -1 and [len(set(numbers[1 + g :: 3])) for g in range(3)] == [1, 1, 1]
    assert len(set(numbers[1:])) == 3 and (numbers[1:] >= 0).all()


def aligned(items: int = 60, seed: int = 1, **settings: Any) -> tuple[Any, Any, Any, list[tuple[int, int]]]:
    features = make_features(items)
    fusion, steps = make_fusion(features), []
    config = PretrainConfig(**{"epochs": 2, "batch_items": 10, "seed": seed} | settings)
    given = padded(fusion, features)
    run = pretrain(config, fusion, given, on_step=lambda step, total: steps.append((step, total)))
    return run, fusion, given, steps


def test_an_alignment_takes_whole_batches_of_items_with_both_sides_and_ends_centred_on_all() -> None:
    run, fusion, items, steps = aligned()
    both = int((items.has_text_N & items.has_image_N).sum())
    assert (run.items, run.steps) == (both, 2 * (both // 10)) and 40 < both < 50
    assert steps == [(n, run.steps) for n in range(1, run.steps + 1)]
    means = fusion.means_3D.clone()
    fusion.centre_on(items.select(torch.arange(1, 61)))
    torch.testing.assert_close(means, fusion.means_3D)
    for change in ({"seed": 2}, {"missing_weight": 0.0}, {"temperature": 0.5}, {"learning_rate": 1e-4}):
        assert not torch.equal(aligned(**change)[1].text_head.weight, fusion.text_head.weight), change
    assert torch.equal(aligned()[1].text_head.weight, fusion.text_head.weight)


def test_few_items_are_one_batch_and_one_alone_teaches_nothing() -> None:
    assert aligned(3)[0].steps == aligned(2)[0].steps == 2  # one an epoch
    run, _, _, steps = aligned(1)
    assert (run.steps, steps) == (0, []) and math.isnan(run.alignment_loss)


def test_the_loss_of_an_alignment_is_that_of_titles_and_pictures_finding_each_other() -> None:
    features = make_features(20)
    fusion = make_fusion(features)
    items = padded(fusion, features)
    both = torch.nonzero(items.has_text_N & items.has_image_N).flatten()
    views = fusion(items.select(both))
    cosines = (views.image_ND @ views.title_ND.T).detach().numpy() / 0.2
    rows = [np.log(np.exp(one).sum(axis)) - np.diagonal(one) for one, axis in ((cosines, 0), (cosines, 1))]
    run = pretrain(PretrainConfig(epochs=1, batch_items=len(both), temperature=0.2), fusion, items)
    assert run.steps == 1 and run.alignment_loss == pytest.approx(np.mean(rows), rel=1e-4)


def test_recall_of_many_questions_is_that_of_each_alone() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((30, 4)).astype(np.float32)
    found = [([int(rng.integers(1, 30))], int(rng.integers(1, 30)), {int(rng.integers(1, 30))}) for _ in range(2_050)]
    found = [(anchors, target, known - {target}) for anchors, target, known in found]
    cold = np.arange(30) % 3 == 1
    asked = health.Questions.of(found)
    whole = health.recall_at_k(health.queries(vectors, asked), vectors, asked, cold, k=4)
    hits = []
    for anchors, target, known in found:
        scores = vectors @ unit(vectors[anchors[0]])
        better = [n for n in range(1, 30) if n not in known and n != target and scores[n] > scores[target]]
        hits.append(len(better) < 4)
    assert whole.all == pytest.approx(np.mean(hits)) and whole.questions == 2_050
    assert asked.sample(2_050, seed=0) is asked and len(asked.sample(2_049, seed=0)) == 2_049


@pytest.mark.parametrize("cosine", [float("nan"), float("inf")])
def test_a_space_that_is_no_number_has_collapsed(cosine: float) -> None:
    shape = health.Geometry(cosine, 4.0, -1.0, None, None)
    assert health.collapse(shape, loss_share=None, cosine_limit=0.5, loss_limit=0.98) is not None
