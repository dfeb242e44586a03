"""What a catalogue holds of each item: while it grows, over updates, deletions and a restart."""

from __future__ import annotations

import numpy as np
import pytest

from tests.factories.feeding import through_bytes
from tests.factories.samples import DAY0, DIM, embedding, unit_vector
from trainer.samples.catalogue import Catalogue, vector_digest

ITEMS = 1_100


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


def told(catalogue: Catalogue, item_id: str) -> tuple[bool, str, float, bytes, list[float]]:
    """Everything that is known of a numbered item."""
    number = catalogue.find(item_id)
    assert number is not None and catalogue.item_id(number) == item_id
    (vector,) = catalogue.vectors(np.array([number])).tolist()
    facts = catalogue.has_vector(number), catalogue.content(number), catalogue.published_at(number)
    return (*facts, catalogue.digest(number), vector)


def of(seed: int, content: str, published: float) -> tuple[bool, str, float, bytes, list[float]]:
    vector = unit_vector(seed)
    return True, content, DAY0 + published, vector_digest(content, vector), vector.tolist()


def restored(catalogue: Catalogue) -> Catalogue:
    again = Catalogue(DIM)
    for n in range(3):  # what it held before is gone
        again.number(f"other{n}")
        again.put_embedding(embedding(f"other{n}", 90 + n))
        again.digest(n + 1)
    again.restore(through_bytes(catalogue.snapshot()))
    return again


def test_the_newest_embedding_replaces_all_that_was_known_of_an_item_named_or_not() -> None:
    catalogue = Catalogue(DIM)
    catalogue.put_embedding(embedding("a", 1, content="A", published=5))
    assert catalogue.find("a") is None and catalogue.items_with_vector == ["a"]
    catalogue.put_embedding(embedding("a", 2, content="B", published=3))
    catalogue.number("a")
    catalogue.number("b")
    assert told(catalogue, "a") == of(2, "B", 3) and not told(catalogue, "b")[0]
    catalogue.put_embedding(embedding("a", 3, content="B", published=1))
    assert told(catalogue, "a") == of(3, "B", 1)
    catalogue.put_embedding(embedding("a", 3, content="C", published=1))
    catalogue.put_embedding(embedding("b", 4, content="D", published=2))
    catalogue.put_embedding(embedding("c", 5, content="E", published=7))
    for each in (catalogue, restored(catalogue)):
        assert told(each, "a") == of(3, "C", 1) and told(each, "b") == of(4, "D", 2) and each.find("c") is None
        assert sorted(each.items_with_vector) == ["a", "b", "c"] and len(each) == 3
        assert each.number("c") == 3 and told(each, "c") == of(5, "E", 7)


def test_a_deleted_item_keeps_its_number_and_nothing_else_and_may_come_back() -> None:
    catalogue = Catalogue(DIM)
    for name, seed in (("a", 1), ("b", 2)):
        catalogue.number(name)
        catalogue.put_embedding(embedding(name, seed, content=name))
        told(catalogue, name)
    catalogue.put_embedding(embedding("unnamed", 3))
    for name in ("a", "unnamed", "never heard of"):
        catalogue.delete_item(name)
    for each in (catalogue, restored(catalogue)):
        has, content, _, digest, vector = told(each, "a")
        assert (has, content, digest, vector) == (False, "", b"", [0.0] * DIM)
        assert each.items_with_vector == ["b"] and each.vector_mask(np.arange(3)).tolist() == [False, False, True]
        assert not each.has_vector(each.number("unnamed"))
        each.put_embedding(embedding("a", 4, content="again", published=9))
        assert told(each, "a") == of(4, "again", 9)


def test_a_digest_is_of_content_and_vector_together() -> None:
    vector, other = unit_vector(1), unit_vector(2)
    digests = {
        vector_digest("a", vector),
        vector_digest("b", vector),
        vector_digest("a", other),
        vector_digest("", vector),
    }
    assert len(digests) == 4 and all(len(digest) == 16 for digest in digests)


def test_vectors_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="4-d"):
        Catalogue(DIM).put_embedding(embedding("a", unit_vector(1, 4)))
    with pytest.raises(ValueError, match="8-d, expected 4-d"):
        Catalogue(4).restore(Catalogue(DIM).snapshot())


def test_a_catalogue_is_crowded_at_its_bound_and_then_at_twice_what_is_in_use() -> None:
    catalogue = Catalogue(DIM, most_items=3)

    def crowded_after(*names: str) -> list[bool]:
        return [bool(catalogue.number(name)) and catalogue.crowded for name in names]

    assert crowded_after("a", "b", "b", "c") == [False, False, False, True]
    catalogue.retire([1, 2])
    again = Catalogue(DIM, most_items=3)
    again.restore(through_bytes(catalogue.snapshot()))
    assert (again.named, again.releases) == (2, True)
    catalogue = again
    assert crowded_after("c", "d") == [False, True]
    catalogue.retire([])
    assert crowded_after("e", "f", "g") == [False, False, True] and catalogue.named == 3


def test_of_several_retired_numbers_those_that_are_held_still_stand_for_their_item() -> None:
    catalogue = Catalogue(DIM)
    for number in (1, 2, 3):
        assert catalogue.number("a") == number and catalogue.numbers_of("a") == [number, *range(1, number)]
        catalogue.retire([3])
    assert catalogue.releases and catalogue.numbers_of("never") == []
    catalogue.release([2])
    assert catalogue.numbers_of("a") == [3, 2] and catalogue.item_id(2) == "a" and not catalogue.releases
    with pytest.raises(KeyError):
        catalogue.item_id(1)


@pytest.mark.parametrize("name", ["has_vector", "published_at", "hashes", "vectors", "numbers", "retired"])
def test_a_snapshot_whose_columns_do_not_fit_its_items_is_refused(name: str) -> None:
    catalogue = Catalogue(DIM)
    catalogue.number("a")
    state = through_bytes(catalogue.snapshot())
    state.arrays[name] = np.array([[1, 2]]) if name == "retired" else state.arrays[name][:-1]
    with pytest.raises(ValueError, match="2 items"):
        Catalogue(DIM).restore(state)
