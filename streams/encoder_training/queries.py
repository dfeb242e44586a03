"""Searches beside items, as C-SFT uses them: each distinct one is encoded once, as an item of words or of a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from encoders.base import ItemContent
from encoders.feature_cache import content_key
from encoders.features import ItemFeatures
from trainer.samples.numbering import FeatureNumbers


@dataclass(frozen=True, eq=False)
class ItemsAndQueries:
    """Features of items, whose numbers begin at 1, and behind them of queries."""

    items: int
    contents: Sequence[ItemContent]
    features: ItemFeatures
    numbers: FeatureNumbers
    known: Mapping[str | bytes, int]
    """Number of each query that can be read."""
    unreadable: int
    """Queries that cannot."""

    @property
    def is_item(self) -> NDArray[np.bool_]:
        """Per number: an item, so that it may be a negative."""
        is_item = np.arange(len(self.contents) + 1) <= self.items
        is_item[0] = False
        return is_item


def items_and_queries(
    items: Sequence[ItemContent],
    queries: Mapping[str | bytes, ItemContent],
    features_of: Callable[[Sequence[ItemContent]], ItemFeatures],
) -> ItemsAndQueries:
    """Compute the features of both; `queries` are named as the log names them."""
    contents = [*items, *queries.values()]
    features = features_of(contents)
    numbers = FeatureNumbers(
        [*(content.item_id for content in items), *(f"\0query {place}" for place in range(len(queries)))],
        [content_key(content) for content in contents],
    )
    readable = (features.has_text_N | features.has_image_N)[len(items) :]
    known = {query: len(items) + 1 + place for place, query in enumerate(queries) if readable[place]}
    return ItemsAndQueries(len(items), contents, features, numbers, known, len(queries) - len(known))
