"""What features know of an item beside its takes: category, attributes, numbers and time of publication, as arrays.

Letters: I items (row 0 is padding), N numbers, W attribute values, T words of a title.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from schemas.attributes import Attribute, PublishedAtIs
from trainer.samples.id_hashes import id_hashes
from trainer.samples.searches import MOST_WORDS, hashed_words
from trainer.state import State

_LAST_YEAR = 9_999
_AGE_KINDS: tuple[PublishedAtIs, ...] = ("known", "inferred", "unknown")


class FactsConfig(BaseModel):
    """Which attributes of items features look at."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    attributes: tuple[str, ...] = ()
    """Attributes of texts with features of their own; without any, all attributes share one group of features."""
    numbers: tuple[str, ...] = ("price", "year")
    """Attributes of numbers; price and year are fields of the item itself."""
    values_per_item: int = Field(default=16, ge=1, le=64)
    """Most attribute values of an item that are looked at, of each attribute equally many."""
    queries: bool = False
    """Whether a row sees the search that led to it: its vector as the newest of the history, which of its words stand
    in the title, and what was taken after it; and what was taken right after the item that was looked at just before.
    Rows then wait for the vectors of searches, which the topic `queries` holds."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of attribute features."""
        return self.attributes or ("attributes",)

    @property
    def title_words(self) -> int:
        """Words of a title that are kept, to find those of searches among them."""
        return MOST_WORDS if self.queries else 0


@dataclass(frozen=True, eq=False)
class FactRows:
    """Facts of some items."""

    category_I: NDArray[np.uint32]
    """Hash of the category, 0 unknown."""
    words_IW: NDArray[np.uint32]
    """Hashes of the attributes' values, 0 pads."""
    group_IW: NDArray[np.uint8]
    """Group of each value."""
    numbers_IN: NDArray[np.float32]
    """Numbers on a scale for networks, NaN where unknown."""
    published_I: NDArray[np.float64]
    """Time of publication, seconds since 1970; NaN where unknown."""
    age_I: NDArray[np.uint8]
    """How the time of publication is known: 0 known, 1 inferred from the first take, 2 not."""
    title_IT: NDArray[np.uint32]
    """Hashes of the first words of the titles, 0 pads; T is 0 where searches are not read."""

    @classmethod
    def empty(cls, config: FactsConfig, size: int) -> FactRows:
        """Items of which nothing is known."""
        return cls(
            np.zeros(size, np.uint32),
            np.zeros((size, config.values_per_item), np.uint32),
            np.zeros((size, config.values_per_item), np.uint8),
            np.full((size, len(config.numbers)), np.nan, np.float32),
            np.full(size, np.nan),
            np.full(size, 2, np.uint8),
            np.zeros((size, config.title_words), np.uint32),
        )

    def __len__(self) -> int:
        return len(self.category_I)

    def rows(self, places: NDArray[np.int64]) -> FactRows:
        """Copies of these rows."""
        return FactRows(*(getattr(self, one.name).take(places, axis=0) for one in fields(self)))

    def put(self, place: int, row: FactRows) -> None:
        """Write a single row."""
        for one in fields(self):
            getattr(self, one.name)[place] = getattr(row, one.name)[0]

    def with_unknown(self) -> FactRows:
        """These rows and one more of which nothing is known, as of row 0, which is padding."""
        columns = (getattr(self, one.name) for one in fields(self))
        return FactRows(*(np.concatenate((column, column[:1])) for column in columns))

    def grown(self, config: FactsConfig, size: int) -> FactRows:
        """The same rows and unknown ones up to `size`."""
        return FactRows.joined([self, FactRows.empty(config, size - len(self))])

    @classmethod
    def joined(cls, parts: Sequence[FactRows]) -> FactRows:
        """The rows of all parts, one after the other."""
        return cls(*(np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(cls)))

    def snapshot(self) -> State:
        """The rows as arrays, copied."""
        return State({one.name: getattr(self, one.name).copy() for one in fields(self)})

    @classmethod
    def restored(cls, state: State) -> FactRows:
        """Rows from `snapshot`."""
        kept = {one.name: state.arrays[one.name].copy() for one in fields(cls) if one.name in state.arrays}
        kept.setdefault("title_IT", np.zeros((len(kept["category_I"]), 0), np.uint32))  # of an earlier build
        return cls(**kept)


def facts_of(
    config: FactsConfig,
    *,
    category: str | None,
    price: float | None,
    year: int | None,
    attributes: Mapping[str, Attribute],
    published_at: float,
    published_at_is: PublishedAtIs = "known",
    title: str = "",
) -> FactRows:
    """The facts of one item, as one row."""
    row = FactRows.empty(config, 1)
    row.category_I[0] = word_hash("category", category or "")
    for place, name in enumerate(config.numbers):
        own: Attribute | None = {"price": price, "year": year}.get(name)
        value = attributes.get(name) if own is None else own
        if isinstance(value, int | float) and math.isfinite(value):
            row.numbers_IN[0, place] = scaled(name, float(value))
    names = config.attributes or sorted(attributes)
    values = [(number, word) for number, name in enumerate(names) for word in _words(name, attributes.get(name))]
    kept = _spread(values, config.values_per_item)
    for place, (group, word) in enumerate(kept if config.attributes else sorted((0, word) for _, word in kept)):
        row.words_IW[0, place], row.group_IW[0, place] = word, group
    row.published_I[0], row.age_I[0] = published_at, _AGE_KINDS.index(published_at_is)
    if config.title_words:
        words = hashed_words(title)
        row.title_IT[0, : len(words)] = words
    return row


def scaled(name: str, value: float) -> float:
    """A number as networks read it: logarithm of the price, decades since 2000, the inverse hyperbolic sine else; NaN
    where it is no price or year.
    """
    if name == "price":
        return math.log(value) if value > 0 else math.nan
    if name.endswith("year"):
        return (value - 2_000) / 10 if 0 < abs(value) <= _LAST_YEAR else math.nan
    return math.asinh(value)


def word_hash(name: str, value: str) -> int:
    """32-bit hash of an attribute's value; 0 for an empty one, never 0 else."""
    value = value.strip().lower()
    return max(1, id_hashes(f"{name}\0{value}")[0] & 0xFFFF_FFFF) if value else 0


def _words(name: str, value: Attribute | None) -> list[int]:
    if value is None or isinstance(value, int | float):
        return []
    texts = [value] if isinstance(value, str) else value
    return list(dict.fromkeys(word for text in texts if (word := word_hash(name, text))))


def _spread(values: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """At most so many values: the first of each attribute, then the second of each, and so on; in their order."""
    seen: dict[int, int] = {}
    ranked = []
    for number, word in values:
        seen[number] = seen.get(number, 0) + 1
        ranked.append((seen[number], number, word))
    return sorted((number, word) for _, number, word in sorted(ranked)[:most])
