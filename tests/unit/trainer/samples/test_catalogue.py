"""A catalogue that grows past its first block keeps every item's row."""

from __future__ import annotations

import numpy as np
import pytest

from tests.factories.samples import DIM, embedding, make_catalogue, unit_vector
from trainer.samples.catalogue import Catalogue
from trainer.samples.item_facts import FactsConfig

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


def test_what_is_known_of_an_item_comes_with_its_embedding_and_survives_a_restart() -> None:
    config = FactsConfig(attributes=("genres",))
    catalogue = Catalogue(DIM, config)
    described = {"category": "hats", "year": 1999, "attributes": {"genres": ["a", "b"], "other": "c"}}
    for item in ("i1", "i2"):
        catalogue.put_embedding(embedding(item, 1).model_copy(update=described))
    catalogue.number("i1")
    restored = Catalogue(DIM, config)
    restored.restore(catalogue.snapshot())
    for one in (catalogue, restored):
        facts = one.facts(np.array([0, one.number("i1"), one.number("i2")]))
        assert (facts.words_IW > 0).sum(1).tolist() == [0, 2, 2] and facts.category_I[1] == facts.category_I[2] > 0
        assert facts.numbers_IN[2, 1] == pytest.approx(-0.1) and facts.age_I.tolist() == [2, 0, 0]
        assert facts.published_I[1] == embedding("i1", 1).published_at.timestamp()


def test_a_catalogue_of_an_earlier_build_is_restored_without_facts() -> None:
    catalogue = make_catalogue(2)
    state = catalogue.snapshot()
    for name in ("facts", "unmet.facts"):
        del state.values[name]
    for name in [name for name in state.arrays if "facts/" in name]:
        del state.arrays[name]
    restored = Catalogue(DIM)
    restored.restore(state)
    assert restored.has_vector(2) and restored.facts(np.array([1])).age_I[0] == 2


def test_facts_of_other_features_are_refused() -> None:
    with pytest.raises(ValueError, match="other features"):
        Catalogue(DIM, FactsConfig(numbers=("price",))).restore(make_catalogue(2).snapshot())
