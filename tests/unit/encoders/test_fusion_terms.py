"""The trained fusion term by term, against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from encoders.features import UNKNOWN
from encoders.fusion import FusionInput, ItemFusion
from encoders.fusion_config import FusionConfig
from tests.factories.csft import SMALL, make_features, make_fusion

KINDS = ["gated", "tensor", "mean"]


def scrambled(fusion: ItemFusion) -> ItemFusion:
    """Every weight drawn, so that each term counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in fusion.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
    return fusion


def linear(layer: Any, row: Any) -> Any:
    bias = 0.0 if layer.bias is None else layer.bias.numpy()
    return layer.weight.numpy() @ row + bias


def by_hand(fusion: ItemFusion, items: FusionInput, n: int) -> list[Any]:
    """Picture, title and fused row of one item before centring."""
    config = fusion.config
    title = linear(fusion.text_head, items.text_NR[n].numpy()) if items.has_text_N[n] else fusion.no_text_D.numpy()
    image = linear(fusion.image_head, items.image_NR[n].numpy()) if items.has_image_N[n] else fusion.no_image_D.numpy()
    title_side, image_side = linear(fusion.text_in, title), linear(fusion.image_in, image)
    if config.kind == "mean":
        return [image, title, title_side + image_side]
    category = np.zeros(config.category_width)
    for hashed in items.category_N2[n].tolist():
        if hashed >= 0:
            category = category + fusion.category_table.weight[hashed % config.category_rows].numpy()
    words = [word % config.attribute_rows for word in items.words_NA[n].tolist() if word >= 0]
    described = sum(fusion.word_table.weight[word].numpy() for word in words) / math.sqrt(max(1, len(words)))
    attributes = np.concatenate([category, items.spline_NS[n].numpy(), described + np.zeros(config.attribute_width)])
    joined = np.concatenate([title, image, attributes])
    if config.kind == "gated":
        gate = 1 / (1 + np.exp(-linear(fusion.gate, joined)))
        fused = 2 * (gate * title_side + (1 - gate) * image_side)
    else:
        small_t, small_v = [*linear(fusion.text_small, title), 1.0], [*linear(fusion.image_small, image), 1.0]
        fused = title_side + image_side + linear(fusion.outer, np.array([t * v for t in small_t for v in small_v]))
    fused = fused + linear(fusion.attributes, attributes)
    if config.hidden:
        inner = linear(fusion.mix_in, joined)
        fused = fused + linear(fusion.mix_out, np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in inner]))
    return [image, title, fused]


