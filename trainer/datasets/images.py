"""Encoded pictures in a parquet file, by an id."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import Misconfigured
from trainer.datasets.parquet import as_texts, check_columns, is_binary, parquet_errors


class StoredImages:
    """Columns `key` and `image`, read row group by row group; at most `max_cached_bytes` of decoded ones are cached."""

    def __init__(self, path: Path, *, key: str, max_cached_bytes: int = 268_435_456) -> None:
        """Raises `Misconfigured` if the file lacks one of the columns, or holds other things in it."""
        self._path = path
        self._max_cached_bytes = max_cached_bytes
        with parquet_errors(path):
            self._file = pq.ParquetFile(path)
        check_columns(path, self._file.schema_arrow.names, [key, "image"])
        kind = self._file.schema_arrow.field("image").type
        if not is_binary(kind):
            raise Misconfigured(f"{path}: column 'image' must hold encoded bytes, it is {kind}")
        self._place: dict[str, tuple[int, int]] = {}
        for group in range(self._file.num_row_groups):
            ids = as_texts(self._file.read_row_group(group, columns=[key]), path, key).to_pylist()
            self._place.update({one: (group, row) for row, one in enumerate(ids)})
        self._cached: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._place)

    def of(self, ids: Sequence[str]) -> list[bytes | None]:
        """Look up the picture of each id, None where there is none; reads each row group at most once per call."""
        found: list[bytes | None] = [None] * len(ids)
        places = [(*self._place[one], position) for position, one in enumerate(ids) if one in self._place]
        for group, row, position in sorted(places):
            found[position] = self._images(group)[row].as_py() or None
        return found

    def _images(self, group: int) -> pa.ChunkedArray:
        if group not in self._cached:
            with parquet_errors(self._path):
                self._cached[group] = self._file.read_row_group(group, columns=["image"])["image"]
            while len(self._cached) > 1 and sum(one.nbytes for one in self._cached.values()) > self._max_cached_bytes:
                self._cached.popitem(last=False)
        self._cached.move_to_end(group)
        return self._cached[group]
