"""Vectors of encoders that see less than there is."""

from __future__ import annotations

import numpy as np
import pytest

from encoders.features import ItemFeatures
from encoders.similarity import cosine
from trainer.offline.encoder_versions import VectorKind, _without_sides, reduced


def make_items(n: int) -> ItemFeatures:
    has = np.arange(n) % 4
    features = np.ones((n, 3), np.float32)
    return ItemFeatures(
        text_NT=features * (has != 0)[:, None],
        image_NI=features * (has != 1)[:, None],
        has_text_N=has != 0,
        has_image_N=has != 1,
        category_N2=np.full((n, 2), -1),
        year_N=np.full(n, np.nan, np.float32),
        price_N=np.full(n, np.nan, np.float32),
        words_NA=np.full((n, 2), -1),
    )


@pytest.mark.parametrize(("kind", "share"), [("missing-10", 0.1), ("missing-30", 0.3), ("missing-70", 0.7)])
def test_of_a_share_of_the_items_with_both_modalities_one_is_missing(kind: VectorKind, share: float) -> None:
    items = make_items(4_000)
    left = _without_sides(items, kind, seed=3)
    both = items.has_text_N & items.has_image_N
    lost_text, lost_image = items.has_text_N & ~left.has_text_N, items.has_image_N & ~left.has_image_N
    assert np.mean((lost_text | lost_image)[both]) == pytest.approx(share, abs=0.03)
    assert np.mean(lost_text[both]) == pytest.approx(share / 2, abs=0.03)
    assert not (lost_text & lost_image).any() and not (lost_text | lost_image)[~both].any()
    assert np.array_equal(left.text_NT.any(axis=1), left.has_text_N)
    assert np.array_equal(left.image_NI.any(axis=1), left.has_image_N)
    assert not np.array_equal(_without_sides(items, kind, seed=4).has_text_N, left.has_text_N)
    assert np.array_equal(_without_sides(items, kind, seed=3).has_text_N, left.has_text_N)


@pytest.mark.parametrize(("kind", "sides"), [("csft", (3_000, 3_000)), ("text", (3_000, 0)), ("image", (0, 3_000))])
def test_of_one_modality_alone_nothing_of_the_other_is_left(kind: VectorKind, sides: tuple[int, int]) -> None:
    left = _without_sides(make_items(4_000), kind, seed=0)
    assert (left.has_text_N.sum(), left.has_image_N.sum()) == sides
    assert (left.text_NT.any(axis=1).sum(), left.image_NI.any(axis=1).sum()) == sides


def test_principal_components_are_those_of_the_rows_they_are_fitted_on() -> None:
    rng = np.random.default_rng(0)
    fitted_on = np.arange(40) % 2 == 0
    vectors = rng.normal(size=(40, 6)).astype(np.float32) * np.array([5, 5, 0.01, 0.01, 0.01, 0.01], np.float32)
    vectors[0] = 0
    other = vectors.copy()
    other[~fitted_on] = 50 * rng.normal(size=(20, 6))
    found, beside_other = reduced(vectors, fitted_on, 2), reduced(other, fitted_on, 2)
    assert np.allclose(found[fitted_on], beside_other[fitted_on], atol=1e-6)
    assert found.shape == (40, 2) and not found[0].any()
    assert np.allclose(np.linalg.norm(beside_other[1:], axis=1), 1)
    assert np.allclose(found[1:] @ found[1:].T, cosine(vectors[1:], vectors[1:]), atol=0.05), "the leading ones"
