"""Near means cosine, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from encoders.similarity import cosine, top_k, unit_rows


def test_cosine_matches_loops_and_ignores_length() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((3, 5)), rng.standard_normal((4, 5))
    expected = [[float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)) for b in right] for a in left]
    np.testing.assert_allclose(cosine(left * 7, right), expected, atol=1e-6)


def test_cosine_never_leaves_its_range() -> None:
    rows = np.random.default_rng(1).standard_normal((200, 3)).astype(np.float32)
    assert np.abs(cosine(rows, rows)).max() <= 1.0


def test_top_k_is_nearest_first_and_earlier_of_equals_first() -> None:
    vectors = [[0, 1], [1, 0], [1, 0], [1, 1]]
    rows, similarities = top_k([[2, 0]], vectors, 3)
    assert rows.tolist() == [[1, 2, 3]]
    np.testing.assert_allclose(similarities, [[1, 1, 0.5**0.5]], atol=1e-6)


def test_many_equally_near_rows_stay_in_their_order() -> None:
    vectors = np.eye(4)[np.arange(1_000) % 4]
    rows, _ = top_k(np.eye(4), vectors, 600)
    assert rows.tolist() == [sorted(range(1_000), key=lambda row: (row % 4 != near, row))[:600] for near in range(4)]


def test_top_k_gives_all_when_there_are_fewer() -> None:
    assert top_k(np.eye(2), np.eye(2), 10)[0].shape == (2, 2)
    assert top_k(np.eye(2), np.empty((0, 2)), 10)[0].shape == (2, 0)
    assert top_k(np.eye(2), np.eye(2), 0)[0].shape == top_k(np.eye(2), np.eye(2), -1)[0].shape == (2, 0)


@pytest.mark.parametrize("bad", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_a_vector_without_direction_is_an_error(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="direction"):
        unit_rows([[1.0, 0.0], bad])
