"""The matrices of a fixed fusion: how they are fitted, drawn, stored and read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from encoders.fixed_fusion import FixedFusion, Projection, draw_projection, fit_projection, from_tensors, to_tensors

NONE = np.empty(0, dtype=np.intp)


def drawn(rows: int, width: int, *, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("drop", [0, 2])
def test_fitted_directions_are_the_next_principal_ones_scaled_half_way_to_whitening(drop: int) -> None:
    features = drawn(300, 6) * np.array([9, 7, 5, 3, 2, 1], np.float32) + 1.0
    found = fit_projection(features, 3, drop=drop)
    rows = unit(features.astype(np.float64))
    np.testing.assert_allclose(found.mean, rows.mean(0), atol=1e-6)
    _, spread, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    for column, place in zip(found.matrix.T, range(drop, drop + 3), strict=True):
        direction = directions[place] * np.sign(directions[place][np.abs(directions[place]).argmax()])
        np.testing.assert_allclose(column, direction / np.sqrt(spread[place] / np.sqrt(300)), rtol=1e-3, atol=1e-4)


def test_drawn_directions_are_orthonormal_the_same_for_a_seed_and_centred_on_the_content() -> None:
    features = drawn(50, 12) + 2.0
    found, again, other = (draw_projection(features, 5, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_allclose(found.mean, unit(features).mean(0), atol=1e-6)
    np.testing.assert_allclose(found.matrix.T @ found.matrix, np.eye(5), atol=1e-6)
    np.testing.assert_array_equal(found.matrix, again.matrix)
    assert not np.allclose(found.matrix, other.matrix)
    drawn_first = np.random.default_rng(3).standard_normal((12, 5))[:, 0]
    np.testing.assert_allclose(found.matrix[:, 0], drawn_first / np.linalg.norm(drawn_first), atol=1e-6)


def test_features_are_scaled_before_they_are_centred() -> None:
    projection = Projection(np.array([0.5, 0.0], np.float32), np.eye(2, dtype=np.float32))
    np.testing.assert_allclose(projection(np.array([[3.0, 4.0]], np.float32)), unit(np.array([[0.1, 0.8]])), atol=1e-6)
    short = Projection(np.array([0.6, 0.8], np.float32), np.eye(2, dtype=np.float32))
    with pytest.raises(Exception, match="no direction"):  # nothing is left behind the mean
        short(np.array([[3.0, 4.0]], np.float32))


def test_each_part_stands_in_its_place_of_the_items_that_have_it() -> None:
    fusion = FixedFusion(draw_projection(drawn(9, 4), 2, seed=0), draw_projection(drawn(9, 5), 3, seed=1), 0.36)
    text, image = drawn(2, 4, seed=7), drawn(2, 5, seed=8)
    fused = fusion(3, np.array([2, 0]), text, np.array([1, 2]), image)
    assert fusion.dim == 5 and fused.dtype == np.float32
    np.testing.assert_allclose(fused[2], [*0.8 * fusion.text(text)[0], *0.6 * fusion.image(image)[1]], atol=1e-6)
    np.testing.assert_allclose(fused[0], [*fusion.text(text)[1], 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(fused[1], [0, 0, *fusion.image(image)[0]], atol=1e-6)
    with pytest.raises(Exception, match="1 of 4 items have no features"):
        fusion(4, np.array([2, 0]), text, np.array([1, 2]), image)
    assert fusion(0, NONE, text[:0], NONE, image[:0]).shape == (0, 5)


ARRAYS = {
    "text.mean": np.zeros(4, np.float32),
    "text.matrix": np.ones((4, 2), np.float32),
    "image.mean": np.ones(5, np.float32),
    "image.matrix": np.ones((5, 3), np.float32),
}


def test_what_was_written_is_read_back() -> None:
    found = to_tensors(from_tensors(ARRAYS, 0.25))
    assert found.keys() == ARRAYS.keys() and all(found[name] is array for name, array in ARRAYS.items())
    assert from_tensors(ARRAYS, 0.25).image_share == 0.25


@pytest.mark.parametrize("part", ["text", "image"])
@pytest.mark.parametrize(
    ("name", "shape"), [("mean", (3,)), ("mean", (1, 4)), ("matrix", (3, 2)), ("matrix", (4,)), ("matrix", (0,))]
)
def test_matrices_that_do_not_fit_together_are_refused(part: str, name: str, shape: tuple[int, ...]) -> None:
    own = len(ARRAYS[f"{part}.mean"])
    shape = (own, 0) if shape == (0,) else shape
    with pytest.raises(ValueError, match=f"{part}: mean .* do not fit together"):
        from_tensors(ARRAYS | {f"{part}.{name}": np.zeros(shape, np.float32)}, 0.25)


@pytest.mark.parametrize("name", ARRAYS)
def test_matrices_that_are_missing_or_hold_no_numbers_are_refused(name: str) -> None:
    wrong = [np.full_like(ARRAYS[name], value) for value in (np.nan, np.inf)] + [ARRAYS[name].astype(np.float64)]
    for array in wrong:
        with pytest.raises(ValueError, match=f"{name} is not finite float32"):
            from_tensors(ARRAYS | {name: array}, 0.25)
    with pytest.raises(ValueError, match="expected the arrays"):
        from_tensors({other: array for other, array in ARRAYS.items() if other != name}, 0.25)
    with pytest.raises(ValueError, match="expected the arrays"):
        from_tensors(ARRAYS | {"more": ARRAYS[name]}, 0.25)
