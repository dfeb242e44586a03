"""Columns of external parquet files: read by name, cast to the expected type or rejected.

All functions raise `Misconfigured` naming the file and the column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.errors import Misconfigured


def read_columns(
    path: Path, needed: list[str], optional: Sequence[str], keep: tuple[str, str] | None = None
) -> pa.Table:
    """Read the named columns; with `keep=(column, value)`, only rows with the value (if there is that column)."""
    with parquet_errors(path):
        file = pq.ParquetFile(path)
    present = file.schema_arrow.names
    check_columns(path, present, needed)
    columns = [*needed, *(name for name in dict.fromkeys(optional) if name in present)]
    if keep is None or keep[0] not in columns:
        with parquet_errors(path):
            return file.read(columns=columns)
    chosen = []
    for batch in file.iter_batches(columns=columns, batch_size=262_144):
        kind = batch.column(columns.index(keep[0]))
        chosen.append(batch.filter(pc.equal(kind.cast(pa.string()), keep[1])))
    schema = pa.schema([file.schema_arrow.field(name) for name in columns])
    # batches of a dictionary column may have different dictionaries, so the column becomes plain text
    plain = [
        one.set_column(columns.index(keep[0]), keep[0], pa.array([keep[1]] * len(one), pa.string())) for one in chosen
    ]
    schema = schema.set(columns.index(keep[0]), pa.field(keep[0], pa.string()))
    return pa.Table.from_batches(plain, schema=schema)


def check_columns(path: Path, present: Sequence[str], needed: Sequence[str]) -> None:
    """Reject a file that lacks a column."""
    for name in needed:
        if name not in present:
            raise Misconfigured(f"{path}: column {name!r} is missing (found: {', '.join(present)})")


def as_texts(table: pa.Table, path: Path, name: str) -> pa.ChunkedArray:
    """Cast a column of identifiers to text."""
    column = table[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise Misconfigured(f"{path}: column {name!r} must hold whole numbers or text, it is {column.type}")
    if column.null_count:
        raise Misconfigured(f"{path}: column {name!r} has {column.null_count} empty values")
    return column.cast(pa.string())


def with_texts(table: pa.Table, path: Path, names: Sequence[str]) -> pa.Table:
    """Cast the named columns to text, where the table has them."""
    for name in names:
        if name not in table.column_names:
            continue
        if name == "item_id":
            column = as_texts(table, path, name)
        else:
            try:
                column = table[name].cast(pa.string())
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise Misconfigured(f"{path}: column {name!r} must hold text, it is {table[name].type}") from None
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def as_seconds(table: pa.Table, path: Path, name: str) -> NDArray[np.int64]:
    """Turn a column of times into whole seconds since 1970."""
    column = table[name]
    if column.null_count:
        raise Misconfigured(f"{path}: column {name!r} has {column.null_count} empty values")
    if pa.types.is_timestamp(column.type):
        column = pc.divide(column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()), 1_000_000)
    elif pa.types.is_floating(column.type):
        column = pc.floor(column)
    elif not pa.types.is_integer(column.type):
        raise Misconfigured(f"{path}: column {name!r} must hold seconds since 1970 or timestamps, it is {column.type}")
    return np.asarray(column.cast(pa.int64()).to_numpy(), dtype=np.int64)


def as_positions(table: pa.Table, path: Path, name: str, values: pa.Array, other: str) -> NDArray[np.int64]:
    """Position of each value of the column in `values`."""
    texts = as_texts(table, path, name)
    found = pc.index_in(texts, value_set=values)
    if found.null_count:
        unknown = texts.filter(pc.is_null(found))[0].as_py()
        raise Misconfigured(
            f"{path}: column {name!r} names what {other} does not hold, in {found.null_count} rows, first {unknown!r}"
        )
    return np.asarray(found.to_numpy(), dtype=np.int64)


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Translate the errors of reading a file."""
    try:
        yield
    except FileNotFoundError:
        raise Misconfigured(f"data set file {path} does not exist") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise Misconfigured(f"{path} is not a readable parquet file: {error}") from None
