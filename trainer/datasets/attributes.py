"""Attributes of items (section, colour, genres, pages, ...) from the further columns of `items.parquet`.

A text column is an attribute where items share its values, or the words that commas separate in it. A column of
numbers is one unless it numbers the items. Columns named `diag_...` are computed on the whole log and left out, and so
are flags.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

OF_THE_FORMAT = {"item_id", "title", "text", "category", "price", "year", "release_year", "publish_ts", "first_ts"}
MOST_ATTRIBUTES, MOST_VALUES, MOST_CHARACTERS = 32, 32, 200
_OUTCOME = re.compile(
    r"(^|_)(ratings?|rated|scores?|stars|sales|sold|revenue|views?|viewed|clicks?|clicked|likes?|liked|purchases?|orders"
    r"|popularity|popular|rank|ranking|ctr|conversions?|reviews?|interactions?|impressions?|downloads?)(_|$)"
)


@dataclass(frozen=True)
class ItemAttributes:
    """Which columns are attributes."""

    texts: tuple[str, ...]
    """Columns with one value per item."""
    lists: tuple[str, ...]
    """Columns with several values per item."""
    numbers: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.texts + self.lists + self.numbers

    def of(self, row: dict[str, object]) -> dict[str, str | list[str] | float]:
        """The attributes of one item, as messages carry them; without those that say nothing."""
        found: dict[str, str | list[str] | float] = {}
        for name in self.texts:
            if text := str(row.get(name) or "").strip():
                found[name] = text[:MOST_CHARACTERS]
        for name in self.lists:
            if words := [word[:MOST_CHARACTERS] for word in words_of(str(row.get(name) or ""))][:MOST_VALUES]:
                found[name] = words
        for name in self.numbers:
            value = row.get(name)
            if value is not None and math.isfinite(float(value)):  # type: ignore[arg-type]
                found[name] = float(value)  # type: ignore[arg-type]
        return found


NO_ATTRIBUTES = ItemAttributes((), (), ())


def words_of(text: str) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def looks_like_an_outcome(name: str) -> bool:
    """Whether a column may tell what became of an item (ratings, sales), which nobody knew when rows were shown."""
    return bool(_OUTCOME.search(name.lower()))


def attributes_in(table: pa.Table, *, outcomes: Collection[str] = ()) -> ItemAttributes:
    """Which columns of `items.parquet` are attributes, in the order of the file; `outcomes` are left out."""
    texts, lists, numbers = [], [], []
    for field in table.schema:
        name, kind = field.name, field.type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if name in OF_THE_FORMAT or name.startswith("diag_") or name in outcomes:
            continue
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            values = [(text or "").strip().lower() for text in table[name].cast(pa.string()).to_pylist()]
            words = [word for text in values for word in words_of(text)]
            distinct = set(words)
            if any("," in text for text in values) and 2 <= len(distinct) < len(words) / 2:
                lists.append(name)
            elif 2 <= len(set(values) - {""}) < len(values) / 2:
                texts.append(name)
        elif (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)) and (
            _is_a_measure(table[name], whole=pa.types.is_integer(kind))
        ):
            numbers.append(name)
    kept = [*texts, *lists, *numbers][:MOST_ATTRIBUTES]
    return ItemAttributes(*(tuple(name for name in some if name in kept) for some in (texts, lists, numbers)))


def _is_a_measure(column: pa.ChunkedArray, *, whole: bool) -> bool:
    """Whether numbers say something: not all the same, and not, as identifiers do, one per item."""
    known = np.asarray(column.drop_null().cast(pa.float64()))
    distinct = len(np.unique(known[np.isfinite(known)]))
    return distinct >= 2 and not (whole and distinct > len(known) / 2)


