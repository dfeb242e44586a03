"""What else a folder's `items.parquet` says of its items: further text and number columns, as attributes.

Every text column beside the ones of the format is a facet (section, colour, genres, director, ...), every column of
fractions a number. Whole numbers and flags are left alone (identifiers, times, what is held out), and so is all that
begins with `diag_`, which is computed on the whole log.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trainer.datasets.folder import DataSet
from trainer.offline.facets import Facet

_OF_THE_FORMAT = {"item_id", "title", "text", "category", "price", "year", "release_year", "publish_ts", "first_ts"}
_MOST_WORDS = 128
"""A column of comma-separated words is read as words if there are at most this many different ones."""


def further_columns(data: DataSet, folder: Path) -> tuple[dict[str, Facet], dict[str, NDArray[np.float64]]]:
    """Facets and numbers by column name, by item number (row 0 is padding)."""
    path = folder / "items.parquet"
    schema = pq.read_schema(path)
    chosen = [
        field.name
        for field in schema
        if field.name not in _OF_THE_FORMAT
        and not field.name.startswith("diag_")
        and (_is_text(field.type) or pa.types.is_floating(field.type))
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
            values = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
            numbers[name] = np.concatenate([[np.nan], values[rows]])
    return facets, numbers


def facet_of(texts: list[str]) -> Facet | None:
    """Read a text column: as words where they come from a short list, else as whole values; None if it says nothing."""
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
        return None  # one value for all, or nearly one for each: no two items ever share it
    numbers = {value: place for place, value in enumerate(values, 1)}
    return Facet.of_values(np.array([numbers.get(text, 0) for text in texts]))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