@pytest.mark.parametrize("hidden", [0, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_the_sum_of_its_terms(kind: str, hidden: int) -> None:
    features = make_features(14)
    config = SMALL.model_copy(update={"kind": kind, "hidden": hidden})
    fusion = scrambled(make_fusion(features, config)).requires_grad_(False)
    categories = np.where(np.arange(14)[:, None] % 5 == 0, -1, features.category_N2)
    items = fusion.prepare(replace(features, category_N2=categories))
    raw, views = fusion.raw(items), fusion(items)
    assert not items.has_image_N.all() and not items.has_text_N.all()
    for n in range(14):
        rows = by_hand(fusion, items, n)
        np.testing.assert_allclose(raw[:, n].numpy(), rows, rtol=1e-4, atol=1e-4)
        for place, view in enumerate((views.image_ND, views.title_ND, views.fused_ND)):
            there = (items.has_image_N[n], items.has_text_N[n], True)[place]
            centred = rows[place] - fusion.means_3D[place].numpy()
            np.testing.assert_allclose(view[n].numpy(), centred / np.linalg.norm(centred) * bool(there), atol=1e-4)


def test_means_are_those_of_what_is_there_view_by_view() -> None:
    fusion = scrambled(make_fusion(features := make_features(14))).requires_grad_(False)
    items = fusion.prepare(features)
    fusion.centre_on(items)
    image, title, fused = fusion.raw(items)
    expected = [image[items.has_image_N].mean(0), title[items.has_text_N].mean(0), fused.mean(0)]
    torch.testing.assert_close(fusion.means_3D, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows_per_pass", [1, 7, 13, 14, 15])
def test_passes_of_any_size_give_the_same_rows_in_order(rows_per_pass: int) -> None:
    fusion = make_fusion(features := make_features(14))
    items = fusion.prepare(features)
    whole, parts = fusion(items), fusion.embed(items, rows_per_pass=rows_per_pass)
    for name in ("image_ND", "title_ND", "fused_ND"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    nothing = fusion.embed(items.select(torch.zeros(0, dtype=torch.long)))
    assert nothing.fused_ND.shape == (0, SMALL.width)


def test_inputs_are_selected_and_joined_in_every_column() -> None:
    fusion = make_fusion(features := make_features(14))
    items = fusion.prepare(features)
    back = FusionInput.concatenate([items.select(torch.arange(5)), items.select(torch.arange(5, 14))])
    assert len(back) == 14
    for name in ("text_NR", "image_NR", "has_text_N", "has_image_N", "category_N2", "spline_NS"):
        assert torch.equal(getattr(back, name), getattr(items, name)), name
        assert torch.equal(getattr(items.select(torch.tensor([3, 1])), name)[0], getattr(items, name)[3]), name


def test_components_of_what_is_known_have_length_one_on_average() -> None:
    fusion = make_fusion(features := make_features(200))
    items = fusion.prepare(features)
    for rows, known in ((items.text_NR, items.has_text_N), (items.image_NR, items.has_image_N)):
        assert rows.shape[1] == 12
        assert float(rows[known].square().sum(1).mean()) == pytest.approx(1.0, rel=1e-4)
        torch.testing.assert_close(rows[known].mean(0), torch.zeros(12), atol=1e-5, rtol=0)
        assert (rows[known].std(0).diff() < 1e-6).all()  # the strongest comes first
        assert not rows[~known].any()


@pytest.mark.parametrize("few", [0, 1, 2])
def test_components_are_fitted_from_two_items_on(few: int) -> None:
    features = make_features(14)
    has = np.arange(14) < few
    fusion = make_fusion(replace(features, has_image_N=has))
    untouched = torch.equal(fusion.image_basis_IR, torch.eye(30, 12))
    assert untouched is (few < 2) and torch.isfinite(fusion.prepare(features).image_NR).all()


def test_prices_are_told_apart_by_ratio_and_a_price_of_nought_is_below_all_others() -> None:
    features = make_features(14)
    price = np.array([0, 0.5, 1, 2, 4, 8, 8, 8, 8, 16, 32, UNKNOWN, 64, 100], np.float32)
    cheap, dear = replace(features, price_N=price), replace(features, price_N=price * 100)
    year_columns = SMALL.knots + 1
    one, other = (make_fusion(f).prepare(f).spline_NS[:, year_columns:] for f in (cheap, dear))
    torch.testing.assert_close(one[3:], other[3:], atol=2e-3, rtol=0)
    assert one[0].tolist() == [1.0, *[0.0] * (SMALL.knots - 1), 1.0] and not one[11].any()
    assert (one[:11, :-1].sum(1) - 1).abs().max() < 1e-5
    place = one[:11, :-1] @ torch.arange(SMALL.knots).float()
    assert (place.diff() >= 0).all() and place[1] > 0


@pytest.mark.parametrize("known", [1, 14])
@pytest.mark.parametrize("value", [1.0, 2001.0, 9999.0])
def test_one_year_or_one_price_for_all_that_have_any_is_a_number_like_others(known: int, value: float) -> None:
    values = np.where(np.arange(14) < known, value, UNKNOWN).astype(np.float32)
    features = replace(make_features(14), year_N=values, price_N=values)
    fusion = make_fusion(features)
    assert (fusion.year_knots_K.diff() > 0).all() and (fusion.price_knots_K.diff() > 0).all()
    columns = fusion.prepare(features).spline_NS.reshape(14, 2, SMALL.knots + 1)
    expected = torch.zeros(14, 2, SMALL.knots + 1)
    expected[:known, :, 0] = expected[:known, :, -1] = 1.0
    torch.testing.assert_close(columns, expected)


def test_without_any_year_the_knots_stay() -> None:
    features = make_features(14)
    unknown = replace(features, year_N=np.full(14, UNKNOWN))
    fusion = make_fusion(unknown)
    assert fusion.year_knots_K[0] == 1900 and fusion.year_knots_K[-1] == 2030
    assert not fusion.prepare(unknown).spline_NS[:, : SMALL.knots + 1].any()


def test_ranks_are_those_of_the_towers_where_these_are_narrower() -> None:
    fusion = ItemFusion(FusionConfig(width=16, nested_widths=()), text_width=20, image_width=30)
    assert (fusion.text_head.in_features, fusion.image_head.in_features, fusion.dim) == (20, 30, 16)
