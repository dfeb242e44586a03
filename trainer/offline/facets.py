"""Facets of items (section, colour, genres, director, ...), read from further columns of `items.parquet`.

A text column beyond the format is a facet, a column of fractions a number. Whole numbers and flags are left out
(identifiers, times, held-out marks), and so are columns named `diag_...`, which are computed on the whole log.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trainer.datasets.folder import DataSet
from trainer.datasets.parquet import as_numbers

_OF_THE_FORMAT = {"item_id", "title", "text", "category", "price", "year", "release_year", "publish_ts", "first_ts"}
_MOST_WORDS = 128
"""A column of comma-separated words is read as words if at most this many of them are different."""


@dataclass(frozen=True, eq=False)
class Facet:
    """One facet of I items: one value or several words per item. Row 0 is padding and shares nothing."""

    value_I: NDArray[np.int64] | None
    """Number of the value, 0 unknown."""
    words_IW: NDArray[np.float32] | None
    """Unit rows over words, rare ones weighted up; zero rows where unknown."""

    @staticmethod
    def of_values(value_I: NDArray[np.int64]) -> Facet:
        """A facet with one value per item."""
        return Facet(value_I, None)

    @staticmethod
    def of_words(words_IW: NDArray[np.float32]) -> Facet:
        """A facet with several words per item, weighted by log(items / items with the word)."""
        weighted = words_IW * np.log(len(words_IW) / np.maximum(words_IW.sum(0), 1.0))
        length = np.linalg.norm(weighted, axis=1, keepdims=True)
        return Facet(None, (weighted / np.maximum(length, 1e-9)).astype(np.float32))

    def shared(self, one_P: NDArray[np.int64], other_P: NDArray[np.int64]) -> NDArray[np.float64]:
        """Per pair of items: 1 or 0 for the same value, the cosine of their words."""
        if self.value_I is not None:
            value_P = self.value_I[one_P]
            return np.asarray((value_P == self.value_I[other_P]) & (value_P > 0), np.float64)
        assert self.words_IW is not None
        return np.asarray(np.einsum("pw,pw->p", self.words_IW[one_P], self.words_IW[other_P]), np.float64)


def further_columns(data: DataSet, folder: Path) -> tuple[dict[str, Facet], dict[str, NDArray[np.float64]]]:
    """Facets and numbers by column name, by item number (row 0 is padding)."""
    path = folder / "items.parquet"
    schema = pq.read_schema(path)
    chosen = [
        field.name
        for field in schema
        if field.name not in _OF_THE_FORMAT
        and not field.name.startswith("diag_")
        and (_is_text(field.type) or _is_fraction(field.type))
    ]
    table = pq.read_table(path, columns=["item_id", *chosen])
    place = {str(item): row for row, item in enumerate(table["item_id"].to_pylist())}
    rows = np.array([place[item] for item in data.item_ids], np.int64)
    facets: dict[str, Facet] = {}
    numbers: dict[str, NDArray[np.float64]] = {}
    for name in chosen:
        if _is_text(table[name].type):
            texts = table[name].cast(pa.string()).to_pylist()
            facet = facet_of(["", *((texts[row] or "").strip().lower() for row in rows)])
            if facet is not None:
                facets[name] = facet
        else:
            numbers[name] = np.concatenate([[np.nan], as_numbers(table, path, name)[rows]])
    return facets, numbers


def facet_of(texts: list[str]) -> Facet | None:
    """Read a text column as words where it has few different ones, else as values; None if items share none."""
    parts = [[word.strip() for word in text.split(",") if word.strip()] for text in texts]
    words = sorted({word for one in parts for word in one})
    if any(len(one) > 1 for one in parts) and len(words) <= _MOST_WORDS:
        number = {word: place for place, word in enumerate(words)}
        words_IW = np.zeros((len(texts), len(words)), np.float32)
        for item, one in enumerate(parts):
            words_IW[item, [number[word] for word in one]] = 1.0
        return Facet.of_words(words_IW)
    values = sorted({text for text in texts if text})
    if not 2 <= len(values) < len(texts) / 2:
        return None  # one value for all, or nearly one per item
    numbers = {value: place for place, value in enumerate(values, 1)}
    return Facet.of_values(np.array([numbers.get(text, 0) for text in texts]))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_fraction(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_floating(kind) or (pa.types.is_decimal(kind) and kind.scale > 0))
