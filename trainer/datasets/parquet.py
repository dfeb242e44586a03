"""Columns of external parquet files: read by name, cast to the expected type or rejected.

All functions raise `Misconfigured` naming the file and the column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.base import MAX_ID_CHARACTERS, is_identifier
from schemas.errors import Misconfigured
from schemas.times import EARLIEST_EVENT, too_early, units_per_second


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
    """Cast a column of identifiers to text. Refuses what no record may have as its id (`schemas.base.Identifier`)."""
    column = _plain(table[name])
    if not (pa.types.is_integer(column.type) or _is_text(column.type)):
        raise Misconfigured(f"{path}: column {name!r} must hold whole numbers or text, it is {table[name].type}")
    _refuse_empty(column, path, name)
    texts = column.cast(pa.string())
    for text in pc.unique(texts).to_pylist():
        if not is_identifier(text):
            row = pc.index(texts, text).as_py()
            raise Misconfigured(
                f"{path}: column {name!r} holds {text[:80]!r} in row {row}; an id is a printable text of 1 to "
                f"{MAX_ID_CHARACTERS} characters without white space around it"
            )
    return texts


def as_optional_texts(table: pa.Table, path: Path, name: str) -> pa.ChunkedArray:
    """Cast a column to text without white space around it; null where it is blank."""
    column = _plain(table[name])
    if not (_is_text(column.type) or pa.types.is_null(column.type)):
        raise Misconfigured(f"{path}: column {name!r} must hold text, it is {table[name].type}")
    texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.equal(texts, ""), None, texts)


def as_binary(table: pa.Table, path: Path, name: str) -> pa.ChunkedArray:
    """A column of bytes; null where there are none."""
    column = _plain(table[name])
    if not (is_binary(column.type) or pa.types.is_null(column.type)):
        raise Misconfigured(f"{path}: column {name!r} must hold encoded bytes, it is {table[name].type}")
    column = column.cast(pa.large_binary())
    return pc.if_else(pc.equal(pc.binary_length(column), 0), None, column)


def with_texts(table: pa.Table, path: Path, names: Sequence[str]) -> pa.Table:
    """Cast the named columns to text, where the table has them."""
    for name in names:
        if name not in table.column_names:
            continue
        if name == "item_id":
            column = as_texts(table, path, name)
        else:
            try:
                column = _plain(table[name]).cast(pa.string())
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise Misconfigured(f"{path}: column {name!r} must hold text, it is {table[name].type}") from None
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def as_numbers(table: pa.Table, path: Path, name: str) -> NDArray[np.float64]:
    """Turn a column of numbers, of flags, or of texts that are numbers, into floats; NaN where it is empty."""
    column = _plain(table[name])
    if _is_text(column.type):
        column = pc.utf8_trim_whitespace(column.cast(pa.string()))
        column = pc.if_else(pc.equal(column, ""), None, column)
    elif not (is_numeric(column.type) or pa.types.is_boolean(column.type) or pa.types.is_null(column.type)):
        raise Misconfigured(f"{path}: column {name!r} must hold numbers, it is {table[name].type}")
    try:
        numbers = column.cast(pa.float64(), safe=False)
    except pa.ArrowInvalid:
        row, value = next(each for each in enumerate(column.to_pylist()) if not _is_number(each[1]))
        raise Misconfigured(f"{path}: column {name!r} holds {value[:80]!r} in row {row}, which is no number") from None
    return np.asarray(numbers.to_numpy(), dtype=np.float64)


def _is_number(text: str | None) -> bool:
    try:
        pa.scalar(text, pa.string()).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def refuse_rows(wrong: NDArray[np.bool_], values: NDArray[Any], path: Path, name: str, rule: str) -> None:
    """Raise `Misconfigured` for the first row that is wrong, if there is one."""
    if wrong.any():
        row = int(np.argmax(wrong))
        raise Misconfigured(f"{path}: column {name!r} holds {values[row]} in row {row}; {rule}")


def with_prices_and_years(items: pa.Table, path: Path) -> pa.Table:
    """Prices as floats and years as whole numbers, null where they are unknown."""
    for name in ("price", "year", "release_year"):
        if name not in items.column_names:
            continue
        values = as_numbers(items, path, name)
        known = ~np.isnan(values)
        if name == "price":
            refuse_rows(known & ~((values >= 0) & np.isfinite(values)), values, path, name, "a price is at least 0")
        else:
            whole = (values >= 0) & (values <= 9_999) & (values == np.floor(values))
            refuse_rows(known & ~whole, values, path, name, "a year is a whole number from 0 (unknown) to 9999")
        kind = pa.float64() if name == "price" else pa.int64()
        filled = np.where(known, values, 0).astype(np.float64 if name == "price" else np.int64)
        items = items.set_column(items.schema.get_field_index(name), name, pa.array(filled, kind, mask=~known))
    return items


def as_seconds(table: pa.Table, path: Path, name: str) -> NDArray[np.int64]:
    """Turn a column of times into whole seconds since 1970.

    Numbers are seconds, ms, us or ns by the size of the largest one. Dates are their midnight in UTC.
    """
    column = _plain(table[name])
    _refuse_empty(column, path, name)
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"))
    if pa.types.is_timestamp(column.type):
        unit = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}[column.type.unit]
        values = column.cast(pa.int64()).to_numpy()
    elif is_numeric(column.type):
        values = column.to_numpy() if pa.types.is_integer(column.type) else as_numbers(table, path, name)
        refuse_rows(~np.isfinite(values), values, path, name, _TIMES)
        found = units_per_second(float(np.abs(values.astype(np.float64)).max(initial=0)))
        if found is None:
            raise Misconfigured(f"{path}: column {name!r} holds {values.max()}, which is no time; {_TIMES}")
        unit = found
    else:
        raise Misconfigured(f"{path}: column {name!r} must hold times, it is {table[name].type}; {_TIMES}")
    seconds = np.asarray(np.floor_divide(values, values.dtype.type(unit)), dtype=np.int64)
    early = np.flatnonzero(seconds < EARLIEST_EVENT.timestamp())
    if len(early):
        row = int(early[0])
        raise Misconfigured(f"{path}: column {name!r} holds {too_early(seconds[row])} (row {row}); {_TIMES}")
    return seconds


_TIMES = "times are numbers since 1970 (seconds, ms, us or ns), dates or Arrow timestamps"


def is_numeric(kind: pa.DataType) -> bool:
    """Whether a type of Arrow holds numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def is_binary(kind: pa.DataType) -> bool:
    """Whether a type of Arrow holds bytes."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A dictionary column as the values that it stands for."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _refuse_empty(column: pa.ChunkedArray, path: Path, name: str) -> None:
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise Misconfigured(f"{path}: column {name!r} has {column.null_count} empty values, first in row {row}")


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


def with_user(table: pa.Table) -> tuple[pa.Table, int]:
    """The rows that name a user, and the number of others."""
    known = _is_named(_plain(table["user_id"]))
    kept = table.filter(known)
    return kept, len(table) - len(kept)


def _is_named(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where a column of ids is neither null nor an empty text."""
    known = pc.is_valid(column)
    return pc.and_(known, pc.not_equal(pc.fill_null(column, ""), "")) if _is_text(column.type) else known


def as_optional_positions(table: pa.Table, path: Path, name: str, values: pa.Array, other: str) -> NDArray[np.int64]:
    """The same for a column that may be empty in places: -1 there."""
    known = _is_named(_plain(table[name]))
    positions = np.full(len(table), -1, np.int64)
    if pc.any(known).as_py():
        positions[known.to_numpy()] = as_positions(table.select([name]).filter(known), path, name, values, other)
    return positions


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Translate the errors of reading a file."""
    try:
        yield
    except FileNotFoundError:
        raise Misconfigured(f"data set file {path} does not exist") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise Misconfigured(f"{path} is not a readable parquet file: {error}") from None
