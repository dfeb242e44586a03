"""A catalogue that grows past its first block keeps every item's row."""

from __future__ import annotations

import numpy as np

from tests.factories.samples import DIM, embedding, unit_vector
from trainer.samples.catalogue import Catalogue

ITEMS = 2_500


def test_a_catalogue_that_grows_keeps_each_items_vector_hashes_and_time_after_a_restore_too() -> None:
    catalogue, restored = Catalogue(DIM), Catalogue(DIM)
    for n in range(1, ITEMS + 1):
        if n % 3:
            catalogue.put_embedding(embedding(f"i{n}", n))
        assert catalogue.number(f"i{n}") == n
    restored.restore(catalogue.snapshot())
    numbers = np.arange(ITEMS + 1)
    for found in (catalogue, restored):
        assert found.number("one more") == ITEMS + 1
        assert found.vector_mask(numbers).tolist() == [bool(n % 3) for n in numbers]
        expected = [unit_vector(n) if n % 3 else np.zeros(DIM) for n in numbers]
        np.testing.assert_array_equal(found.vectors(numbers), np.array(expected, np.float32))
        assert not found.vectors(np.array([ITEMS + 1])).any() and not found.has_vector(ITEMS + 1)
        assert np.isnan(found.published_at(3)) and found.published_at(4) == found.published_at(5)
        assert len({tuple(row) for row in found.hashes(numbers).tolist()}) == ITEMS + 1
