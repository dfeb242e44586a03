"""Heads and fusion: start, missing modalities, centring, nested widths, attributes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from encoders.features import category_hashes
from encoders.fusion import nested_unit
from encoders.fusion_config import FusionConfig
from tests.factories.csft import SMALL, make_features, make_fusion


@pytest.fixture
def features():
    return make_features()


@pytest.fixture
def fusion(features):
    return make_fusion(features)


@pytest.mark.parametrize("kind", ["gated", "tensor", "mean"])
def test_vectors_are_unit_centred_and_the_same_alone_or_in_a_batch(features, kind):
    fusion = make_fusion(features, SMALL.model_copy(update={"kind": kind}))
    items = fusion.prepare(features)
    fused = fusion.embed(items).fused_ND
    shown = torch.from_numpy(features.has_text_N | features.has_image_N)  # one item has nothing to show at all
    torch.testing.assert_close(fused.norm(dim=1)[shown], torch.ones(59))
    assert fused.mean(0).norm() < 0.2
    for row in (0, 3, 5):
        alone = fusion.embed(fusion.prepare(features.select(np.array([row])))).fused_ND[0]
        torch.testing.assert_close(alone, fused[row], rtol=1e-5, atol=1e-5)


def test_the_untrained_heads_keep_the_geometry_of_the_towers():
    features = make_features(noise=3.0)
    fusion = make_fusion(features, FusionConfig(width=64, nested_widths=(), text_rank=20, image_rank=30))
    title = fusion.embed(fusion.prepare(features)).title_ND.numpy()
    known = features.has_text_N
    rows = features.text_NT / np.maximum(np.linalg.norm(features.text_NT, axis=1, keepdims=True), 1e-9)
    rows = rows[known] - rows[known].mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(title[known] @ title[known].T, rows @ rows.T, atol=1e-4)


def test_a_missing_modality_is_a_zero_view_and_a_learned_state_of_the_fused_vector(features, fusion):
    with torch.no_grad():
        fusion.no_image_D.fill_(0.5)
    views = fusion.embed(fusion.prepare(features))
    assert (views.image_ND[~torch.from_numpy(features.has_image_N)] == 0).all()
    assert (views.image_ND[torch.from_numpy(features.has_image_N)].norm(dim=1) > 0.99).all()
    without = int(np.flatnonzero(~features.has_image_N)[0])
    before = views.fused_ND[without].clone()
    with torch.no_grad():
        fusion.no_image_D.fill_(-0.5)
    after = fusion.embed(fusion.prepare(features)).fused_ND
    assert not torch.allclose(before, after[without])


def test_what_lies_behind_a_lowered_flag_never_shows(features, fusion):
    with_rubbish = replace(
        features,
        text_NT=np.where(features.has_text_N[:, None], features.text_NT, 7.0).astype(np.float32),
        image_NI=np.where(features.has_image_N[:, None], features.image_NI, 7.0).astype(np.float32),
    )
    one, other = (fusion.embed(fusion.prepare(given)).fused_ND for given in (features, with_rubbish))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("side", ["text", "image"])
def test_hiding_a_modality_gives_what_an_item_without_it_gets(features, fusion, side):
    items = fusion.prepare(features)
    has, rows = f"has_{side}_N", "text_NT" if side == "text" else "image_NI"
    hidden = fusion(items, **{f"drop_{side}_N": getattr(items, has)})
    nothing = {rows: np.zeros_like(getattr(features, rows)), has: np.zeros_like(getattr(features, has))}
    bare = fusion(fusion.prepare(replace(features, **nothing)))
    for view in ("image_ND", "title_ND", "fused_ND"):
        torch.testing.assert_close(getattr(hidden, view), getattr(bare, view))
    shown = fusion(items)
    assert not torch.allclose(hidden.fused_ND, shown.fused_ND)


def test_year_is_interpolated_between_knots_clamped_outside_and_silent_when_unknown(features, fusion):
    knots = torch.tensor([1990.0, 2000.0, 2004.0, *(2010.0 + k for k in range(SMALL.knots - 3))])
    fusion.year_knots_K.copy_(knots)
    probe = features.select(np.zeros(6, np.int64))
    probe.year_N[:] = [2001.0, 2000.0, 1997.0, 1800.0, 2999.0, np.nan]
    expected = torch.zeros(6, SMALL.knots + 1)
    expected[0, 1], expected[0, 2] = 0.75, 0.25  # a quarter of the way
    expected[1, 1] = 1.0
    expected[2, 0], expected[2, 1] = 0.3, 0.7
    expected[3, 0] = expected[4, SMALL.knots - 1] = 1.0  # outside: the outermost knot
    expected[:5, -1] = 1.0  # known
    torch.testing.assert_close(fusion.prepare(probe).spline_NS[:, : SMALL.knots + 1], expected)


def test_running_means_move_by_what_the_momentum_leaves_and_only_where_something_is_known(features, fusion):
    items = fusion.prepare(features)
    fusion.means_3D.zero_()
    fusion.centre_on(items)
    whole = fusion.means_3D.clone()
    fusion.means_3D.fill_(2.0)
    fusion.centre_on(items, momentum=0.75)
    torch.testing.assert_close(fusion.means_3D, 0.75 * 2.0 + 0.25 * whole)
    without = features.has_image_N & False
    fusion.centre_on(fusion.prepare(replace(features, has_image_N=without)))
    torch.testing.assert_close(fusion.means_3D[0], 0.75 * 2.0 + 0.25 * whole[0])  # no picture says nothing of pictures


def test_categories_are_known_by_name_whatever_its_case():
    assert category_hashes("Shoes ") == category_hashes("shoes") != category_hashes("hats")
    assert category_hashes("") == category_hashes(None) == (-1, -1)


@pytest.mark.parametrize(
    ("attribute", "column"), [("category", "category_N2"), ("year", "year_N"), ("price", "price_N")]
)
def test_an_attribute_that_is_switched_off_changes_no_input(features, attribute, column):
    items = features.select(np.array([1]))
    other = replace(items, **{column: getattr(items, column) + 1})
    for used in (True, False):
        fusion = make_fusion(features, SMALL.model_copy(update={attribute: used}))
        one, two = fusion.prepare(items), fusion.prepare(other)
        alike = torch.equal(one.category_N2, two.category_N2) and torch.equal(one.spline_NS, two.spline_NS)
        assert alike is not used


def test_nested_prefixes_are_unit_vectors_with_their_share_of_text_and_picture(features, fusion):
    views = fusion.embed(fusion.prepare(features))
    (prefix,) = nested_unit(views.fused_ND, (8,))
    shown = torch.from_numpy(features.has_text_N | features.has_image_N)
    torch.testing.assert_close(prefix.norm(dim=1)[shown], torch.ones(59))
    assert fusion.text_in.weight[:8].abs().sum() == fusion.image_in.weight[:8].abs().sum() == 4


def test_nested_widths_must_be_shorter_than_the_vector():
    with pytest.raises(ValueError, match="nested_widths"):
        FusionConfig(width=64, nested_widths=(64,))


@pytest.mark.parametrize("side", ["text", "image"])
@pytest.mark.parametrize("kind", ["gated", "tensor", "mean"])
def test_a_hidden_modality_is_the_same_as_a_missing_one(features, kind, side):
    fusion = make_fusion(features, SMALL.model_copy(update={"kind": kind}))
    items = fusion.prepare(features)
    hide = torch.arange(len(items)) % 2 == 0
    if side == "text":
        hidden = fusion(items, drop_text_N=hide)
        missing = fusion(replace(items, has_text_N=items.has_text_N & ~hide))
    else:
        hidden = fusion(items, drop_image_N=hide)
        missing = fusion(replace(items, has_image_N=items.has_image_N & ~hide))
    plain = fusion(items)
    for name in ("title_ND", "image_ND", "fused_ND"):
        torch.testing.assert_close(getattr(hidden, name), getattr(missing, name))
    present = hide & (items.has_text_N if side == "text" else items.has_image_N)
    assert present.any()
    assert not torch.isclose(hidden.fused_ND[present], plain.fused_ND[present]).all(1).any()
    torch.testing.assert_close(hidden.fused_ND[~hide], plain.fused_ND[~hide])


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_momentum_is_the_share_of_the_old_mean_that_is_kept(features, fusion, momentum):
    items = fusion.prepare(features)
    old = torch.randn(fusion.means_3D.shape, generator=torch.Generator().manual_seed(0))
    fusion.centre_on(items)
    new = fusion.means_3D.clone()
    fusion.means_3D.copy_(old)
    fusion.centre_on(items, momentum=momentum)
    torch.testing.assert_close(fusion.means_3D, momentum * old + (1 - momentum) * new)
