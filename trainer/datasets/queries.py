"""The distinct searches of a data set, numbered behind its items, and sets of which they are not read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from encoders.base import ItemContent, query_content
from schemas.queries import query_words
from trainer.datasets.folder import DataSet, Interactions, Negatives
from trainer.samples.searches import searched

QueryUse = Literal["auto", "off"]
"""auto: searches and trigger items are read where a set has them; off: as if it had none."""
QUERY_USES: tuple[QueryUse, ...] = get_args(QueryUse)
_IMAGES_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Queries:
    """What is searched in a set, each by words and photo once, numbered as items are and after them."""

    items: int
    """Number of the last item."""
    names: list[str]
    """As `trainer.samples.searches.query_item` names them."""
    texts: list[str]
    """The words of each; empty for a photo alone."""
    places: list[int]
    """A place of each in the set's searches."""
    number_P: NDArray[np.int64]
    """Number of the search at each place, 0 where it says nothing or no row names it; a last 0 for `NO_SEARCH`."""

    @staticmethod
    def of(data: DataSet) -> Queries:
        """The queries that rows of a set name."""
        found = Queries(len(data.item_ids), [], [], [], np.zeros(_size(data), np.int64))
        if data.searches is None:
            return found
        numbers: dict[str, int] = {}
        for chunk in _chunks(_named(data).tolist()):
            for place, image in zip(chunk, data.searches.images(chunk), strict=True):
                text = data.searches.text(place)
                name = searched(text, image)
                if name is None:
                    continue
                if name not in numbers:
                    numbers[name] = found.items + 1 + len(numbers)
                    found.names.append(name)
                    found.texts.append(query_words(text))
                    found.places.append(place)
                found.number_P[place] = numbers[name]
        return found

    def __len__(self) -> int:
        return len(self.names)

    def numbers(self, search_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of each search, 0 for none."""
        return self.number_P[search_N]

    def contents(self, data: DataSet) -> Iterator[ItemContent]:
        """What an encoder sees of each."""
        for chunk in _chunks(self.places):
            assert data.searches is not None
            for place, image in zip(chunk, data.searches.images(chunk), strict=True):
                yield query_content(data.searches.text(place), image)


def has_searches(data: DataSet) -> bool:
    """Whether a row of the set says what was searched."""
    return len(_named(data)) > 0


def has_triggers(data: DataSet) -> bool:
    """Whether a row of the set names a trigger item."""
    return any(one.trigger is not None and bool((one.trigger >= 0).any()) for one in _tables(data))


def reads_searches(data: DataSet) -> bool:
    """Whether there is a search or a trigger item to be read."""
    return has_searches(data) or has_triggers(data)


def without_searches(data: DataSet) -> DataSet:
    """The set as if it said neither what was searched nor which item was looked at just before."""
    if not reads_searches(data):
        return data
    negatives = data.negatives
    return replace(
        data,
        interactions=replace(data.interactions, search=None, trigger=None),
        negatives=None if negatives is None else replace(negatives, search=None, trigger=None),
        searches=None,
        searches_unread=True,
    )


def _tables(data: DataSet) -> list[Interactions | Negatives]:
    return [data.interactions] if data.negatives is None else [data.interactions, data.negatives]


def _named(data: DataSet) -> NDArray[np.int64]:
    """Places of the searches that rows name."""
    named = [np.unique(one.search) for one in _tables(data) if one.search is not None]
    places = np.unique(np.concatenate([np.zeros(0, np.int64), *named]))
    return np.asarray(places[places >= 0])


def _size(data: DataSet) -> int:
    return 1 + (0 if data.searches is None else len(data.searches))


def _chunks(places: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(places), _IMAGES_AT_ONCE):
        yield places[start : start + _IMAGES_AT_ONCE]
