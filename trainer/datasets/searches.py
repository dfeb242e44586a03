"""Searches of a data set: what the user of a row had asked for, by words or by a photo.

A row of `interactions.parquet` or `exposures.parquet` has its search in columns of its own (`query_text`,
`query_image`), or names a row of `queries.parquet` by `query_id`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.behaviours import MAX_QUERY_CHARACTERS
from schemas.errors import Misconfigured
from trainer.datasets.images import StoredImages
from trainer.datasets.parquet import as_binary, as_optional_positions, as_optional_texts, as_texts, read_columns

SEARCH_COLUMNS = ("query_text", "query_image", "query_id")
NO_SEARCH = -1


class Searches:
    """The distinct searches of a set, which rows name by their place; `NO_SEARCH` is none."""

    def __init__(self, folder: Path) -> None:
        """Raises `Misconfigured` if there is a `queries.parquet` that cannot be used."""
        self._path = folder / "queries.parquet"
        self._ids: pa.Array | None = None
        self._stored: StoredImages | None = None
        self._texts: list[str | None] = []
        self._images: list[bytes | None] = []
        self._inline: dict[tuple[str | None, bytes | None], int] = {}
        if self._path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, place: int) -> str | None:
        """The words of a search, if it has some."""
        return self._texts[place]

    def images(self, places: Sequence[int]) -> list[bytes | None]:
        """The encoded photo of each search, None where it has none."""
        if self._stored is None or self._ids is None:
            return [self._images[place] for place in places]
        stored = [place for place in places if place < len(self._ids)]
        found = iter(self._stored.of([self._ids[place].as_py() for place in stored]))
        return [next(found) if place < len(self._ids) else self._images[place] for place in places]

    def places(self, table: pa.Table, path: Path) -> NDArray[np.int64] | None:
        """The search of each row of a table; None if it has no column of searches.

        Raises `Misconfigured` if a row names a search that there is none of, or has one in two ways.
        """
        given = [name for name in SEARCH_COLUMNS if name in table.column_names]
        if not given:
            return None
        if "query_id" in given:
            if len(given) > 1:
                raise Misconfigured(f"{path}: columns {given[0]!r} and 'query_id' both say what was searched; keep one")
            if self._ids is None:
                raise Misconfigured(f"{path}: column 'query_id' names rows of queries.parquet, which is not there")
            return as_optional_positions(table, path, "query_id", self._ids, self._path.name)
        return self._own(table, path, given)

    def _own(self, table: pa.Table, path: Path, given: Sequence[str]) -> NDArray[np.int64]:
        """Places of searches that stand in the rows themselves: equal ones have one."""
        nothing = np.zeros(len(table), np.int64), pa.array([None])
        text_N, texts = _coded(_searched(table, path)) if "query_text" in given else nothing
        image_N, images = _coded(as_binary(table, path, "query_image")) if "query_image" in given else nothing
        pairs, pair_N = np.unique(np.stack([text_N, image_N], 1), axis=0, return_inverse=True)
        place_P = [self._place(texts[int(text)].as_py(), images[int(image)].as_py() or None) for text, image in pairs]
        return np.array(place_P, np.int64)[pair_N.reshape(-1)]

    def _place(self, text: str | None, image: bytes | None) -> int:
        if text is None and image is None:
            return NO_SEARCH
        place = self._inline.get((text, image))
        if place is None:
            place = self._inline[text, image] = len(self._texts)
            self._texts.append(text)
            self._images.append(image)
        return place

    def _read(self) -> None:
        table = read_columns(self._path, ["query_id"], ["query_text"])
        self._ids = as_texts(table, self._path, "query_id").combine_chunks()
        if len(pc.unique(self._ids)) != len(self._ids):
            raise Misconfigured(f"{self._path}: column 'query_id' holds the same search more than once")
        self._texts = [None] * len(table)
        if "query_text" in table.column_names:
            self._texts = _searched(table, self._path).to_pylist()
        self._images = [None] * len(table)
        if "image" in pq.read_schema(self._path).names:
            self._stored = StoredImages(self._path, key="query_id")
        elif "query_text" not in table.column_names:
            raise Misconfigured(f"{self._path}: has neither 'query_text' nor 'image', so it says nothing of a search")


def _searched(table: pa.Table, path: Path) -> pa.ChunkedArray:
    """Words of searches as behaviours carry them; blank ones are none."""
    return pc.utf8_slice_codeunits(as_optional_texts(table, path, "query_text"), 0, MAX_QUERY_CHARACTERS)


def _coded(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """Each value by its place among the distinct ones, null among them."""
    coded = pc.dictionary_encode(column, null_encoding="encode").combine_chunks()
    coded = coded.chunk(0) if isinstance(coded, pa.ChunkedArray) else coded
    return coded.indices.to_numpy().astype(np.int64), coded.dictionary
