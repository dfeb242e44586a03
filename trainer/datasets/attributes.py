"""Attributes of items (section, colour, genres, pages, ...) from the further columns of `items.parquet`.

A text column is an attribute where items share its values, or the words that commas separate in it. A column of
numbers is one unless it numbers the items. Columns named `diag_...` are computed on the whole log and left out, and so
are flags and the mark of held-out items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.attributes import (
    MAX_CHARACTERS,
    MAX_NAME_CHARACTERS,
    MAX_VALUE_CHARACTERS,
    MOST_ATTRIBUTES,
    MOST_VALUES,
    Attribute,
    characters,
)
from trainer.datasets.parquet import as_numbers, parquet_errors

_OF_THE_FORMAT = {
    *("item_id", "title", "text", "category", "price", "year", "release_year", "publish_ts", "first_ts"),
    "cold_holdout",
}


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

    def of(self, row: Mapping[str, object]) -> dict[str, Attribute]:
        """The attributes of one item, as messages carry them: without those that say nothing, and those that are too
        much beside the ones before.
        """
        found: dict[str, Attribute] = {}
        for name in self.texts:
            if text := str(row.get(name) or "").strip():
                found[name] = text[:MAX_VALUE_CHARACTERS]
        for name in self.lists:
            if words := [word[:MAX_VALUE_CHARACTERS] for word in words_of(str(row.get(name) or ""))][:MOST_VALUES]:
                found[name] = words
        for name in self.numbers:
            value = row.get(name)
            if value is not None and math.isfinite(float(value)):  # type: ignore[arg-type]
                found[name] = float(value)  # type: ignore[arg-type]
        if characters(found) <= MAX_CHARACTERS:
            return found
        kept: dict[str, Attribute] = {}
        for name, one in found.items():
            if characters({**kept, name: one}) <= MAX_CHARACTERS:
                kept[name] = one
        return kept


NO_ATTRIBUTES = ItemAttributes((), (), ())


def words_of(text: str) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def attribute_columns(path: Path) -> tuple[ItemAttributes, pa.Table]:
    """Which columns of `items.parquet` are attributes, in the order of the file, with these columns, texts as text."""
    with parquet_errors(path):
        schema = pq.read_schema(path)
        names = [field.name for field in schema if _may_be_an_attribute(field)]
        table = pq.read_table(path, columns=names)
    texts, lists, numbers = [], [], []
    for name in names:
        if _is_text(table.schema.field(name).type):
            column = table[name].cast(pa.string())
            table = table.set_column(table.column_names.index(name), name, column)
            values = [(text or "").strip().lower() for text in column.to_pylist()]
            words = [word for text in values for word in words_of(text)]
            if any("," in text for text in values) and 2 <= len(set(words)) < len(words) / 2:
                lists.append(name)
            elif 2 <= len(set(values) - {""}) < len(values) / 2:
                texts.append(name)
        elif _is_a_measure(as_numbers(table, path, name), whole=pa.types.is_integer(_plain(table[name].type))):
            numbers.append(name)
    kept = [*texts, *lists, *numbers][:MOST_ATTRIBUTES]
    found = ItemAttributes(*(tuple(name for name in some if name in kept) for some in (texts, lists, numbers)))
    return found, table.select(list(found.names))


def _may_be_an_attribute(field: pa.Field) -> bool:
    if field.name in _OF_THE_FORMAT or field.name.startswith("diag_") or len(field.name) > MAX_NAME_CHARACTERS:
        return False
    kind = _plain(field.type)
    measured = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return _is_text(kind) or bool(measured)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(_plain(kind)) or pa.types.is_large_string(_plain(kind)))


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_a_measure(values: NDArray[np.float64], *, whole: bool) -> bool:
    """Whether numbers say something: not all the same, and not, as identifiers do, one per item."""
    known = values[np.isfinite(values)]
    distinct = len(np.unique(known))
    return distinct >= 2 and not (whole and distinct > len(known) / 2)
