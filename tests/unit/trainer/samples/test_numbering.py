from __future__ import annotations

import numpy as np
import pytest

from trainer.samples.numbering import FeatureNumbers


def test_items_of_the_table_have_its_rows_and_others_have_numbers_beyond_it_and_no_vector() -> None:
    numbers = FeatureNumbers(["a", "b"], ["A", "B"])
    assert [numbers.number(name) for name in ("b", "x", "a", "y", "x")] == [2, 3, 1, 4, 3]
    assert [numbers.item_id(number) for number in range(5)] == ["", "a", "b", "x", "y"] and len(numbers) == 5
    assert [numbers.find(name) for name in ("a", "y", "never")] == [1, 4, None]
    assert [numbers.has_vector(number) for number in range(5)] == [False, True, True, False, False]
    assert numbers.vector_mask(np.arange(5)).tolist() == [False, True, True, False, False]
    assert [numbers.content(number) for number in range(5)] == ["", "A", "B", "", ""]


@pytest.mark.parametrize(("ids", "contents"), [(["a", "a"], ["A", "B"]), (["a"], ["A", "B"])])
def test_a_table_that_names_an_item_twice_or_has_other_contents_is_refused(ids: list[str], contents: list[str]) -> None:
    with pytest.raises(ValueError, match=r"twice|contents"):
        FeatureNumbers(ids, contents)
